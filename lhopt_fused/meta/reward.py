"""The reward of a training run: how much faster than its baseline it got to where it ended.

A power curve through the baseline's eval losses says at which step the baseline reaches the run's
final loss; the reward is the log of the ratio of the steps. Only differences of losses count, so
they may be zero or negative, and no positive affine map of them changes a reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

__all__ = [
    "LARGEST_REWARD",
    "SAMPLE_POINTS",
    "PowerCurve",
    "fit_power_curve",
    "sample_points",
    "speedup_reward",
    "wins",
]

LARGEST_REWARD: Final = 3.0
"""Rewards are clipped to this magnitude: a twentyfold speed-up or slow-down."""

SAMPLE_POINTS: Final = 14
"""Points of a baseline's loss, besides the one at random initialisation."""

_LARGEST_LOSS: Final = 1e300  # so that the difference of two is finite
_SMALLEST_EXPONENT: Final = 0.01
_LARGEST_EXPONENT: Final = 10.0
_GRID: Final = 48
_ROUGH_ZOOMS: Final = 2
_FINE_ZOOMS: Final = 10  # the grid is then finer than 1e-13
_ROBUST_ROUNDS: Final = 4
_HUBER: Final = 1.345  # 95 % efficient where noise is normal
_SIGMA_PER_MEDIAN: Final = 1.4826  # likewise
_SMALLEST_RESIDUAL: Final = 1e-9  # of the spread of the losses: smaller ones are rounding
_FLAT: Final = 1e-9  # of the spread of the losses per e-fold of time


def sample_points(total_steps: int) -> list[int]:
    """Steps at which a baseline's eval loss is taken: rising, from 1 to ``2 * total_steps``.

    As evenly spaced in the logarithm as distinct integers are. There are 14, or every step where
    that is fewer.

    Raises:
        ValueError: ``total_steps`` is below 1.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}, expected at least 1")
    last = 2 * total_steps
    if last <= SAMPLE_POINTS:
        return list(range(1, last + 1))
    points: list[int] = []
    for index in range(SAMPLE_POINTS):
        even = round(last ** (index / (SAMPLE_POINTS - 1)))
        points.append(max(even, points[-1] + 1 if points else 1))
    room = range(last - SAMPLE_POINTS + 1, last + 1)
    return [min(point, latest) for point, latest in zip(points, room, strict=True)]


@dataclass(frozen=True)
class PowerCurve:
    """``L(t) = asymptote + amplitude * t^-exponent``, falling; ``t`` is 1 plus the steps done.

    Held as ``L = start - slope * (1 - t^-exponent) / exponent``, which stays well conditioned down
    to the logarithm that an exponent of 0 would be. Float64 ``[R]`` each.

    Attributes:
        start: the loss at t = 1, random initialisation; NaN where no loss was finite.
        slope: fall per e-fold of t at the start; 0 for a flat curve.
        exponent: above 0.
    """

    start: torch.Tensor
    slope: torch.Tensor
    exponent: torch.Tensor

    @property
    def amplitude(self) -> torch.Tensor:
        """How far the loss ever falls."""
        return self.slope / self.exponent

    @property
    def asymptote(self) -> torch.Tensor:
        """Where it ends."""
        return self.start - self.amplitude

    def losses(self, steps: torch.Tensor) -> torch.Tensor:
        """Losses ``[R, K]`` after ``steps``, ``[K]`` or ``[R, K]``."""
        fall = _fall(torch.log1p(steps.double()), self.exponent[..., None])
        return self.start[..., None] - self.slope[..., None] * fall

    def log_time(self, losses: torch.Tensor) -> torch.Tensor:
        """log t at which each curve reaches ``losses``, float64 ``[R]``.

        Infinite where it never does, negative above the start. A flat curve gives +inf below it,
        -inf above it and NaN on it.
        """
        fall = (self.start - losses) / self.slope
        left = 1.0 - self.exponent * fall
        return torch.where(left > 0, -left.log() / self.exponent, torch.inf * fall)


@torch.no_grad()
def fit_power_curve(
    initial_loss: torch.Tensor, steps: torch.Tensor, losses: torch.Tensor
) -> PowerCurve:
    """The power curves of a batch of R baselines.

    Minimises Huber's loss of the residuals: least squares for the two linear parameters in closed
    form, with a slope of at least 0; finer and finer grids for the exponent; and reweighting.

    Points that are not finite are left out. Points above the random initialisation count as that,
    so that a spike weighs no more than having learned nothing. A baseline that does not fall gets
    a flat curve.

    Args:
        initial_loss: ``[R]``, at random initialisation, step 0.
        steps: ``[K]`` or ``[R, K]``, the steps of the other points.
        losses: ``[R, K]``, eval losses there.

    Raises:
        ValueError: the shapes do not fit.
    """
    if losses.shape[:1] != initial_loss.shape or steps.shape[-1:] != losses.shape[1:]:
        raise ValueError(
            f"initial_loss, steps and losses have shapes {list(initial_loss.shape)}, "
            f"{list(steps.shape)} and {list(losses.shape)}, expected [R], [K] or [R, K], [R, K]"
        )
    points = torch.cat([initial_loss[:, None], losses], dim=1).double()
    log_t = torch.log1p(steps.double()).expand(losses.shape)
    log_t = torch.cat([torch.zeros_like(log_t[:, :1]), log_t], dim=1)
    valid = points.isfinite()
    points = points.clamp(-_LARGEST_LOSS, _LARGEST_LOSS)
    ceiling = torch.where(valid[:, :1], points[:, :1], torch.inf)
    points = points.minimum(ceiling)
    low = torch.where(valid, points, torch.inf).amin(1)
    spread = torch.where(valid, points, -torch.inf).amax(1) - low
    unit = torch.where(spread > 0, spread, 1.0)
    scaled = torch.where(valid, (points - low[:, None]) / unit[:, None], 0.0)
    start, slope, exponent = _fit_scaled(log_t, scaled, valid)
    slope = torch.where((spread > 0) & (slope > _FLAT), slope, 0.0)
    known = valid.any(1)
    return PowerCurve(
        torch.where(known, low + unit * start, torch.nan),
        torch.where(known, unit * slope, torch.nan),
        exponent,
    )


@torch.no_grad()
def speedup_reward(
    curve: PowerCurve, final_loss: torch.Tensor, total_steps: int | torch.Tensor
) -> torch.Tensor:
    """log of (steps that the baseline needs to reach the final loss) / (steps of the run).

    Clipped to ±3. -3 for a final loss that is not finite; else 0 where the baseline had no finite
    loss at all, for then nothing can be said; else 3 for a final loss that is not above the
    baseline's asymptote. Against a flat baseline 3 below it, -3 above it, 0 on it.

    Args:
        curve: of the baselines.
        final_loss: ``[R]``, eval losses at the end of the runs.
        total_steps: of the runs, one number or ``[R]``.

    Returns:
        float64 ``[R]``, finite.
    """
    final_loss = final_loss.double()
    log_steps = torch.log1p(torch.as_tensor(total_steps, device=final_loss.device).double())
    reward = curve.log_time(final_loss) - log_steps
    reward = reward.clamp(-LARGEST_REWARD, LARGEST_REWARD).nan_to_num(nan=0.0)
    return torch.where(final_loss.isfinite(), reward, -LARGEST_REWARD)


def wins(losses: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """1 where a loss is lower than the other's, 0.5 where equal; one that is not finite loses.

    Float64, in the shape that both broadcast to.
    """
    mine, theirs = (
        x.double().nan_to_num(nan=torch.inf, posinf=torch.inf) for x in (losses, others)
    )
    return (mine < theirs).double() + 0.5 * (mine == theirs).double()


def _fall(log_t: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """``(1 - t^-exponent) / exponent``."""
    return -torch.expm1(-exponent * log_t) / exponent


def _fit_scaled(
    log_t: torch.Tensor, y: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start, slope and exponent, ``[R]`` each, of points ``[R, K]`` with losses from 0 to 1."""
    weights = valid.double()
    for _ in range(_ROBUST_ROUNDS):
        exponent = _best_exponent(log_t, y, weights, _ROUGH_ZOOMS)
        start, slope, _ = _least_squares(log_t, y, weights, exponent)
        fall = _fall(log_t, exponent[:, None])
        residual = (y - start[:, None] + slope[:, None] * fall).abs()
        median = torch.where(valid, residual, torch.nan).nanmedian(dim=1).values
        limit = _HUBER * _SIGMA_PER_MEDIAN * median.clamp_min(_SMALLEST_RESIDUAL)
        weights = valid * (limit[:, None] / residual).clamp_max(1.0)
    exponent = _best_exponent(log_t, y, weights, _FINE_ZOOMS)
    start, slope, _ = _least_squares(log_t, y, weights, exponent)
    return start, slope, exponent


