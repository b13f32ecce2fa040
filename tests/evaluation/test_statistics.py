"""Statistics against hand-computed cases, and what must hold for all numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import SPEEDUP

from lhopt_fused.evaluation.statistics import (
    Interval,
    bootstrap_gain,
    bootstrap_median,
    bootstrap_speedup,
    budget_to_reach,
    margin,
    performance_profile,
    performance_score,
    steps_to_target,
    win,
)

BUDGETS = (0.5, 1.0, 2.0, 4.0)
LOSSES = (3.0, 2.0, 1.5, 1.25)

finite = st.floats(-1e3, 1e3)
curves = st.lists(finite, min_size=4, max_size=4)


@pytest.mark.parametrize(
    ("loss", "budget"),
    [
        (2.0, 1.0),
        (2.5, math.sqrt(0.5)),  # halfway from 0.5 to 1, in the logarithm
        (1.75, math.sqrt(2)),
        (1.3125, 2**1.75),
        (3.0, 0.5),
        (9.0, 0.5),  # reached before the first
        (1.0, 4.0),  # not reached
        (-math.inf, 4.0),
        (math.inf, 0.5),
        (math.nan, 4.0),
    ],
)
def test_the_budget_to_reach_a_loss(loss: float, budget: float) -> None:
    assert budget_to_reach(loss, BUDGETS, LOSSES) == pytest.approx(budget, rel=SPEEDUP.relative)


def test_more_budget_is_never_worse() -> None:
    """A bump in the curve is no reason to need more."""
    assert budget_to_reach(1.75, BUDGETS, (3.0, 2.0, 5.0, 1.5)) == pytest.approx(2 * math.sqrt(2))
    assert budget_to_reach(2.0, BUDGETS, (3.0, 2.0, 5.0, 1.5)) == 1.0


def test_a_baseline_that_diverges_reaches_nothing() -> None:
    assert budget_to_reach(2.0, BUDGETS, [math.inf] * 4) == 4.0
    assert budget_to_reach(2.0, BUDGETS, [math.nan, math.inf, 1.0, 1.0]) == 2.0


@pytest.mark.parametrize(
    ("budgets", "losses", "problem"),
    [
        ((1.0, 1.0), (1.0, 1.0), "positive and rise"),
        ((2.0, 1.0), (1.0, 1.0), "positive and rise"),
        ((0.0, 1.0), (1.0, 1.0), "positive and rise"),
        ((1.0, 2.0), (1.0,), "must both be"),
        ((), (), "must both be"),
    ],
)
def test_curves_that_are_none(
    budgets: tuple[float, ...], losses: tuple[float, ...], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        budget_to_reach(1.0, budgets, losses)


@given(curves, finite, finite)
def test_lower_losses_take_longer(losses: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    slow, fast = (budget_to_reach(loss, BUDGETS, losses) for loss in (low, high))
    assert 0.5 <= fast <= slow <= 4.0


@given(curves, finite, st.floats(0.1, 10.0), finite)
def test_units_of_the_loss_do_not_matter(
    losses: list[float], loss: float, scale: float, shift: float
) -> None:
    drops = np.diff(np.minimum.accumulate(losses))
    if (np.abs(drops[drops != 0]) < 1e-6).any() or np.abs(np.subtract(losses, loss)).min() < 1e-6:
        return  # rounding decides then
    here = budget_to_reach(loss, BUDGETS, losses)
    there = budget_to_reach(scale * loss + shift, BUDGETS, [scale * x + shift for x in losses])
    assert there == pytest.approx(here, rel=SPEEDUP.absolute)


@given(st.integers(0, 2), st.floats(0.01, 0.99))
def test_what_is_on_the_curve_is_found(piece: int, share: float) -> None:
    loss = LOSSES[piece] + share * (LOSSES[piece + 1] - LOSSES[piece])
    expected = BUDGETS[piece] * 2**share
    assert budget_to_reach(loss, BUDGETS, LOSSES) == pytest.approx(expected, rel=SPEEDUP.relative)


def test_a_speedup_is_a_median_over_seeds() -> None:
    """Mean curve (3, 2, 1.5, 1.25); the seeds of the runs reach 1, 2 and 4 of it."""
    baseline = np.add([LOSSES, LOSSES], [[0.1], [-0.1]])
    found = bootstrap_speedup([2.0, 1.5, 1.25], BUDGETS, baseline)
    assert found.value == pytest.approx(2.0)
    assert not found.at_least
    assert not found.at_most
    assert 0.5 <= found.low < 1.5
    assert 3.0 < found.high <= 4.0


def test_a_speedup_is_by_the_budget_of_the_runs() -> None:
    found = bootstrap_speedup([2.0], BUDGETS, [LOSSES], budget=0.5)
    assert found == Interval(2.0, 2.0, 2.0)


def test_speedups_beyond_what_was_tried() -> None:
    assert bootstrap_speedup([1.0], BUDGETS, [LOSSES]) == Interval(4, 4, 4, at_least=True)
    assert bootstrap_speedup([9.0], BUDGETS, [LOSSES]) == Interval(0.5, 0.5, 0.5, at_most=True)
    assert bootstrap_speedup([math.inf], BUDGETS, [LOSSES]).value == 0.5
    assert str(bootstrap_speedup([1.0], BUDGETS, [LOSSES])) == "≥ 4.00 [4.00, 4.00]"


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Percentile intervals of ten seeds are a little narrow."""
    rng = np.random.default_rng(0)
    held = 0
    for experiment in range(20):
        mine = 2.0 + 0.2 * rng.standard_normal(10)
        baseline = np.array(LOSSES) + 0.2 * rng.standard_normal((10, 4))
        found = bootstrap_speedup(mine, BUDGETS, baseline, seed=experiment, resamples=200)
        held += found.low <= 1.0 <= found.high
    assert held >= 16


