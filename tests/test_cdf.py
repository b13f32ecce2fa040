"""CDF features: what their definition promises, and that a slightly different one breaks it."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lhopt_fused.cdf import END_WEIGHTS, CdfState, update_cdf


def series(seed: int, length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, generator=generator, dtype=torch.float64)


def run(values: torch.Tensor) -> torch.Tensor:
    """Features of each value in turn: ``[T, S]`` or ``[T]`` to ``[T, S, W]``."""
    values = values if values.dim() == 2 else values[:, None]
    state = CdfState.initial((), values.shape[1])
    rows = []
    for value in values:
        row, state = update_cdf(state, value)
        rows.append(row)
    return torch.stack(rows)


def test_against_explicit_weights() -> None:
    """The recurrence is a weighted mean and variance over the whole series."""
    values = series(0).tolist()
    features = run(series(0))[:, 0]
    for column, w in enumerate(END_WEIGHTS):
        weights: list[float] = []
        for t, x in enumerate(values, start=1):
            rate = w / (t + w - 1)
            weights = [(1 - rate) * weight for weight in weights] + [rate]
            seen = values[:t]
            mean = sum(a * b for a, b in zip(weights, seen, strict=True))
            var = sum(a * (b - mean) ** 2 for a, b in zip(weights, seen, strict=True))
            expected = NormalDist().cdf((x - mean) / var**0.5) if t > 1 else 0.5
            assert features[t - 1, column].item() == pytest.approx(expected, abs=1e-12)


def test_the_value_before_the_update_would_be_seen() -> None:
    """The twin: standing before the update differs from standing after it."""
    values = series(1)
    state = CdfState.initial((), 1)
    for value in values[:-1]:
        _, state = update_cdf(state, value[None])
    stale = torch.special.ndtr((values[-1] - state.mean) / state.var.sqrt())
    assert not torch.allclose(run(values)[-1], stale, atol=1e-3)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
)
def test_affine_maps_change_nothing(seed: int, scale: float, shift: float) -> None:
    values = series(seed)
    assert torch.allclose(run(values), run(scale * values + shift), rtol=0, atol=1e-6)


def test_a_negative_scale_mirrors() -> None:
    values = series(2)
    assert torch.allclose(run(-values), 1 - run(values), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), low=st.floats(-5, 5), step=st.floats(1e-2, 5))
def test_monotone_in_the_newest_value(seed: int, low: float, step: float) -> None:
    before = series(seed)
    lower, higher = (run(torch.cat([before, torch.tensor([x])]))[-1] for x in (low, low + step))
    assert bool((higher > lower).all())


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(-1e90, 1e90), min_size=1, max_size=60))
def test_strictly_between_0_and_1(values: list[float]) -> None:
    features = run(torch.tensor(values, dtype=torch.float64))
    assert bool(((features > 0) & (features < 1)).all())


def test_constants_have_no_standing() -> None:
    assert run(torch.full((5,), 0.1)).unique().tolist() == [0.5]


@pytest.mark.parametrize("hole", [torch.nan, torch.inf, -torch.inf, 1e200])
def test_what_is_not_finite_leaves_no_trace(hole: float) -> None:
    values = series(3)
    holed = torch.cat([values[:10], torch.tensor([hole]), values[10:]])
    features = run(holed)
    assert features[10].unique().tolist() == [0.5]
    assert torch.equal(torch.cat([features[:10], features[11:]]), run(values))


def test_series_and_batches_do_not_touch_one_another() -> None:
    values = torch.stack([series(seed) for seed in range(6)], dim=-1)
    values[4, 2] = torch.nan
    state = CdfState.initial((3,), 2)
    rows = []
    for value in values:
        row, state = update_cdf(state, value.reshape(3, 2))
        rows.append(row.reshape(6, -1))
    alone = torch.stack([run(values[:, s])[:, 0] for s in range(6)], dim=1)
    assert torch.equal(torch.stack(rows), alone)
