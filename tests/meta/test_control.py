"""Runs under teachers: a schedule as a learning rate to steer to."""

from __future__ import annotations

import math

import pytest
import torch
from meta.runs import small
from tolerances import TEACHER

from lhopt_fused.meta.config import START_HYPERPARAMETERS
from lhopt_fused.meta.control import HandControl, control_grid, demonstrate
from lhopt_fused.meta.episode import EpisodeBatch
from lhopt_fused.meta.setting import Setting

GRID = control_grid()
CONFIG = small("policy.lr_choices=[0.1, 10.0]")
SETTING = Setting("quadratic", 5, tasks=2, repeats=1, total_steps=8, outer_steps=4)


def batch() -> EpisodeBatch:
    settings = CONFIG.policy.settings(START_HYPERPARAMETERS)
    return EpisodeBatch(SETTING, settings, CONFIG.policy.action_space)


def certain(*controls: HandControl) -> torch.Tensor:
    """Teachers that each know one schedule."""
    return torch.eye(len(GRID), dtype=torch.float64)[[GRID.index(c) for c in controls]]


def test_some_schedules_are_still_after_a_part_of_the_run():
    for name, share in (("quarter", 1 / 4), ("sixteenth", 1 / 16)):
        control = HandControl(0.1, name)
        assert control.learning_rate(share / 2) == pytest.approx(0.05)
        assert control.learning_rate(share) == control.learning_rate(1.0) == pytest.approx(1e-4)


def test_a_teacher_steers_to_its_schedule_in_the_middle_of_the_coming_outer_step():
    runs = batch()
    _, targets = demonstrate(
        runs, certain(HandControl(3e-3, "linear"), HandControl(1e-2, "constant")), wander=0.0
    )
    start = math.log(START_HYPERPARAMETERS["lr"])
    peaks = [math.log(3e-3), math.log(1e-2)]
    assert targets[0, 0, 0] == pytest.approx(
        peaks[0] + math.log(1 - 3 / 8) - start, rel=TEACHER.relative
    )
    assert targets[1, 0, 0] == pytest.approx(peaks[1] - start, rel=TEACHER.relative)
    assert (targets[1, 1:, 0].abs() < 1e-6).all()
    assert (targets[..., 1:] == 0).all()
    rates = runs.inner.hyperparameters[:, 0]
    assert rates.tolist() == pytest.approx([3e-3 * (1 - 7 / 8), 1e-2], rel=TEACHER.relative)


def test_a_teacher_of_two_minds_steers_to_the_geometric_mean():
    runs = batch()
    minds = certain(HandControl(3e-3, "constant"), HandControl(3e-2, "constant"))
    demonstrate(runs, minds.mean(0).expand(2, -1), wander=0.0)
    between = math.sqrt(3e-3 * 3e-2)
    assert runs.inner.hyperparameters[:, 0].tolist() == pytest.approx(
        [between] * 2, rel=TEACHER.relative
    )


def test_noise_pushes_off_the_path_and_the_teacher_brings_back():
    weights = certain(HandControl(1e-2, "constant"), HandControl(1e-2, "constant"))
    _, targets = demonstrate(batch(), weights, wander=0.5)
    assert (targets[:, 1:, 0].abs() > 1e-3).all()
