"""CDF features: where the newest value of a series stands among the ones before it.

One definition over leading batch dimensions, in float64: meta-training uses it, and the policy
runner of the extension is its twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

__all__ = ["END_WEIGHTS", "CdfState", "update_cdf"]

END_WEIGHTS: Final = (1.25, 2.5, 5.0, 10.0, 20.0)
"""The weights w: the newest of t values counts w times as much as in a plain mean."""

_LARGEST: Final = 1e100
"""Beyond it a value counts as infinite: its square would leave float64."""


@dataclass(frozen=True)
class CdfState:
    """Running moments of S series under each of W end weights; float64, ``[...]`` is the batch.

    Attributes:
        count: ``[..., S]``, how many finite values each series had.
        mean: ``[..., S, W]``.
        var: ``[..., S, W]``.
    """

    count: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor

    @classmethod
    def initial(
        cls, batch: Sequence[int], series: int, device: torch.device | str = "cpu"
    ) -> CdfState:
        """The state before any value."""
        count = torch.zeros(*batch, series, dtype=torch.float64, device=device)
        moments = torch.zeros(*batch, series, len(END_WEIGHTS), dtype=torch.float64, device=device)
        return cls(count, moments, moments.clone())


def update_cdf(state: CdfState, x: torch.Tensor) -> tuple[torch.Tensor, CdfState]:
    """Add one value to each series, then ask where it stands.

    The t-th value has the rate ``r = w / (t + w - 1)``, which gives the values before it weights
    that grow polynomially with time: ``d = x - mean; mean += r d; var = (1 - r) (var + r d^2)``.
    The feature is ``Phi((x - mean) / sqrt(var))`` with the updated moments, 0.5 where the variance
    is 0. It is the same for ``a x + b`` with any a > 0, and lies strictly between 0 and 1 as long
    as float64 can tell: ``|x - mean| <= sqrt((t - 1) / w) sqrt(var)``.

    Args:
        state: moments of S series.
        x: float64 ``[..., S]``. NaN, infinities and values beyond 1e100 leave the moments alone.

    Returns:
        The features, float64 ``[..., S, W]``, 0.5 where x is not usable; and the new state.
    """
    usable = x.abs() <= _LARGEST  # False for NaN
    value = torch.where(usable, x, 0.0)[..., None]
    end_weights = x.new_tensor(END_WEIGHTS)
    count = state.count + usable.to(x.dtype)
    rate = end_weights / (count[..., None].clamp_min(1.0) + end_weights - 1.0)
    delta = value - state.mean
    seen = usable[..., None]
    mean = torch.where(seen, state.mean + rate * delta, state.mean)
    var = torch.where(seen, (1.0 - rate) * (state.var + rate * delta * delta), state.var)
    known = seen & (var > 0)
    score = (value - mean) / torch.where(known, var, 1.0).sqrt()
    feature = torch.where(known, torch.special.ndtr(score), 0.5)
    return feature, CdfState(count, mean, var)
