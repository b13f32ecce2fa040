"""Applying the update ``p <- a p - lr T u``, in a pass of its own where T needs all of u first."""

from __future__ import annotations

import triton
import triton.language as tl

from lhopt_fused.kernels.triton_chunks import data_pointer, load_chunk, tile, where_set
from lhopt_fused.kernels.triton_formats import dither_key
from lhopt_fused.kernels.triton_rounding import rounding_keys
from lhopt_fused.kernels.triton_state import (
    load_moments,
    load_weights,
    moment_pointers,
    store_moments,
    store_weights,
    weight_pointers,
)
from lhopt_fused.kernels.triton_tables import (
    ADDRESS_COLUMNS,
    C_ACTIVE,
    C_CLIP,
    C_DECAY,
    C_DEFERRED,
    C_MASKED,
    C_STEP_SIZE,
    COEFFICIENT_COLUMNS,
    DELAYS_TRUST,
    P_NEW_PARAM_SQ,
    PARAM_NORM,
    PARTIAL_COLUMNS,
    STATE_COLUMNS,
    W_ACTIVE,
    W_DEFERRED,
    WORK_COLUMNS,
)
from lhopt_fused.kernels.triton_update import (
    load_betas,
    load_direction,
    next_moments,
    update_direction,
)

__all__ = ["apply_kernel", "param_norm_kernel"]


