"""Baselines against torch.optim.AdamW, trained on one task after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from tolerances import BASELINE, assert_close

from lhopt_fused.meta.baselines import (
    DEFAULT_OF_GRID,
    GRID,
    SCHEDULES,
    Schedule,
    adamw_grid,
    curves,
    final_losses,
)
from lhopt_fused.meta.inner import adamw_settings
from lhopt_fused.meta.reward import sample_points
from lhopt_fused.meta.tasks import FAMILIES, TaskBatch
from lhopt_fused.types import SCALARS

STEPS = 20


@pytest.fixture(scope="module")
def tasks() -> TaskBatch:
    return FAMILIES["clusters"]().sample(4, 3)


def torch_losses(
    tasks: TaskBatch, points: Sequence[int], lr: float = 1e-3, schedule: Schedule | None = None
) -> torch.Tensor:
    """Report losses of torch's AdamW at some steps, ``[R, P]``; a schedule is over the last."""
    rows = []
    for run in range(tasks.runs):
        task = tasks.select(torch.tensor([run]))
        params = {name: value.requires_grad_() for name, value in task.init().items()}
        optimizer = torch.optim.AdamW(params.values(), lr=lr)
        row, done = [], 0
        for point in points:
            for step in range(done, point):
                if schedule is not None:
                    optimizer.param_groups[0]["lr"] = lr * schedule(step / points[-1])
                optimizer.zero_grad()
                task.train_loss(params, step).sum().backward()
                optimizer.step()
            done = point
            with torch.no_grad():
                row.append(task.eval_loss(params, "report")[0])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_the_default_is_that_of_torch(tasks):
    found = curves(tasks, STEPS, "adamw")
    points = [0, *sample_points(STEPS)]
    assert found.steps.tolist() == points
    assert found.losses.shape == (3, len(points))
    expected = torch_losses(tasks, points)
    scale = expected[:, :1]
    assert_close(found.losses, expected, BASELINE, scale)
    with pytest.raises(AssertionError):
        assert_close(found.losses, torch_losses(tasks, points, lr=1.01e-3), BASELINE, scale)


@pytest.mark.parametrize("name", SCHEDULES)
def test_scheduled_runs_are_those_of_torch(tasks, name):
    schedule = SCHEDULES[name]
    rates = (3e-3, 1e-2)
    settings = [adamw_settings(lr=rate) for rate in rates]
    found = final_losses(tasks, settings, [schedule] * 2, STEPS)
    expected = torch.stack([torch_losses(tasks, [STEPS], rate, schedule)[:, 0] for rate in rates])
    scale = tasks.eval_loss(tasks.init(), "report")
    assert_close(found, expected, BASELINE, scale)
    with pytest.raises(AssertionError):
        assert_close(found, expected.flip(0), BASELINE, scale)


def test_the_tuned_one_is_the_best_rate_at_each_budget(tasks):
    found = curves(tasks, 30, "tuned")
    assert found.steps.tolist() == [0, 10, 20, 40]
    assert torch.equal(found.losses[:, 0], tasks.eval_loss(tasks.init(), "report").double())
    linear = SCHEDULES["linear"]
    for column, budget in enumerate((10, 20, 40), start=1):
        each = [torch_losses(tasks, [budget], rate, linear)[:, 0] for rate in (1e-3, 4e-3, 1.6e-2)]
        best = torch.stack(each).amin(0)
        assert_close(found.losses[:, column], best, BASELINE, found.losses[:, 0])


def test_the_tuned_one_of_the_shortest_run_is_a_curve(tasks):
    found = curves(tasks, 1, "tuned")
    assert found.steps.tolist() == [0, 1]
    assert found.losses.isfinite().all()


def test_a_baseline_that_there_is_not_is_named(tasks):
    with pytest.raises(ValueError, match="'sgd', expected one of adamw, tuned"):
        curves(tasks, STEPS, "sgd")


def test_schedules_are_what_their_names_say():
    progress = torch.linspace(0, 1, 9).tolist()
    values = {name: [schedule(x) for x in progress] for name, schedule in SCHEDULES.items()}
    assert values["constant"] == [1.0] * 9
    assert values["multi_step"] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])
    assert values["linear"] == pytest.approx([1 - x for x in progress])
    assert values["quadratic"] == pytest.approx([(1 - x) ** 2 for x in progress])
    assert values["exponential"] == pytest.approx([math.exp(-x * math.log(100)) for x in progress])
    cosine = [math.cos(x * math.pi / 2) ** 2 for x in progress]
    assert values["cosine"] == pytest.approx(cosine)
    assert values["cosine_to_tenth"] == pytest.approx([0.1 + 0.9 * x for x in cosine])


def test_the_grid_is_five_rates_under_seven_schedules():
    settings, schedules = adamw_grid()
    lr = SCALARS.index("lr")
    pairs = {
        (scalars[lr], schedule) for (_, scalars), schedule in zip(settings, schedules, strict=True)
    }
    assert pairs == {(rate, schedule) for rate in GRID for schedule in SCHEDULES.values()}
    assert len(settings) == 35
    assert settings[DEFAULT_OF_GRID][1][lr] == 1e-3
    assert schedules[DEFAULT_OF_GRID] is SCHEDULES["constant"]