def _least_squares(
    log_t: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, exponent: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start, slope (at least 0) and weighted squared error, ``[...]``, of points ``[..., K]``."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (weights * x).sum(-1) / weights.sum(-1).clamp_min(torch.finfo(x.dtype).tiny)

    fall = _fall(log_t, exponent[..., None])
    fall_mean, y_mean = mean(fall), mean(y)
    centred = fall - fall_mean[..., None]
    variance = mean(centred.square())
    slope = (-mean(centred * y) / torch.where(variance > 0, variance, 1.0)).clamp_min(0.0)
    start = y_mean + slope * fall_mean
    error = mean((y - start[..., None] + slope[..., None] * fall).square())
    return start, slope, error


def _best_exponent(
    log_t: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, zooms: int
) -> torch.Tensor:
    """The exponent ``[R]`` of least error: the best of a grid, of a finer one beside it, ..."""
    low = torch.full_like(y[:, :1], math.log(_SMALLEST_EXPONENT))
    high = torch.full_like(y[:, :1], math.log(_LARGEST_EXPONENT))
    places = torch.linspace(0.0, 1.0, _GRID, dtype=y.dtype, device=y.device)
    for _ in range(zooms):
        grid = low + (high - low) * places
        _, _, errors = _least_squares(log_t[:, None], y[:, None], weights[:, None], grid.exp())
        best = errors.argmin(1, keepdim=True)
        low = grid.gather(1, (best - 1).clamp_min(0))
        high = grid.gather(1, (best + 1).clamp_max(_GRID - 1))
    return ((low + high) / 2).exp()[:, 0]
