"""What the losses of runs say: speed-ups with intervals, margins, wins, performance profiles.

Pure functions of numbers. Lower losses are better; runs that diverged have infinite ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Interval",
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
    mine = np.nan_to_num(np.asarray(losses, dtype=np.float64), nan=np.inf, posinf=np.inf)
    other = np.nan_to_num(np.asarray(baseline, dtype=np.float64), nan=np.inf, posinf=np.inf)
    if mine.ndim != 1 or other.ndim != 2 or 0 in (len(mine), len(other)):
        raise ValueError(f"losses {mine.shape} must be [S] and the baseline {other.shape} [T, B]")

    @cache  # a few seeds are drawn in the same numbers again and again
    def speedup(own: tuple[int, ...], curves: tuple[int, ...]) -> float:
        mean = other[list(curves)].mean(0)
        return float(np.median([budget_to_reach(mine[i], budgets, mean) for i in own])) / budget

    value = speedup(tuple(range(len(mine))), tuple(range(len(other))))
    rng = np.random.default_rng(seed)
    draws = [
        np.sort(rng.integers(len(rows), size=(resamples, len(rows))), axis=1).tolist()
        for rows in (mine, other)
    ]
    found = [speedup(tuple(own), tuple(curves)) for own, curves in zip(*draws, strict=True)]
    low, high = np.quantile(found, [0.025, 0.975])
    _, mean = _curve(budgets, other.mean(0))
    middle = float(np.median(mine))
    censored = {"at_least": bool(mean[-1] > middle), "at_most": bool(mean[0] < middle)}
    return Interval(value, float(low), float(high), **censored)


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
