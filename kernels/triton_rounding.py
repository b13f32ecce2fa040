"""Rounding float32 results to 16-bit parameters, to the nearest or at random.

The random bits are those of :mod:`lhopt_fused.kernels.rounding`, in which the words are defined.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lhopt_fused.kernels.triton_tables import STATE_COLUMNS, STEP

__all__ = ["chunk_keys", "round_at_random", "round_to", "rounding_keys"]

FIRST_KEY = tl.constexpr(0x9E37_79B9)
SECOND_KEY = tl.constexpr(0x85EB_CA6B)
LARGEST_BFLOAT16 = tl.constexpr(0x7F7F_0000)  # the bits of its largest finite number
LARGEST_FLOAT16 = tl.constexpr(65504.0)
LEAST_NORMAL_FLOAT16 = tl.constexpr(2.0**-14)


@triton.jit
def nearest_bfloat16(x, bits):
    """The bits of ``x`` with those of the nearest bfloat16 in the upper half, ties to even."""
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where(x == x, nearest, 0x7FC00000)  # a NaN must not round to a number


@triton.jit
def upper_half(bits):
    """The bfloat16 number in the upper half of 32 bits."""
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """float32 -> ``DTYPE``, to the nearest, ties to even.

    bfloat16 is the upper half of a float32, so that rounding is integer arithmetic; written out
    because Triton's interpreter truncates.
    """
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return upper_half(nearest_bfloat16(x, x.to(tl.uint32, bitcast=True)))
    return x.to(DTYPE)


@triton.jit
def mix(x):
    """A bijection of 32-bit words that mixes all bits."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def chunk_key(key, seed_ptr, tensor, step, start):
    """``key`` after the words that all elements of a chunk share."""
    key = mix(key ^ tl.load(seed_ptr).to(tl.uint32, bitcast=True))
    key = mix(key ^ tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True))
    key = mix(key ^ tensor.to(tl.uint32))
    key = mix(key ^ step.to(tl.uint32))
    return mix(key ^ (start >> 32).to(tl.uint32))


@triton.jit
def chunk_keys(seed_ptr, tensor_state_ptr, tensor, start):
    """Both keys of the random words of a chunk, which never spans a multiple of 2^32 elements."""
    step = tl.load(tensor_state_ptr + tensor * STATE_COLUMNS + STEP).to(tl.int64)
    first = chunk_key(tl.full([], FIRST_KEY, tl.uint32), seed_ptr, tensor, step, start)
    second = chunk_key(tl.full([], SECOND_KEY, tl.uint32), seed_ptr, tensor, step, start)
    return first + start.to(tl.uint32), second


@triton.jit
def rounding_keys(seed_ptr, tensor_state_ptr, tensor, start, STOCHASTIC: tl.constexpr):
    """:func:`chunk_keys` where chance has a say, else nothing of use."""
    if STOCHASTIC:
        return chunk_keys(seed_ptr, tensor_state_ptr, tensor, start)
    zero = tl.full([], 0, tl.uint32)
    return zero, zero


@triton.jit
def bfloat16_at_random(x, words):
    """The lower half of the 32 bits carries into the upper one at random."""
    bits = x.to(tl.uint32, bitcast=True)
    has_neighbours = (bits & 0x7FFFFFFF) <= LARGEST_BFLOAT16
    carried = bits + (words >> 16)
    return upper_half(tl.where(has_neighbours, carried, nearest_bfloat16(x, bits)))


@triton.jit
def float16_at_random(x, words):
    """So do the 13 bits that it drops; below its normal numbers it has multiples of 2^-24."""
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.abs(x)
    normal = ((bits + (words >> 19)) >> 13) << 13
    multiple = size * 16777216.0
    below = tl.floor(multiple)
    above = (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 < multiple - below
    subnormal = (below + tl.where(above, 1.0, 0.0)) * 5.9604644775390625e-08
    signed = subnormal.to(tl.uint32, bitcast=True) | ((bits >> 31) << 31)
    rounded = tl.where(size < LEAST_NORMAL_FLOAT16, signed, normal)
    rounded = tl.where(size <= LARGEST_FLOAT16, rounded, bits)
    return rounded.to(tl.float32, bitcast=True).to(tl.float16)


@triton.jit
def round_at_random(x, indices, first, second, DTYPE: tl.constexpr):
    """float32 -> bfloat16 or float16, to either neighbour, so that the mean is ``x``.

    ``indices`` are those of elements in their chunk.
    """
    words = mix(mix(indices.to(tl.uint32) + first) ^ second)
    if DTYPE == tl.bfloat16:  # noqa: SIM108, SIM300
        rounded = bfloat16_at_random(x, words)
    else:
        rounded = float16_at_random(x, words)
    return rounded
