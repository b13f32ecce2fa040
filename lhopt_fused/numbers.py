"""Numbers that a param group holds, checked."""

from __future__ import annotations

import math
import sys
from typing import Any, Final

import torch

__all__ = ["LARGEST", "number", "number_or"]

LARGEST: Final = sys.float_info.max


def number(
    group: dict[str, Any], name: str, low: float, high: float, *, open_low: bool = False
) -> float:
    """``group[name]`` as a float in [low, high] (or (low, high]); NaN never passes."""
    value = group[name]
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return math.nan  # stays on its device: it is copied into the table there
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not (low < number if open_low else low <= number) or not number <= high:
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must be a number in {bracket}{low:g}, {high:g}], got {value!r}")
    return number


def number_or(
    group: dict[str, Any],
    name: str,
    absent: float,
    low: float,
    high: float,
    *,
    open_low: bool = False,
) -> float:
    """As :func:`number`, with a neutral value where the setting is None."""
    return absent if group[name] is None else number(group, name, low, high, open_low=open_low)
