"""Kernels around device functions, so that tests can call these by themselves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lhopt_fused.kernels.triton_chunks import tile
from lhopt_fused.kernels.triton_formats import dither_key, join_master, split_master
from lhopt_fused.kernels.triton_plan import DTYPES, STATE_DTYPES, DeviceTables
from lhopt_fused.kernels.triton_rounding import chunk_keys, round_at_random
from lhopt_fused.kernels.triton_state import load_moments, store_moments
from lhopt_fused.types import StepLayout


@triton.jit
def _round_kernel(
    x_ptr, rounded_ptr, place_ptr, seed_ptr, state_ptr, DTYPE: tl.constexpr, COUNT: tl.constexpr
):
    tensor, start = tl.load(place_ptr), tl.load(place_ptr + 1)
    first_key, second_key = chunk_keys(seed_ptr, state_ptr, tensor, start)
    indices = tl.arange(0, COUNT)
    x = tl.load(x_ptr + indices)
    tl.store(rounded_ptr + indices, round_at_random(x, indices, first_key, second_key, DTYPE))


def round_kernel(
    x: torch.Tensor, dtype: torch.dtype, layout: StepLayout, *, tensor: int, start: int
) -> torch.Tensor:
    """``x`` (float32, a power of two of them) as the elements of a tensor from ``start`` on."""
    rounded = torch.empty_like(x, dtype=dtype)
    place = torch.tensor([tensor, start], dtype=torch.int64).to(x.device)
    seed = DeviceTables(layout).rounding_seed
    _round_kernel[(1,)](
        x, rounded, place, seed, layout.tensor_state, DTYPE=DTYPES[dtype], COUNT=len(x)
    )
    return rounded.cpu()


@triton.jit
def _moments_kernel(
    m_ptr, v_ptr, m_kept_ptr, v_kept_ptr, m_scale_ptr, v_scale_ptr, place_ptr, state_ptr,
    MOMENT_DTYPE: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    tensor, start, length = tl.load(place_ptr), tl.load(place_ptr + 1), tl.load(place_ptr + 2)
    key = dither_key(state_ptr, tensor)
    for offset in range(0, length, ROWS * VECTOR):
        indices, inside = tile(offset, length, ROWS, VECTOR, False)
        m, v = tl.load(m_ptr + indices, mask=inside), tl.load(v_ptr + indices, mask=inside)
        store_moments(
            tl.where(inside, m, 0.0), tl.where(inside, v, 1.0), m_kept_ptr, v_kept_ptr,
            m_scale_ptr, v_scale_ptr, indices, inside, offset, length, start, key,
            MOMENT_DTYPE, ROWS, VECTOR,
        )  # fmt: skip
        m, v = load_moments(
            m_kept_ptr, v_kept_ptr, m_scale_ptr, v_scale_ptr, indices, inside, offset, length,
            MOMENT_DTYPE, ROWS, VECTOR,
        )  # fmt: skip
        tl.store(m_ptr + indices, m, mask=inside)
        tl.store(v_ptr + indices, v, mask=inside)


def keep_moments(
    m: torch.Tensor,
    v: torch.Tensor,
    dtype: torch.dtype,
    state: torch.Tensor,
    *,
    start: int,
    vector: int,
) -> tuple[torch.Tensor, ...]:
    """Store moments and read them again, as those of tensor 1 of ``state`` from ``start`` on.

    Returns:
        What is stored of each, their scales, and both as they are read.
    """
    count, blocks = m.numel(), -(-m.numel() // 64)
    kept = [
        m.new_zeros(count, dtype=dtype)
        for dtype in (dtype, torch.uint8 if dtype == torch.int8 else dtype)
    ]
    scales = [m.new_full((blocks,), torch.nan, dtype=torch.bfloat16) for _ in range(2)]
    decoded = m.clone(), v.clone()
    place = torch.tensor([1, start, count], dtype=torch.int64).to(m.device)
    _moments_kernel[(1,)](
        *decoded, *kept, *scales, place, state,
        MOMENT_DTYPE=STATE_DTYPES[dtype], ROWS=256 // vector, VECTOR=vector,
    )  # fmt: skip
    return tuple(x.cpu() for x in (*kept, *scales, *decoded))


@triton.jit
def _split_master_kernel(
    master_ptr, p_ptr, correction_ptr, DTYPE: tl.constexpr, COUNT: tl.constexpr
):
    indices = tl.arange(0, COUNT)
    p, correction = split_master(tl.load(master_ptr + indices), DTYPE)
    tl.store(p_ptr + indices, p)
    tl.store(correction_ptr + indices, correction)


def keep_master(master: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Split a master (a power of two of elements) -> parameter, correction, the master again."""
    p, correction = (torch.empty_like(master, dtype=d) for d in (torch.bfloat16, dtype))
    _split_master_kernel[(1,)](master, p, correction, DTYPE=STATE_DTYPES[dtype], COUNT=len(master))
    return p.cpu(), correction.cpu(), read_master(p, correction)


@triton.jit
def _read_master_kernel(p_ptr, correction_ptr, master_ptr, COUNT: tl.constexpr):
    indices = tl.arange(0, COUNT)
    master = join_master(tl.load(p_ptr + indices), tl.load(correction_ptr + indices))
    tl.store(master_ptr + indices, master)


def read_master(p: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
    """The master (a power of two of elements) of a parameter and its correction."""
    master = torch.empty_like(p, dtype=torch.float32)
    _read_master_kernel[(1,)](p, correction, master, COUNT=len(p))
    return master.cpu()