@triton.jit
def apply_chunk(
    chunks_ptr,
    index,
    grads_ptr,
    addresses_ptr,
    coefficients_ptr,
    tensor_state_ptr,
    seed_ptr,
    new_param_sq_ptr,
    PARAM_DTYPE: tl.constexpr,
    BESIDE_DTYPE: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ROOT_DENOMINATOR: tl.constexpr,
    DECAY_IN_UPDATE: tl.constexpr,
    MASKS: tl.constexpr,
    KEEPS_NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The update of one chunk, computed again from p, m and v, with the same bits.

    Where storing rounds m and v, they are those from before the step, and are stepped here. Else
    the gradient is looked at only where a tensor holds elements to be left out.
    """
    index = tl.full([], 0, tl.int64) + index  # the interpreter counts in Python's integers
    tensor, start, length, row = load_chunk(chunks_ptr, index)
    row_ptr = coefficients_ptr + tensor * COEFFICIENT_COLUMNS
    is_deferred = (tl.load(row_ptr + C_DEFERRED) != 0.0) & (tl.load(row_ptr + C_ACTIVE) != 0.0)
    length = tl.where(is_deferred, length, 0)
    address_ptr = addresses_ptr + tensor * ADDRESS_COLUMNS
    param_ptr, beside_ptr = weight_pointers(address_ptr, start, PARAM_DTYPE, BESIDE_DTYPE, ALIGNED)
    m_ptr, v_ptr, m_scale_ptr, v_scale_ptr = moment_pointers(
        address_ptr, start, MOMENT_DTYPE, ALIGNED
    )
    grad_ptr = data_pointer(tl.load(grads_ptr + tensor), start, GRAD_DTYPE, ALIGNED)
    first_key, second_key = rounding_keys(seed_ptr, tensor_state_ptr, tensor, start, STOCHASTIC)
    dither = dither_key(tensor_state_ptr, tensor)
    some_masked = tl.load(row_ptr + C_MASKED)
    beta1, ombeta1, beta2, ombeta2 = load_betas(row_ptr)
    clip = tl.load(row_ptr + C_CLIP)
    m_scale, s_scale, epsilon, weight_decay = load_direction(row_ptr)
    step_size, decay = tl.load(row_ptr + C_STEP_SIZE), tl.load(row_ptr + C_DECAY)
    new_param_sq = tl.zeros([ROWS], tl.float32)
    for offset in range(0, length, ROWS * VECTOR):
        indices, inside = tile(offset, length, ROWS, VECTOR, ALIGNED)
        p = load_weights(param_ptr, beside_ptr, indices, inside, BESIDE_DTYPE)
        m, v = load_moments(
            m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, indices, inside, offset, length,
            MOMENT_DTYPE, ROWS, VECTOR,
        )  # fmt: skip
        taken = inside
        if MOMENT_DTYPE == tl.float32:  # noqa: SIM300
            if MASKS:
                looks = where_set(inside, some_masked)
                g = tl.load(grad_ptr + indices, mask=looks, other=0.0).to(tl.float32)
                taken = tl.abs(g) < float("inf")
        else:
            g = tl.load(grad_ptr + indices, mask=inside, other=0.0).to(tl.float32)
            if MASKS:
                taken = tl.abs(g) < float("inf")
            g = tl.where(taken, g, 0.0) * clip
            new_m, new_v = next_moments(g, m, v, beta1, ombeta1, beta2, ombeta2, ROOT_DENOMINATOR)
            m, v = tl.where(taken, new_m, m), tl.where(taken, new_v, v)
            store_moments(
                m, v, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, indices, inside, offset, length,
                start, dither, MOMENT_DTYPE, ROWS, VECTOR,
            )  # fmt: skip
        u, _, _ = update_direction(
            p, m, v, m_scale, s_scale, epsilon, weight_decay, ROOT_DENOMINATOR, DECAY_IN_UPDATE
        )
        new = p * decay - step_size * u
        if MASKS:
            new = tl.where(taken, new, p)
        kept = store_weights(
            new, param_ptr, beside_ptr, indices, inside, first_key, second_key,
            PARAM_DTYPE, BESIDE_DTYPE, STOCHASTIC,
        )  # fmt: skip
        if KEEPS_NORM:
            new_param_sq += tl.sum(kept * kept, axis=1)
    if KEEPS_NORM:
        tl.store(new_param_sq_ptr + row, tl.sum(new_param_sq, axis=0), mask=is_deferred)


@triton.jit
def any_waits(waits_ptr, tensors, BLOCK: tl.constexpr):
    """Whether a tensor waits for its first trust ratio."""
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, tensors, BLOCK):
        tensor = first + tl.arange(0, BLOCK)
        found |= tl.load(waits_ptr + tensor, mask=tensor < tensors, other=0)
    return tl.max(found, axis=0) != 0


@triton.jit(do_not_specialize=["chunks", "tensors"])
def apply_kernel(
    chunks_ptr,
    chunks,
    waits_ptr,  # int32 [T]
    tensors,
    grads_ptr,  # int64 [T]
    addresses_ptr,  # int64 [T, ADDRESS_COLUMNS]
    coefficients_ptr,  # float32 [T, COEFFICIENT_COLUMNS]
    tensor_state_ptr,
    seed_ptr,  # int32 [2]
    new_param_sq_ptr,  # float32 [rows], written where KEEPS_NORM
    PARAM_DTYPE: tl.constexpr,
    BESIDE_DTYPE: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ROOT_DENOMINATOR: tl.constexpr,
    DECAY_IN_UPDATE: tl.constexpr,
    MASKS: tl.constexpr,
    DELAYED: tl.constexpr,
    KEEPS_NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Apply what the moments pass deferred: 12 bytes an element read and 4 written for float32.

    A delayed trust ratio defers only the first step of a tensor. A few programs look whether there
    is one and share its chunks; nearly always they end at once.
    """
    first, last = tl.program_id(0), tl.program_id(0) + 1
    if DELAYED:
        last = tl.where(any_waits(waits_ptr, tensors, 256), chunks, 0)
    for index in range(first, last, tl.num_programs(0)):
        apply_chunk(
            chunks_ptr, index, grads_ptr, addresses_ptr, coefficients_ptr, tensor_state_ptr,
            seed_ptr, new_param_sq_ptr, PARAM_DTYPE, BESIDE_DTYPE, MOMENT_DTYPE, STOCHASTIC,
            GRAD_DTYPE, ROOT_DENOMINATOR, DECAY_IN_UPDATE, MASKS, KEEPS_NORM, ALIGNED, ROWS,
            VECTOR,
        )  # fmt: skip


@triton.jit
def param_norm_kernel(
    first_row_ptr,  # int64 [T + 1]
    traits_ptr,  # int32 [T]
    new_param_sq_ptr,  # float32 [rows]
    work_ptr,
    tensor_state_ptr,
    partial_ptr,  # float64 [T, PARTIAL_COLUMNS], written in phases
    PHASES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Remember the norm of a parameter whose update was deferred although its trust is delayed.

    In phases, leave the square of any whose update was deferred.
    """
    tensor = tl.program_id(0).to(tl.int64)
    row_ptr = work_ptr + tensor * WORK_COLUMNS
    remembers = (tl.load(row_ptr + W_ACTIVE) != 0.0) & (tl.load(row_ptr + W_DEFERRED) != 0.0)
    if not PHASES:
        remembers &= (tl.load(traits_ptr + tensor) & DELAYS_TRUST) != 0
    if remembers:
        begin, end = tl.load(first_row_ptr + tensor), tl.load(first_row_ptr + tensor + 1)
        total = tl.zeros([ROWS], tl.float64)
        for first in range(begin, end, ROWS):
            rows = first + tl.arange(0, ROWS)
            total += tl.load(new_param_sq_ptr + rows, mask=rows < end, other=0.0).to(tl.float64)
        square = tl.sum(total, axis=0)
        if PHASES:
            tl.store(partial_ptr + tensor * PARTIAL_COLUMNS + P_NEW_PARAM_SQ, square)
        else:
            tl.store(tensor_state_ptr + tensor * STATE_COLUMNS + PARAM_NORM, tl.sqrt(square))