@settings(max_examples=20, deadline=None)
@given(st.lists(finite, min_size=1, max_size=3), st.lists(curves, min_size=1, max_size=3))
def test_an_interval_is_around_its_value(losses: list[float], baseline: list[list[float]]) -> None:
    found = bootstrap_speedup(losses, BUDGETS, baseline)
    assert 0.5 <= found.low <= found.high <= 4.0
    assert 0.5 <= found.value <= 4.0
    assert found == bootstrap_speedup(losses, BUDGETS, baseline)


def test_speedups_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        bootstrap_speedup([], BUDGETS, [LOSSES])
    with pytest.raises(ValueError, match="must be"):
        bootstrap_speedup([1.0], BUDGETS, LOSSES)


@pytest.mark.parametrize(
    ("losses", "baseline", "expected"),
    [
        ([1.0, 2.0], [3.0, 5.0], 2.5 / math.sqrt(2)),
        ([4.0], [3.0, 5.0], 0.0),
        ([5.0], [3.0, 5.0], -1 / math.sqrt(2)),
        ([1.0], [2.0, 2.0], math.inf),
        ([3.0], [2.0, 2.0], -math.inf),
        ([2.0], [2.0, 2.0], 0.0),
        ([math.inf], [2.0, 3.0], -math.inf),
        ([1.0], [2.0, math.inf], math.inf),
        ([math.inf], [2.0, math.inf], math.nan),
        ([1.0], [2.0], math.nan),
    ],
)
def test_margins(losses: list[float], baseline: list[float], expected: float) -> None:
    assert margin(losses, baseline) == pytest.approx(expected, nan_ok=True)


def test_wins() -> None:
    assert win([1.0, 2.0], [1.6]) == 1.0
    assert win([1.0, 2.0], [1.5]) == 0.5
    assert win([1.0, math.inf], [9.0]) == 0.0


@pytest.mark.parametrize(
    ("mine", "control", "gain", "at_least", "at_most"),
    [
        (1.5, 2.0, 2.0, False, False),
        (2.0, 1.5, 0.5, False, False),
        (1.0, 2.0, 4.0, True, False),  # beyond the longest budget
        (2.0, 1.0, 0.25, False, True),
        (9.0, 2.0, 0.5, False, True),  # before the shortest
        (2.0, 9.0, 2.0, True, False),
        (1.0, 9.0, 8.0, True, False),
    ],
)
def test_a_gain_is_one_speedup_over_another(
    mine: float, control: float, gain: float, at_least: bool, at_most: bool
) -> None:
    found = bootstrap_gain([mine] * 3, [control] * 2, BUDGETS, [LOSSES])
    assert found is not None
    assert found.value == found.low == found.high == pytest.approx(gain)
    assert (found.at_least, found.at_most) == (at_least, at_most)


