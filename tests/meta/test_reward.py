"""The reward: exact curves are recovered, and every odd loss has a defined, ordered reward."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import POWER_CURVE, REWARD, REWARD_AFFINE, REWARD_SPIKE, assert_close

from lhopt_fused.meta import reward
from lhopt_fused.meta.reward import (
    LARGEST_REWARD,
    PowerCurve,
    fit_power_curve,
    sample_points,
    speedup_reward,
    wins,
)

STEPS = 300
POINTS = torch.tensor(sample_points(STEPS))
NAN, INF = math.nan, math.inf

numbers = st.floats(-10, 10)
amplitudes = st.floats(0.01, 10)
exponents = st.floats(0.03, 4)


def curve(asymptote: float, amplitude: float, exponent: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial loss ``[1]`` and losses ``[1, K]`` of an exact power curve."""
    t = torch.cat([torch.zeros(1), POINTS]).double() + 1
    losses = asymptote + amplitude * t**-exponent
    return losses[:1], losses[None, 1:]


def fitted(losses: list[float], initial: float = 1.0) -> PowerCurve:
    """Of one baseline, whose points are the given losses and as many steps of the first."""
    steps = POINTS[: len(losses)]
    return fit_power_curve(torch.tensor([initial]), steps, torch.tensor([losses]))


def reward_of(fit: PowerCurve, final: float, total_steps: int = STEPS) -> float:
    return speedup_reward(fit, torch.tensor([final], dtype=torch.float64), total_steps).item()


@settings(deadline=None)
@given(numbers, amplitudes, exponents)
def test_exact_curves_are_recovered(a: float, b: float, c: float) -> None:
    fit = fit_power_curve(curve(a, b, c)[0], POINTS, curve(a, b, c)[1])
    for found, expected in ((fit.asymptote, a), (fit.amplitude, b)):
        assert found.item() == pytest.approx(expected, abs=POWER_CURVE.relative * (abs(a) + b))
    assert fit.exponent.item() == pytest.approx(c, abs=POWER_CURVE.relative * (1 + abs(a) / b))
    assert_close(fit.losses(POINTS), curve(a, b, c)[1], POWER_CURVE, abs(a) + b)


@pytest.mark.parametrize("step", [1, 30, 150, 300, 600, 2000])
def test_the_reward_is_the_log_of_the_steps_saved(step: int) -> None:
    fit = fit_power_curve(curve(0.3, 2.0, 0.5)[0], POINTS, curve(0.3, 2.0, 0.5)[1])
    final = 0.3 + 2.0 * (step + 1) ** -0.5
    expected = max(-3.0, min(3.0, math.log((step + 1) / (STEPS + 1))))
    assert reward_of(fit, final) == pytest.approx(expected, abs=REWARD.absolute)


@settings(deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=14, max_size=14),
    st.floats(-1.5, 1.5),
    st.floats(0.01, 100),
    numbers,
)
def test_positive_affine_maps_change_nothing(
    wobble: list[float], final: float, factor: float, offset: float
) -> None:
    """The losses fall and wobble; the final losses lie inside, above and below."""
    initial, losses = curve(0.0, 1.0, 0.4)
    losses = losses + 0.2 * torch.tensor([wobble])
    finals = torch.tensor([final], dtype=torch.float64)
    before = speedup_reward(fit_power_curve(initial, POINTS, losses), finals, STEPS)
    mapped = fit_power_curve(factor * initial + offset, POINTS, factor * losses + offset)
    after = speedup_reward(mapped, factor * finals + offset, STEPS)
    assert_close(after, before, REWARD_AFFINE, 1.0)


def test_multiplying_the_steps_does_change_something() -> None:
    """The twin: rewards are not constant."""
    initial, losses = curve(0.0, 1.0, 0.4)
    fit = fit_power_curve(initial, POINTS, losses)
    assert abs(reward_of(fit, 0.1) - reward_of(fit, 0.1, 2 * STEPS)) > 0.5


baseline_losses = st.one_of(st.floats(-5, 5), st.sampled_from([NAN, INF, -INF, 0.0, 1e300, -1e300]))


@settings(deadline=None)
@given(
    baseline_losses,
    st.lists(baseline_losses, min_size=1, max_size=14),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=6),
)
def test_a_lower_final_loss_is_never_worse(
    initial: float, losses: list[float], finals: list[float]
) -> None:
    fit = fitted(losses, initial)
    rewards = [reward_of(fit, final) for final in sorted(finals)]
    assert rewards == sorted(rewards, reverse=True)
    assert all(abs(each) <= LARGEST_REWARD for each in rewards)


@pytest.mark.parametrize("final", [NAN, INF, -INF])
@pytest.mark.parametrize("losses", [[0.5, 0.2], [NAN, NAN]])
def test_a_diverged_episode_gets_the_least(final: float, losses: list[float]) -> None:
    assert reward_of(fitted(losses), final) == -LARGEST_REWARD


