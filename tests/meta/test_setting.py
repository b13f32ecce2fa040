"""What episodes are drawn from: lengths, boundaries, starts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lhopt_fused import LHOPT
from lhopt_fused.actions import DEFAULT_ACTION_SPACE
from lhopt_fused.meta.setting import Setting, StartNoise, TaskDistribution, outer_boundaries
from lhopt_fused.types import HYPERPARAMETERS

ACTIONS = DEFAULT_ACTION_SPACE.actions


def deployed_boundaries(total_steps: int, outer_steps: int) -> list[int]:
    """Inner steps done at the end of each outer step of a real LHOPT."""
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    ends = []
    optimizer = LHOPT(
        [parameter],
        total_steps=total_steps,
        outer_steps=outer_steps,
        policy="cosine",
        callback=lambda step: ends.append(step.inner_step),
    )
    for _ in range(total_steps):
        optimizer.observe(1.0)
        optimizer.step()
    return ends


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 16, 23])
def test_outer_steps_end_where_those_of_lhopt_do(total_steps):
    for outer_steps in range(1, total_steps + 1):
        ends = outer_boundaries(total_steps, outer_steps)
        assert ends == deployed_boundaries(total_steps, outer_steps)
        rounded_down = [i * total_steps // outer_steps for i in range(1, outer_steps + 1)]
        assert (ends == rounded_down) == (total_steps % outer_steps == 0)


def test_runs_of_a_task_stand_side_by_side():
    setting = Setting("xor", 0, tasks=2, repeats=3, total_steps=8, outer_steps=2)
    assert setting.runs == 6
    assert setting.task_of_run.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_seed_is_a_setting():
    distribution = TaskDistribution()
    assert distribution.draw(3) == distribution.draw(3)
    assert len({distribution.draw(seed).seed for seed in range(100)}) == 100


def test_draws_keep_to_the_limits_and_reach_them():
    distribution = TaskDistribution(outer_steps=(2, 9), inner_steps=(3, 5), longest=40)
    drawn = [distribution.draw(seed) for seed in range(400)]
    assert {setting.outer_steps for setting in drawn} == set(range(2, 10))
    assert {setting.total_steps // setting.outer_steps for setting in drawn} == {3, 4, 5}
    assert all(setting.total_steps % setting.outer_steps == 0 for setting in drawn)
    assert max(setting.total_steps for setting in drawn) <= 40


def test_horizons_are_log_uniform():
    """As many between 2 and 15 as between 16 and 127, within five standard deviations."""
    distribution = TaskDistribution(outer_steps=(2, 127), inner_steps=(1, 1))
    drawn = [distribution.draw(seed).outer_steps for seed in range(2000)]
    assert 888 < sum(outer_steps <= 15 for outer_steps in drawn) < 1112


def test_families_come_by_weight():
    distribution = TaskDistribution(families={"xor": 3.0, "quadratic": 1.0, "addition": 0.0})
    drawn = [distribution.draw(seed).family for seed in range(1000)]
    assert set(drawn) == {"xor", "quadratic"}
    assert 680 < drawn.count("xor") < 820  # 750, five standard deviations


def test_starts_are_drawn_within_their_widths():
    noise = StartNoise(lr=100.0, scale=10.0, average=2.0, logit=1.0, clean=0.0)
    shifts = noise.draw(np.random.default_rng(0), 2000, ACTIONS)
    assert shifts.shape == (2000, 8)
    assert shifts.dtype == torch.float64
    wide = {"lr": math.log(100), "epsilon": math.log(10), "weight_decay": math.log(10)}
    wide["group_clip_grad_norm"] = 1.0
    for index, name in enumerate(HYPERPARAMETERS):
        width = wide.get(name, math.log(2))
        assert 0.97 * width < shifts[:, index].abs().max() <= width
        assert shifts[:, index].mean().abs() < 0.1 * width


def test_some_runs_start_clean():
    shifts = StartNoise(clean=0.25).draw(np.random.default_rng(0), 2000, ACTIONS)
    clean = (shifts == 0).all(dim=1)
    assert 400 < clean.sum() < 600
    assert (shifts[~clean] != 0).all()


@pytest.mark.parametrize(
    ("noise", "field"),
    [({"lr": 0.5}, "lr"), ({"scale": math.inf}, "scale"), ({"logit": -1.0}, "logit")],
)
def test_noise_out_of_range_is_named(noise, field):
    with pytest.raises(ValueError, match=rf"noise\.{field} is"):
        StartNoise(**noise)
