"""What the losses of runs say: speed-ups with intervals, margins, wins, performance profiles.

Pure functions of numbers. Lower losses are better; runs that diverged have infinite ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Interval",
    "bootstrap_gain",
    "bootstrap_median",
    "bootstrap_speedup",
    "budget_to_reach",
    "margin",
    "performance_profile",
    "performance_score",
    "steps_to_target",
    "win",
]

_LONGEST_TAU: Final = 4.0  # how many times slower than the best still counts for something

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A number with a bootstrap 95 % interval.

    Attributes:
        value, low, high: the number and its interval.
        at_least: the value is the longest budget that was tried: the truth is that or more.
        at_most: the value is the shortest: the truth is that or less.
    """

    value: float
    low: float
    high: float
    at_least: bool = False
    at_most: bool = False

    def __str__(self) -> str:
        sign = "≥ " if self.at_least else "≤ " if self.at_most else ""
        return f"{sign}{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def budget_to_reach(loss: float, budgets: ArrayLike, losses: ArrayLike) -> float:
    """The budget at which a baseline's curve reaches a loss.

    More budget never counts as a loss: the curve is the lowest loss up to each budget. Between
    budgets it is straight in the logarithm of the budget.

    Args:
        loss: to reach; infinite is reached by anything.
        budgets: rising, > 0, ``[B]``.
        losses: final losses at these, ``[B]``.

    Returns:
        From the first budget, where the loss is reached by then, to the last, where it is not
        reached at all.

    Raises:
        ValueError: budgets do not rise, are not positive, or do not fit the losses.
    """
    given, final = _curve(budgets, losses)
    reached = np.flatnonzero(final <= loss)
    if len(reached) == 0:
        return float(given[-1])
    after = int(reached[0])
    before = after - 1
    if after == 0 or math.isinf(final[before]):
        return float(given[after])
    share = (final[before] - loss) / (final[before] - final[after])
    logs = np.log(given)
    return float(np.exp(logs[before] + share * (logs[after] - logs[before])))


def _curve(budgets: ArrayLike, losses: ArrayLike) -> tuple[Array, Array]:
    given = np.asarray(budgets, dtype=np.float64)
    final = np.nan_to_num(np.asarray(losses, dtype=np.float64), nan=np.inf, posinf=np.inf)
    if given.ndim != 1 or given.shape != final.shape or len(given) == 0:
        raise ValueError(f"budgets {given.shape} and losses {final.shape} must both be [B], B >= 1")
    if given[0] <= 0 or not bool((np.diff(given) > 0).all()):
        raise ValueError(f"budgets must be positive and rise, got {given.tolist()}")
    return given, np.minimum.accumulate(final)


