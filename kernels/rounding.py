"""Stochastic rounding to 16-bit parameters, and the random bits it takes, in plain torch.

The definition that every backend meets, bit for bit: a word of 32 random bits belongs to each
element of a tensor in each of its steps, whoever computes it and in whatever order.
"""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["bits_of", "float_of", "mix", "random_words", "round_stochastically"]

_WORD: Final = 0xFFFF_FFFF
_STARTS: Final = (0x9E37_79B9, 0x85EB_CA6B)  # of the two keys; any two different words would do


def mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words, held in int64, that mixes all bits (lowbias32, C. Wellons)."""
    x = ((x ^ (x >> 16)) * 0x7FEB_352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846C_A68B) & _WORD
    return x ^ (x >> 16)


def random_words(seed: int, tensor: int, step: int, elements: torch.Tensor) -> torch.Tensor:
    """Counter-based random words: ``mix(mix(low + key_0) ^ key_1)`` for an element's lower half.

    ``key`` absorbs, one word after the other by ``key = mix(key ^ word)``, the lower and the upper
    half of the seed, the tensor, the step and the upper half of the element.

    Args:
        seed: any integer; its lower 64 bits count.
        tensor: index of the tensor in its layout.
        step: number of this step of the tensor, from 1 on.
        elements: int64, positions of elements in memory order.

    Returns:
        int64 of the shape of ``elements``, each in [0, 2^32).
    """
    keys = []
    for start in _STARTS:
        key = torch.full_like(elements, start)
        for word in (seed, seed >> 32, tensor, step):
            key = mix(key ^ (word & _WORD))
        keys.append(mix(key ^ (elements >> 32)))
    first, second = keys
    return mix(mix(((elements & _WORD) + first) & _WORD) ^ second)


def round_stochastically(x: torch.Tensor, words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to one of the two neighbours in ``dtype``, to each as often as the other is near.

    The mean of the result is ``x``: exactly for bfloat16 and for normal float16 numbers, and to
    2^-24 of their distance for numbers below 2^-14 in float16. Numbers that ``dtype`` has stay as
    they are. What lies beyond its largest finite number has no two neighbours, and is rounded to
    the nearest like NaN and inf.

    Args:
        x: float32.
        words: int64, random in [0, 2^32), of the shape of ``x``.
        dtype: bfloat16 or float16.
    """
    bits = bits_of(x)
    if dtype == torch.bfloat16:  # the upper half of a float32: the lower one carries at random
        rounded = float_of((bits + (words >> 16)) & 0xFFFF_0000)
    else:  # drops 13 bits of the fraction; below 2^-14 its numbers are the multiples of 2^-24
        normal = float_of((bits + (words >> 19)) & 0xFFFF_E000)
        multiple = x.abs() * 2.0**24
        below = multiple.floor()
        above = (words >> 8).to(x.dtype) * 2.0**-24 < multiple - below
        subnormal = ((below + above) * 2.0**-24).copysign(x)
        rounded = torch.where(x.abs() < 2.0**-14, subnormal, normal)
    return torch.where(x.abs() <= torch.finfo(dtype).max, rounded, x).to(dtype)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """The bits of float32 numbers, int64 in [0, 2^32)."""
    return x.view(torch.int32).to(torch.int64) & _WORD


def float_of(bits: torch.Tensor) -> torch.Tensor:
    """The float32 numbers with these bits, given in [0, 2^32) as int64."""
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)