def test_better_than_the_asymptote_gets_the_most() -> None:
    initial, losses = curve(0.3, 2.0, 0.5)
    fit = fit_power_curve(initial, POINTS, losses)
    assert reward_of(fit, 0.29) == LARGEST_REWARD
    assert reward_of(fit, -1e30) == LARGEST_REWARD


def test_without_any_baseline_nothing_can_be_said() -> None:
    fit = fitted([NAN, INF, NAN], NAN)
    assert bool(fit.start.isnan())
    assert reward_of(fit, 0.1) == 0.0


@pytest.mark.parametrize(
    "losses",
    [[NAN] * 14, [1.0] * 14, [1.0 + step for step in range(14)], [INF] * 14],
    ids=["diverged", "constant", "rising", "infinite"],
)
def test_a_baseline_that_never_falls_is_flat_at_its_start(losses: list[float]) -> None:
    fit = fitted(losses)
    assert fit.slope.item() == 0
    rewards = [reward_of(fit, final) for final in (0.9, 1.0, 1.1)]
    assert rewards == [LARGEST_REWARD, 0.0, -LARGEST_REWARD]


def test_zero_and_negative_losses_are_ordinary() -> None:
    initial, losses = curve(-3.0, 3.0, 0.7)
    fit = fit_power_curve(initial, POINTS, losses)
    assert initial.item() == 0.0
    assert reward_of(fit, losses[0, -1].item()) == pytest.approx(
        math.log(601 / 301), abs=REWARD.absolute
    )


def spiked_error(spike: float, place: int) -> float:
    """How far a reward moves when one point of the baseline is something else."""
    initial, losses = curve(0.3, 2.0, 0.3)
    final = losses[0, 11].item()
    plain = reward_of(fit_power_curve(initial, POINTS, losses), final)
    losses[0, place] = spike
    return abs(reward_of(fit_power_curve(initial, POINTS, losses), final) - plain)


@pytest.mark.parametrize("spike", [1e6, 5.0, NAN, INF])
@pytest.mark.parametrize("place", [3, 9, 13])
def test_one_spike_moves_the_reward_little(spike: float, place: int) -> None:
    assert spiked_error(spike, place) <= REWARD_SPIKE.absolute


@pytest.mark.parametrize("place", [3, 9, 13])
def test_least_squares_alone_would_move_it_much(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward, "_ROBUST_ROUNDS", 0)
    assert spiked_error(1e6, place) > REWARD_SPIKE.absolute


def test_batches_do_not_mix_and_steps_may_differ() -> None:
    curves = [(0.3, 2.0, 0.5), (-1.0, 0.1, 1.5), (5.0, 9.0, 0.1)]
    initial = torch.cat([curve(*each)[0] for each in curves])
    losses = torch.cat([curve(*each)[1] for each in curves])
    together = fit_power_curve(initial, POINTS.expand(3, -1), losses)
    for index in range(3):
        alone = fit_power_curve(initial[index, None], POINTS, losses[index, None])
        assert torch.equal(together.start[index, None], alone.start)
        assert torch.equal(together.exponent[index, None], alone.exponent)


def test_no_gradient_flows() -> None:
    initial, losses = curve(0.3, 2.0, 0.5)
    final = torch.tensor([0.5], requires_grad=True)
    assert not speedup_reward(
        fit_power_curve(initial, POINTS, losses.requires_grad_()), final, STEPS
    ).requires_grad


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected \[R\], \[K\] or \[R, K\]"):
        fit_power_curve(torch.zeros(2), POINTS, torch.zeros(3, 14))
    with pytest.raises(ValueError, match=r"expected \[R\], \[K\] or \[R, K\]"):
        fit_power_curve(torch.zeros(3), POINTS[1:], torch.zeros(3, 14))


@given(st.integers(1, 10**7))
def test_sample_points_are_distinct_and_end_at_twice_the_steps(total_steps: int) -> None:
    points = sample_points(total_steps)
    assert points == sorted(set(points))
    assert (points[0], points[-1]) == (1, 2 * total_steps)
    assert len(points) == min(14, 2 * total_steps)


def test_sample_points_are_evenly_spaced_in_the_logarithm() -> None:
    points = sample_points(10**6)
    logs = [math.log(later / earlier) for earlier, later in itertools.pairwise(points)]
    assert max(logs[4:]) == pytest.approx(min(logs[4:]), rel=0.01)


def test_no_steps_have_no_points() -> None:
    with pytest.raises(ValueError, match="total_steps is 0, expected at least 1"):
        sample_points(0)


def test_the_lower_loss_wins() -> None:
    mine = torch.tensor([1.0, 2.0, 1.0, math.nan, 1.0, math.inf, math.nan, -1.0])
    others = torch.tensor([2.0, 1.0, 1.0, 1.0, math.nan, 1.0, math.inf, -0.5])
    assert wins(mine, others).tolist() == [1.0, 0.0, 0.5, 0.0, 1.0, 0.0, 0.5, 1.0]
