"""The actions in plain numbers, for one run: small tensors cost more than what they compute.

Both functions are those of :mod:`lhopt_fused.actions` for a single hyperparameter.
"""

from __future__ import annotations

import math

from lhopt_fused.actions import Action

__all__ = ["moved", "relative"]


def moved(value: float, shift: float, action: Action) -> float:
    """A hyperparameter after a decision, see :func:`lhopt_fused.actions.apply_shifts`."""
    if shift == 0.0 or value == 0.0 or not math.isfinite(value):
        return value
    if action.kind == "scale":
        result = value * _exp(shift)
    else:
        result = 1.0 / (1.0 + _exp(-(_bounded_logit(value, action) + shift)))
    return min(max(result, action.low), action.high)


def relative(value: float, start: float, action: Action) -> float:
    """How far it is from its start, see :func:`lhopt_fused.actions.relative_to_start`."""
    if action.kind == "scale":
        return _log(value) - _log(start)
    return _bounded_logit(value, action) - _bounded_logit(start, action)


def _bounded_logit(value: float, action: Action) -> float:
    bounded = min(max(value, action.low), action.high)  # NaN stays NaN
    return _log(bounded) - _log(1.0 - bounded)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _log(x: float) -> float:
    """As tensors have it: no error at 0 and below."""
    if x > 0.0:
        return math.log(x)
    return -math.inf if x == 0.0 else math.nan
