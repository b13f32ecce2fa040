"""How moments and masters are kept in 16 and 8 bits, in plain torch.

The definition that every backend meets. A step computes with fresh float32 numbers; what is here
happens at its end, when they are stored, and at the beginning of the next, when they are read.

Moments are stored dithered: instead of to the nearest, x goes to ``floor(x + d)``, with d spread
over [0, 1) by the step of the tensor and the place of the element. Rounded to the nearest, a second
moment that loses a thousandth in each step would keep its code for ever; dithered, it is right on
average. d comes from no seed: one run gives one result.

Blocks and places count in memory order. Tensors are dense.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from lhopt_fused.kernels.rounding import bits_of, float_of, mix

__all__ = [
    "BLOCK",
    "CORRECTIONS",
    "MOMENT_DTYPES",
    "QUANTISED",
    "SMALLEST_QUANTISED",
    "correction_of",
    "decode",
    "dither_words",
    "encode",
    "in_memory_order",
    "join_master",
    "memory_order",
    "scales_shape",
    "split_master",
    "takes_blocks",
]

BLOCK: Final = 64
"""Elements that share a scale."""

SMALLEST_QUANTISED: Final = 4096
"""Elements of the smallest tensor that is worth 8 bits."""

QUANTISED: Final = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
"""The dtype of each moment's codes, which is what tells them apart: m is signed, v is not."""

MOMENT_DTYPES: Final = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    QUANTISED["exp_avg"]: QUANTISED["exp_avg_sq"],
}
"""Dtypes of v by those of m, of parameters that are not float64."""

CORRECTIONS: Final = {"split8": torch.int8, "split16": torch.int16}
"""Dtypes of what bfloat16 parameters lack of their masters, by how these are split."""

_PLACE_STEP: Final = 37345  # times a place in its block: spreads neighbours over [0, 2^16)
_TINY: Final = 2.0**-117  # blocks below it use fewer codes, so that 254 / scale is finite
_SLACK: Final = 15  # units in the last place of a float32 that do not count
_LARGEST: Final = torch.finfo(torch.bfloat16).max


