"""What a step reads and writes of a tensor, in whatever form it is kept.

Weights are numbers of ``PARAM_DTYPE``, alone or with something beside them: ``BESIDE_DTYPE`` is the
dtype of a master's 16-bit copy, or that of the correction bits of a split master, or None. Moments
are float32, bfloat16, or 8-bit codes with a scale for each block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lhopt_fused.kernels.triton_chunks import data_pointer
from lhopt_fused.kernels.triton_formats import (
    BLOCK,
    block_scale,
    decode_m,
    decode_v,
    dither_bfloat16,
    dither_words,
    encode_m,
    encode_v,
    join_master,
    split_master,
)
from lhopt_fused.kernels.triton_rounding import round_at_random, round_to
from lhopt_fused.kernels.triton_tables import (
    A_BESIDE,
    A_M,
    A_M_SCALE,
    A_PARAM,
    A_V,
    A_V_SCALE,
)

__all__ = [
    "load_moments",
    "load_weights",
    "moment_pointers",
    "store_moments",
    "store_weights",
    "weight_pointers",
]


@triton.jit
def weight_pointers(
    address_ptr,
    start,
    PARAM_DTYPE: tl.constexpr,
    BESIDE_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Pointers to element ``start`` of the weights and of what lies beside them."""
    param_ptr = data_pointer(tl.load(address_ptr + A_PARAM), start, PARAM_DTYPE, ALIGNED)
    beside_ptr = param_ptr
    if BESIDE_DTYPE is not None:
        beside_ptr = data_pointer(tl.load(address_ptr + A_BESIDE), start, BESIDE_DTYPE, ALIGNED)
    return param_ptr, beside_ptr


@triton.jit
def load_weights(param_ptr, beside_ptr, indices, inside, BESIDE_DTYPE: tl.constexpr):
    """The weights as the step sees them, float32; 0 outside."""
    p = tl.load(param_ptr + indices, mask=inside, other=0.0)
    if (BESIDE_DTYPE == tl.int8) | (BESIDE_DTYPE == tl.int16):  # noqa: SIM300
        return join_master(p, tl.load(beside_ptr + indices, mask=inside, other=0))
    return p.to(tl.float32)


@triton.jit
def store_weights(
    new,
    param_ptr,
    beside_ptr,
    indices,
    mask,
    first_key,
    second_key,
    PARAM_DTYPE: tl.constexpr,
    BESIDE_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Keep ``new`` where ``mask`` says so; returns what has a norm, a split master as it was."""
    if (BESIDE_DTYPE == tl.int8) | (BESIDE_DTYPE == tl.int16):  # noqa: SIM300
        rounded, beside = split_master(new, BESIDE_DTYPE)
        kept = new
    else:
        if STOCHASTIC:
            rounded = round_at_random(new, indices, first_key, second_key, PARAM_DTYPE)
        else:
            rounded = round_to(new, PARAM_DTYPE)
        if BESIDE_DTYPE is not None:
            beside = round_to(new, BESIDE_DTYPE)
        kept = rounded.to(tl.float32)
    tl.store(param_ptr + indices, rounded, mask=mask)
    if BESIDE_DTYPE is not None:
        tl.store(beside_ptr + indices, beside, mask=mask)
    return kept


@triton.jit
def moment_pointers(address_ptr, start, MOMENT_DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to element ``start`` of m and v, and to the scales of its block (of codes only)."""
    v_dtype: tl.constexpr = tl.uint8 if tl.int8 == MOMENT_DTYPE else MOMENT_DTYPE
    m_ptr = data_pointer(tl.load(address_ptr + A_M), start, MOMENT_DTYPE, ALIGNED)
    v_ptr = data_pointer(tl.load(address_ptr + A_V), start, v_dtype, ALIGNED)
    block = start // BLOCK
    m_scale_ptr = data_pointer(tl.load(address_ptr + A_M_SCALE), block, tl.bfloat16, False)
    v_scale_ptr = data_pointer(tl.load(address_ptr + A_V_SCALE), block, tl.bfloat16, False)
    return m_ptr, v_ptr, m_scale_ptr, v_scale_ptr


@triton.jit
def row_blocks(offset, length, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Of each row ``[ROWS]`` of a tile: which block it is of, whether it is inside and its first.

    A block is inside a chunk as a whole, or not at all.
    """
    first = offset + tl.arange(0, ROWS) * VECTOR
    inside = first < length
    return first // BLOCK, inside, inside & (first % BLOCK == 0)


@triton.jit
def load_moments(
    m_ptr,
    v_ptr,
    m_scale_ptr,
    v_scale_ptr,
    indices,
    inside,
    offset,
    length,
    MOMENT_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``(m, v)`` in float32; 0 and 1 outside, where no update may come of them."""
    if MOMENT_DTYPE == tl.int8:  # noqa: SIM300
        block, is_inside, _ = row_blocks(offset, length, ROWS, VECTOR)
        m_scale = tl.load(m_scale_ptr + block, mask=is_inside, other=0.0).to(tl.float32)
        v_scale = tl.load(v_scale_ptr + block, mask=is_inside, other=1.0).to(tl.float32)
        m = decode_m(tl.load(m_ptr + indices, mask=inside, other=0), m_scale)
        v = decode_v(tl.load(v_ptr + indices, mask=inside, other=255), v_scale)
        return m, v
    m = tl.load(m_ptr + indices, mask=inside, other=0.0).to(tl.float32)
    return m, tl.load(v_ptr + indices, mask=inside, other=1.0).to(tl.float32)


@triton.jit
def store_moments(
    m,
    v,
    m_ptr,
    v_ptr,
    m_scale_ptr,
    v_scale_ptr,
    indices,
    inside,
    offset,
    length,
    start,
    key,
    MOMENT_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Keep ``m`` and ``v``, dithered with the step's ``key`` where their form holds less."""
    if MOMENT_DTYPE == tl.float32:  # noqa: SIM300
        stored_m, stored_v = m, v
    else:
        words = dither_words(key, start, indices)
        if MOMENT_DTYPE == tl.bfloat16:  # noqa: SIM300
            stored_m, stored_v = dither_bfloat16(m, words), dither_bfloat16(v, words)
        else:
            block, _, is_first = row_blocks(offset, length, ROWS, VECTOR)
            m_scale, v_scale = block_scale(m, VECTOR), block_scale(v, VECTOR)
            stored_m, stored_v = encode_m(m, m_scale, words), encode_v(v, v_scale, words)
            tl.store(m_scale_ptr + block, round_to(m_scale, tl.bfloat16), mask=is_first)
            tl.store(v_scale_ptr + block, round_to(v_scale, tl.bfloat16), mask=is_first)
    tl.store(m_ptr + indices, stored_m, mask=inside)
    tl.store(v_ptr + indices, stored_v, mask=inside)