@pytest.mark.parametrize("losses", [1.0, 9.0])
def test_a_gain_beyond_what_was_tried_is_unknown(losses: float) -> None:
    assert bootstrap_gain([losses], [losses], BUDGETS, [LOSSES]) is None


def test_a_gain_is_as_uncertain_as_both() -> None:
    """Its interval is wider than that of the speed-up, which the control's seeds add to."""
    losses, control = [1.4, 1.5, 1.6], [1.9, 2.0, 2.2]
    alone = bootstrap_speedup(losses, BUDGETS, [LOSSES])
    gain = bootstrap_gain(losses, control, BUDGETS, [LOSSES])
    fixed = bootstrap_gain(losses, [2.0], BUDGETS, [LOSSES])
    assert gain is not None
    assert fixed is not None
    assert (fixed.low, fixed.high) == (alone.low, alone.high)
    assert gain.low < fixed.low <= fixed.high < gain.high


def test_a_median_over_tasks() -> None:
    known = [Interval(value, 0.0, 9.0) for value in (1.0, 3.0, 2.0)]
    found = bootstrap_median([*known, None])
    assert found is not None
    assert (found.value, found.low, found.high) == (2.0, 1.0, 3.0)
    assert str(found) == "2.00 [1.00, 3.00]"
    assert bootstrap_median([None]) is None


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 2.0, 4.0], "2.00"),  # whatever the last is, it is above
        ([4.0, 4.0, 2.0], "≥ 4.00"),
        ([0.5, 2.0, 2.0], "2.00"),
        ([0.5, 0.5, 2.0], "≤ 0.50"),
    ],
)
def test_a_median_that_is_beyond_what_was_tried_says_so(values: list[float], text: str) -> None:
    found = bootstrap_median([Interval(v, v, v, v == 4.0, v == 0.5) for v in values])
    assert str(found).startswith(text)


def test_steps_to_a_target() -> None:
    steps, losses = [0, 10, 20, 30], [3.0, math.nan, 1.0, 2.0]
    assert steps_to_target(1.0, steps, losses) == 20
    assert steps_to_target(3.0, steps, losses) == 0
    assert steps_to_target(0.5, steps, losses) == math.inf


TIMES = {"fast": [1.0, 2.0, math.inf], "slow": [2.0, 2.0, 5.0], "lost": [math.inf] * 3}


def test_a_performance_profile() -> None:
    found = performance_profile(TIMES, [1.0, 1.5, 2.0, 4.0])
    assert found["fast"].tolist() == [2 / 3] * 4
    assert found["slow"].tolist() == [2 / 3, 2 / 3, 1.0, 1.0]
    assert found["lost"].tolist() == [0.0] * 4


def test_the_score_is_the_mean_height_of_the_profile() -> None:
    """slow: a profile of 2/3 from 1 to 2 and of 1 from 2 to 4, so (2/3 + 2) / 3."""
    scores = performance_score(TIMES)
    assert scores == pytest.approx({"fast": 2 / 3, "slow": 8 / 9, "lost": 0.0})
    taus = np.linspace(1, 4, 30_001)
    heights = performance_profile(TIMES, taus.tolist())
    for name, score in scores.items():
        assert heights[name].mean() == pytest.approx(score, abs=1e-3)


def test_a_target_that_nobody_reaches_counts_for_nobody() -> None:
    assert performance_score({"a": [math.inf, 1.0], "b": [math.inf, 2.0]})["a"] == 0.5


times = st.lists(st.floats(1e-3, 1e3) | st.just(math.inf), min_size=3, max_size=3)


@given(times, times, st.floats(0.01, 100.0))
def test_profiles_rise_and_do_not_depend_on_the_unit(
    one: list[float], other: list[float], unit: float
) -> None:
    taus = [1.0, 1.3, 2.0, 10.0]
    found = performance_profile({"one": one, "other": other}, taus)
    for heights in found.values():
        assert (np.diff(heights) >= 0).all()
    score = performance_score({"one": one, "other": other})
    scaled = performance_score({"one": [unit * t for t in one], "other": [unit * t for t in other]})
    assert score == pytest.approx(scaled, abs=SPEEDUP.absolute)
    assert all(0 <= value <= 1 for value in score.values())


def test_profiles_need_every_task() -> None:
    for table in ({"a": [1.0], "b": []}, {"a": [1.0], "b": [1.0, 2.0]}, {}):
        with pytest.raises(ValueError, match="a time on each of the tasks"):
            performance_score(table)