def bootstrap_speedup(
    losses: ArrayLike,
    budgets: ArrayLike,
    baseline: ArrayLike,
    *,
    budget: float = 1.0,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """By how much a baseline's budget must exceed that of some runs to get where they got.

    The baseline's curve is the mean over its seeds; the value is the median of the speed-ups of
    the runs. The interval resamples the seeds of both.

    Args:
        losses: final losses of the runs, one for each seed, ``[S]``.
        budgets: rising, ``[B]``.
        baseline: final losses of the baseline by seed and budget, ``[T, B]``.
        budget: of the runs.
        resamples: how often seeds are drawn for the interval.
        seed: of these draws.

    Raises:
        ValueError: shapes do not fit, or budgets do not rise.
    """
    curve = _Curves(budgets, baseline)
    mine = _finals(losses)

    @cache  # a few seeds are drawn in the same numbers again and again
    def speedup(own: tuple[int, ...], curves: tuple[int, ...]) -> float:
        return curve.reached(mine[list(own)], curves) / budget

    low, high = _interval(speedup, (len(mine), curve.seeds), resamples, seed)
    above, below = curve.beyond(mine)
    value = speedup(tuple(range(len(mine))), tuple(range(curve.seeds)))
    return Interval(value, low, high, above, below)


def bootstrap_gain(
    losses: ArrayLike,
    control: ArrayLike,
    budgets: ArrayLike,
    baseline: ArrayLike,
    *,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval | None:
    """The speed-up of some runs over a baseline, over that of other runs of the same budget.

    Args:
        losses: final losses of the runs, ``[S]``.
        control: final losses of the others, ``[C]``.
        budgets, baseline, resamples, seed: as for :func:`bootstrap_speedup`.

    Returns:
        None where both get further than the baseline's longest budget, or neither gets as far as
        its shortest: nothing is known then.

    Raises:
        ValueError: shapes do not fit, or budgets do not rise.
    """
    curve = _Curves(budgets, baseline)
    mine, others = _finals(losses), _finals(control)

    @cache
    def gain(own: tuple[int, ...], their: tuple[int, ...], curves: tuple[int, ...]) -> float:
        return curve.reached(mine[list(own)], curves) / curve.reached(others[list(their)], curves)

    above, below = curve.beyond(mine)
    others_above, others_below = curve.beyond(others)
    if (above or others_below) and (below or others_above):
        return None
    low, high = _interval(gain, (len(mine), len(others), curve.seeds), resamples, seed)
    value = gain(*(tuple(range(count)) for count in (len(mine), len(others), curve.seeds)))
    return Interval(value, low, high, above or others_below, below or others_above)


def bootstrap_median(
    values: Sequence[Interval | None], *, resamples: int = 2_000, seed: int = 0
) -> Interval | None:
    """The median of what is known, one value a task, with an interval over tasks; None for none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    numbers = np.array([value.value for value in known])
    low, high = _interval(
        lambda rows: float(np.median(numbers[list(rows)])), (len(known),), resamples, seed
    )
    middle = float(np.median(numbers))
    at_least = any(value.at_least and value.value <= middle for value in known)
    at_most = any(value.at_most and value.value >= middle for value in known)
    return Interval(middle, low, high, at_least, at_most)


class _Curves:
    """A baseline's losses against its budget, by seed."""

    def __init__(self, budgets: ArrayLike, baseline: ArrayLike) -> None:
        other = np.asarray(baseline, dtype=np.float64)
        if other.ndim != 2 or len(other) == 0:
            raise ValueError(f"the baseline {other.shape} must be [T, B] with T >= 1")
        self.budgets = budgets
        self.losses: Array = np.nan_to_num(other, nan=np.inf, posinf=np.inf)
        self.seeds = len(other)

    def reached(self, losses: Array, curves: tuple[int, ...]) -> float:
        """The median budget at which the mean of some seeds reaches losses."""
        mean = self.losses[list(curves)].mean(0)
        return float(np.median([budget_to_reach(loss, self.budgets, mean) for loss in losses]))

    def beyond(self, losses: Array) -> tuple[bool, bool]:
        """Whether the median is below what the longest budget reaches, above the shortest's."""
        _, mean = _curve(self.budgets, self.losses.mean(0))
        middle = float(np.median(losses))
        return bool(mean[-1] > middle), bool(mean[0] < middle)


def _finals(losses: ArrayLike) -> Array:
    mine = np.nan_to_num(np.asarray(losses, dtype=np.float64), nan=np.inf, posinf=np.inf)
    if mine.ndim != 1 or len(mine) == 0:
        raise ValueError(f"losses {mine.shape} must be [S] with S >= 1")
    return mine


def _interval(
    statistic: Callable[..., float], sizes: Sequence[int], resamples: int, seed: int
) -> tuple[float, float]:
    """The middle 95 % of a statistic of rows, where those of each kind are drawn again."""
    rng = np.random.default_rng(seed)
    draws = [np.sort(rng.integers(size, size=(resamples, size)), axis=1) for size in sizes]
    found = [statistic(*(tuple(part) for part in row)) for row in zip(*draws, strict=True)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def margin(losses: ArrayLike, baseline: ArrayLike) -> float:
    """How much lower mean losses are than a baseline's, in its standard deviations over seeds.

    NaN with fewer than two seeds of the baseline, or where both diverged; infinite where one did,
    or where the baseline's seeds agree to the bit.
    """
    mine, other = np.asarray(losses, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if len(other) < 2 or len(mine) < 1:
        return math.nan
    means = float(mine.mean()), float(other.mean())
    if means[0] == means[1]:
        return math.nan if math.isinf(means[0]) else 0.0
    gain = means[1] - means[0]
    if math.isinf(gain):
        return gain
    deviation = float(other.std(ddof=1))
    return gain / deviation if deviation > 0 else math.copysign(math.inf, gain)


def win(losses: ArrayLike, baseline: ArrayLike) -> float:
    """1 where the mean loss is lower than the baseline's, 0.5 where equal, else 0."""
    mine = float(np.mean(np.asarray(losses, dtype=np.float64)))
    other = float(np.mean(np.asarray(baseline, dtype=np.float64)))
    return 0.5 if mine == other else float(mine < other)


def steps_to_target(target: float, steps: ArrayLike, losses: ArrayLike) -> float:
    """The first of the steps at which a learning curve is at a target or below; inf where none.

    Args:
        target: a loss.
        steps: rising, ``[P]``.
        losses: at these, ``[P]``; NaN is above every target.
    """
    reached = np.flatnonzero(np.asarray(losses, dtype=np.float64) <= target)
    return float(np.asarray(steps, dtype=np.float64)[reached[0]]) if len(reached) else math.inf


def performance_profile(
    times: Mapping[str, Sequence[float]], taus: Sequence[float]
) -> dict[str, Array]:
    """Share of tasks on which each takes at most tau times as long as the best (Dolan, Moré 2002).

    Args:
        times: of each contender on each of the tasks, to a target; inf where it was not reached.
        taus: >= 1.

    Returns:
        For each contender, ``[len(taus)]``. Tasks on which nobody reached the target count as
        reached by none.

    Raises:
        ValueError: not all have the same tasks, or there are none.
    """
    return {
        name: np.array([(row <= tau).mean() for tau in taus])
        for name, row in zip(times, _ratios(times), strict=True)
    }


def performance_score(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """AlgoPerf's score (Dahl et al. 2023): the mean height of the profile for tau from 1 to 4.

    Args:
        times: as for :func:`performance_profile`.

    Returns:
        For each contender, 0 to 1; exact, since a profile is made of steps.
    """
    heights = (_LONGEST_TAU - _ratios(times).clip(1.0, _LONGEST_TAU)) / (_LONGEST_TAU - 1.0)
    return {name: float(row.mean()) for name, row in zip(times, heights, strict=True)}


def _ratios(times: Mapping[str, Sequence[float]]) -> Array:
    """Times over the best on each task, ``[contenders, tasks]``."""
    if len({len(values) for values in times.values()}) != 1 or 0 in map(len, times.values()):
        raise ValueError("every contender needs a time on each of the tasks, one at least")
    table = np.array(list(times.values()), dtype=np.float64)
    best = table.min(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(table == best, 1.0, table / best)
    ratios[:, np.isinf(best)] = np.inf
    return ratios
