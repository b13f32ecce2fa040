"""The gradient pass: sums of squares and non-finite elements of each tensor, 4 bytes an element."""

from __future__ import annotations

import triton
import triton.language as tl

from lhopt_fused.kernels.triton_chunks import data_pointer, load_chunk, stack4, tile
from lhopt_fused.kernels.triton_tables import (
    BIG_SQ,
    GRAD_COLUMNS,
    MIDDLE_SQ,
    NONFINITE,
    SMALL_SQ,
    W_GRAD_SQ,
    W_NONFINITE,
    WORK_COLUMNS,
)

__all__ = ["grad_norm_kernel", "grad_sums_kernel"]

# A plain sum of squares within these bounds has lost nothing that counts to overflow or underflow.
LEAST = tl.constexpr(2.0**-60)
MOST = tl.constexpr(2.0**120)

# Numbers whose squares would leave float32 are scaled by a power of two first (Blue 1978).
BIG = tl.constexpr(2.0**52)
BIG_SCALE = tl.constexpr(2.0**-76)
SMALL = tl.constexpr(2.0**-48)
SMALL_SCALE = tl.constexpr(2.0**100)


@triton.jit
def plain_sum(grad_ptr, length, ALIGNED: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Sum of squares; NaN or inf where an element is, or where float32 is too narrow."""
    sums = tl.zeros([ROWS], tl.float32)
    for offset in range(0, length, ROWS * VECTOR):
        indices, inside = tile(offset, length, ROWS, VECTOR, ALIGNED)
        g = tl.load(grad_ptr + indices, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(g * g, axis=1)
    return tl.sum(sums, axis=0)


@triton.jit
def careful_sums(grad_ptr, length, ALIGNED: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """``[GRAD_COLUMNS]``: squares of big, middling and small elements; how many are not finite.

    A large gradient must not be mistaken for an infinite one, nor a small one for zero.
    """
    sums = tl.zeros([ROWS, GRAD_COLUMNS], tl.float32)
    for offset in range(0, length, ROWS * VECTOR):
        indices, inside = tile(offset, length, ROWS, VECTOR, ALIGNED)
        g = tl.load(grad_ptr + indices, mask=inside, other=0.0).to(tl.float32)
        size = tl.abs(g)
        is_finite = size < float("inf")  # false for NaN
        big = tl.where(is_finite & (size > BIG), g * BIG_SCALE, 0.0)
        small = tl.where(size < SMALL, g * SMALL_SCALE, 0.0)
        middle = tl.where((size >= SMALL) & (size <= BIG), g, 0.0)
        sums += stack4(
            tl.sum(big * big, axis=1),
            tl.sum(middle * middle, axis=1),
            tl.sum(small * small, axis=1),
            tl.sum(tl.where(is_finite, 0.0, 1.0), axis=1),
        )
    return tl.sum(sums, axis=0)


@triton.jit
def grad_norm_kernel(
    chunks_ptr,
    grads_ptr,  # int64 [T]: addresses, 0 where a tensor has no gradient
    partials_ptr,  # float32 [rows, GRAD_COLUMNS]
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The common case costs two instructions an element; any other chunk is read again."""
    tensor, start, length, row = load_chunk(chunks_ptr, tl.program_id(0))
    address = tl.load(grads_ptr + tensor)
    if address == 0:
        return
    grad_ptr = data_pointer(address, start, GRAD_DTYPE, ALIGNED)
    columns = tl.arange(0, GRAD_COLUMNS)
    total = plain_sum(grad_ptr, length, ALIGNED, ROWS, VECTOR)
    sums = tl.where(columns == MIDDLE_SQ, total, 0.0)
    if ((total >= LEAST) & (total <= MOST)) == 0:
        sums = careful_sums(grad_ptr, length, ALIGNED, ROWS, VECTOR)
    tl.store(partials_ptr + row * GRAD_COLUMNS + columns, sums)


@triton.jit
def grad_sums_kernel(
    first_row_ptr,  # int64 [T + 1]
    grads_ptr,
    partials_ptr,
    work_ptr,
    ROWS: tl.constexpr,
):
    """Add up the partial sums of one tensor, always in the same order."""
    tensor = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(first_row_ptr + tensor), tl.load(first_row_ptr + tensor + 1)
    if tl.load(grads_ptr + tensor) == 0:
        end = begin
    columns = tl.arange(0, GRAD_COLUMNS)
    sums = tl.zeros([ROWS, GRAD_COLUMNS], tl.float64)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        pointers = partials_ptr + rows * GRAD_COLUMNS + columns[None, :]
        sums += tl.load(pointers, mask=rows < end, other=0.0).to(tl.float64)
    totals = tl.sum(sums, axis=0)
    scale = tl.where(columns == BIG_SQ, BIG_SCALE, tl.where(columns == SMALL_SQ, SMALL_SCALE, 1.0))
    unscaled = totals / scale.to(tl.float64) / scale.to(tl.float64)
    grad_sq = tl.sum(tl.where(columns == NONFINITE, 0.0, unscaled), axis=0)
    nonfinite = tl.sum(tl.where(columns == NONFINITE, totals, 0.0), axis=0)
    tl.store(work_ptr + tensor * WORK_COLUMNS + W_GRAD_SQ, grad_sq)
    tl.store(work_ptr + tensor * WORK_COLUMNS + W_NONFINITE, nonfinite)