def memory_order(x: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor as a 1-d view in the order in which they lie in memory."""
    return x.as_strided((x.numel(),), (1,))


def in_memory_order(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``flat [numel]`` with the shape of ``like``: element i is the i-th of ``like`` in memory."""
    shaped = torch.empty_like(like, dtype=flat.dtype)
    memory_order(shaped).copy_(flat)
    return shaped


# ---------------------------------------------------------------------- moments


def takes_blocks(shape: torch.Size) -> bool:
    """Whether the moments of a whole tensor of this shape are quantised where 8 bits are wanted.

    They are where it is large and its rows (all dimensions but the first) are whole blocks, so
    that a shard of rows holds whole blocks too.
    """
    is_large = shape.numel() >= SMALLEST_QUANTISED
    return len(shape) > 1 and is_large and math.prod(shape[1:]) % BLOCK == 0


def scales_shape(shape: torch.Size) -> tuple[int, int]:
    """Shape of the scales of a tensor that takes blocks, or of a piece of one: by row, by block."""
    return shape[0], math.prod(shape[1:]) // BLOCK


def dither_words(step: int, count: int, device: torch.device) -> torch.Tensor:
    """16 bits for each of ``count`` elements in memory order: ``mix(step) + 37345 (i mod 64)``.

    Args:
        step: number of this step of the tensor, from 1 on.
        count: elements.
        device: of the result.

    Returns:
        int64 ``[count]``, each in [0, 2^16); d is this over 2^16.
    """
    first = mix(torch.tensor(step, dtype=torch.int64, device=device))
    places = torch.arange(count, device=device) % BLOCK
    return (first + _PLACE_STEP * places) & 0xFFFF


def encode(
    x: torch.Tensor, dtype: torch.dtype, step: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Round a moment for storage.

    - bfloat16: the bits of ``x`` plus its word, cut off at 16 bits; at most the largest finite
      number.
    - int8 (m): ``127 f(x / scale)`` with f(y) = 2 y / (1 + abs(y)), which has its codes near 0,
      dithered, within [-127, 127].
    - uint8 (v): ``255 sqrt(x / scale)``, dithered, at most 255.

    The scale of a block is its largest magnitude, rounded up to bfloat16 so that no code leaves its
    range; at most the largest finite number. Up to 15 units in the last place of a float32 above a
    number of bfloat16, that number is it: rounding on the way does not make scales creep.

    Args:
        x: float32, dense; without NaN. Where there are blocks, a multiple of 64 elements.
        dtype: of the result. float32 and float64 are copied as they are.
        step: number of this step of the tensor, from 1 on; None rounds to the nearest.

    Returns:
        What is stored, of the shape and in the memory order of ``x``; and for 8 bits the scales,
        bfloat16 ``[numel / 64]`` in memory order, else None.
    """
    if dtype in (torch.float32, torch.float64):
        return x.to(dtype, copy=True), None
    flat = memory_order(x)
    words = (
        torch.full_like(flat, 0x8000, dtype=torch.int64)
        if step is None
        else dither_words(step, len(flat), x.device)
    )
    if dtype == torch.bfloat16:
        bits = bits_of(flat.clamp(-_LARGEST, _LARGEST))
        return in_memory_order(float_of((bits + words) & 0xFFFF_0000).bfloat16(), x), None
    blocks = flat.view(-1, BLOCK)
    scales = _round_up(blocks.abs().amax(1)) if blocks.numel() else blocks.sum(1)
    divisor = scales[:, None].clamp(min=_TINY)
    if dtype == torch.int8:
        scaled = 127 * (blocks / (divisor / 2 + blocks.abs() / 2))
    else:
        scaled = blocks.sqrt() * (255 / divisor.sqrt())
    shares = words.to(x.dtype).view(-1, BLOCK) / 0x1_0000
    low, high = (-127, 127) if dtype == torch.int8 else (0, 255)
    codes = (scaled + shares).floor().clamp(low, high).to(dtype)
    return in_memory_order(codes.flatten(), x), scales.bfloat16()


def decode(stored: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """What :meth:`encode` has stored, as float32, or float64 as it is.

    - int8: ``scale code / (254 - abs(code))``.
    - uint8: ``scale (code / 255)^2``.

    The largest codes give the scale itself, to the bit: what is stored again keeps its scale.

    Args:
        stored: a moment, dense.
        scales: bfloat16, one per block in memory order, for 8 bits.
    """
    if stored.dtype not in QUANTISED.values():
        return stored if stored.dtype == torch.float64 else stored.float()
    assert scales is not None
    codes = memory_order(stored).view(-1, BLOCK).float()
    scale = scales.reshape(-1, 1).float()
    if stored.dtype == torch.int8:
        flat = scale * (codes / (254 - codes.abs()))
    else:
        flat = scale * (codes / 255).square()
    return in_memory_order(flat.flatten(), stored)


def _round_up(x: torch.Tensor) -> torch.Tensor:
    """Numbers >= 0 as float32 numbers that bfloat16 has, none smaller by more than rounding."""
    return float_of((bits_of(x.float()) + (0xFFFF - _SLACK)) & 0xFFFF_0000).clamp(max=_LARGEST)


# ---------------------------------------------------------------------- split masters


def split_master(master: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 master as a bfloat16 parameter and what it lacks.

    The parameter is the nearest, halves away from zero; the difference of bits is in [-2^15, 2^15).
    int16 holds it whole: the master is exact. int8 holds its upper half, rounded, halves up, at
    most 127: the master is exact to 2^-8 of the distance between two bfloat16 numbers, and to half
    of that where 127 is not the limit. NaN and inf stay what they are; what rounds to infinity in
    the parameter is still finite in the master, unless it rounds to infinity there too.

    Args:
        master: float32.
        dtype: int16 or int8.

    Returns:
        bfloat16 and ``dtype``, each of the shape and in the memory order of ``master``.
    """
    bits = bits_of(master)
    upper = (bits + 0x8000) & 0xFFFF_0000
    param = torch.where(master.isnan(), master, float_of(upper)).bfloat16()
    return param, correction_of(master, param, dtype)


def correction_of(master: torch.Tensor, param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a bfloat16 parameter lacks of its float32 master, as far as ``dtype`` holds it."""
    lacks = (bits_of(master) - bits_of(param.float())).where(~master.isnan(), 0)
    if dtype == torch.int8:
        lacks = (lacks + 128) >> 8
    limits = torch.iinfo(dtype)
    return lacks.clamp(limits.min, limits.max).to(dtype)


def join_master(param: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
    """The float32 master of a bfloat16 parameter with a correction from :func:`split_master`.

    A parameter that has been set to zero by someone else stays zero whatever the correction:
    magnitudes do not go below it.
    """
    bits = bits_of(param.float())
    shift = 8 if correction.dtype == torch.int8 else 0
    joined = bits + (correction.to(torch.int64) << shift)
    stays = ((joined ^ bits) & 0x8000_0000) != 0
    return float_of(torch.where(stays, bits, joined))
