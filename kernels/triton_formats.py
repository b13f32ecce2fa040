"""Moments in 16 and 8 bits and split masters: ``formats``, which defines them, on the device.

A row of a tile is a part of a block of 64 elements, or a block; what a block has in common is
worked out for each of its rows, which costs a few shuffles and moves nothing else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lhopt_fused.kernels import formats
from lhopt_fused.kernels.triton_rounding import mix, upper_half
from lhopt_fused.kernels.triton_tables import STATE_COLUMNS, STEP

__all__ = [
    "BLOCK",
    "block_scale",
    "decode_m",
    "decode_v",
    "dither_bfloat16",
    "dither_key",
    "dither_words",
    "encode_m",
    "encode_v",
    "join_master",
    "split_master",
]

BLOCK = tl.constexpr(formats.BLOCK)
PLACE_STEP = tl.constexpr(37345)
TINY = tl.constexpr(2.0**-117)
LARGEST_BITS = tl.constexpr(0x7F7F_0000)  # of bfloat16's largest finite number
CREEP = tl.constexpr(0xFFFF - 15)  # carries all but a few units in the last place


@triton.jit
def dither_key(tensor_state_ptr, tensor):
    """What the words of this step of a tensor begin with."""
    step = tl.load(tensor_state_ptr + tensor * STATE_COLUMNS + STEP).to(tl.int64)
    return mix(step.to(tl.uint32))


@triton.jit
def dither_words(key, start, indices):
    """16 random-looking bits for each element; ``indices`` are those in a chunk from ``start``."""
    place = (start.to(tl.uint32) + indices.to(tl.uint32)) & (BLOCK - 1)
    return (key + place * PLACE_STEP) & 0xFFFF


@triton.jit
def dither_bfloat16(x, words):
    """float32 -> bfloat16, to either neighbour; at most the largest finite number."""
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, LARGEST_BITS)
    return upper_half(((bits >> 31) << 31) | (size + words))


@triton.jit
def block_scale(x, VECTOR: tl.constexpr):
    """Scale of the block of each row: its largest ``|x|``, rounded up to bfloat16, as float32.

    ``[ROWS, VECTOR]`` -> ``[ROWS]``.
    """
    rows: tl.constexpr = BLOCK // VECTOR
    blocks: tl.constexpr = x.shape[0] // rows
    largest = tl.max(tl.reshape(tl.max(tl.abs(x), axis=1), [blocks, rows]), axis=1, keep_dims=True)
    largest = tl.reshape(tl.broadcast_to(largest, [blocks, rows]), [x.shape[0]])
    bits = (largest.to(tl.uint32, bitcast=True) + CREEP) & 0xFFFF0000
    return tl.minimum(bits, LARGEST_BITS).to(tl.float32, bitcast=True)


@triton.jit
def share(words):
    """Words of 16 bits as numbers in [0, 1)."""
    return ((words << 7) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def encode_m(m, scale, words):
    """int8 codes of ``m [ROWS, VECTOR]`` under ``scale [ROWS]``, most of them near zero.

    A division costs a GPU a dozen instructions; the square of a reciprocal root, three.
    """
    per_scale = 1.0 / tl.maximum(scale, TINY)
    root = tl.rsqrt(tl.fma(tl.abs(m), per_scale[:, None], 1.0))
    code = tl.fma(m * (254.0 * per_scale)[:, None] * root, root, share(words))
    return tl.floor(tl.minimum(tl.maximum(code, -127.0), 127.0)).to(tl.int32).to(tl.int8)


@triton.jit
def decode_m(code, scale):
    """Undo :func:`encode_m`."""
    code = code.to(tl.float32)
    root = tl.rsqrt(254.0 - tl.abs(code))
    return scale[:, None] * (code * root * root)


@triton.jit
def encode_v(v, scale, words):
    """uint8 codes of the root of ``v [ROWS, VECTOR]`` under ``scale [ROWS]``."""
    per_root = 255.0 / tl.sqrt(tl.maximum(scale, TINY))
    code = tl.fma(tl.sqrt(v), per_root[:, None], share(words))
    return tl.minimum(code, 255.0).to(tl.int32).to(tl.uint8)


@triton.jit
def decode_v(code, scale):
    """Undo :func:`encode_v`."""
    root = code.to(tl.float32) * 0.00392156862745098
    return scale[:, None] * (root * root)


@triton.jit
def join_master(p, correction):
    """The float32 master of which bfloat16 ``p`` is the upper half, and int8 or int16 the rest.

    Its sign is that of ``p``: a zero stays one.
    """
    bits = p.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    rest = correction.to(tl.int32)
    if correction.dtype == tl.int8:
        rest = rest << 8
    joined = bits + rest.to(tl.uint32, bitcast=True)
    joined = tl.where(((joined ^ bits) >> 31) == 0, joined, bits)
    return joined.to(tl.float32, bitcast=True)


@triton.jit
def split_master(master, DTYPE: tl.constexpr):
    """``(p, correction)`` of a float32 master; the correction is int8, rounded, or int16."""
    bits = tl.where(master == master, master.to(tl.uint32, bitcast=True), 0x7FC00000)
    upper = (bits + 0x8000) >> 16
    rest = (bits - (upper << 16)).to(tl.int32, bitcast=True)
    if DTYPE == tl.int8:  # noqa: SIM300
        rest = tl.minimum((rest + 128) >> 8, 127)
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True), rest.to(DTYPE)
