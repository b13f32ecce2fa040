"""Runs under teachers, to be imitated: schedules, policies, and how they use registers."""

from __future__ import annotations

import math

import pytest
import torch
from meta.runs import small
from tolerances import TEACHER

from lhopt_fused.actions import ACTIONS, REGISTER_CHOICES, ActionSpace
from lhopt_fused.meta.config import START_HYPERPARAMETERS, MetaConfig
from lhopt_fused.meta.control import HandControl, control_grid
from lhopt_fused.meta.demonstrations import (
    PolicyTeacher,
    ScheduleTeacher,
    demonstrate,
    nearest_choices,
)
from lhopt_fused.meta.episode import EpisodeBatch
from lhopt_fused.meta.jobs import make_network
from lhopt_fused.meta.rollout import play
from lhopt_fused.meta.setting import Setting
from lhopt_fused.policy import LearnedPolicy

GRID = control_grid()
CONFIG = small("policy.lr_choices=[0.1, 10.0]")
WITH_REGISTERS = small("policy.lr_choices=[0.1, 10.0]", "policy.registers=true")
SETTING = Setting("quadratic", 5, tasks=2, repeats=1, total_steps=8, outer_steps=4)


def batch(
    config: MetaConfig = CONFIG, setting: Setting = SETTING, hidden_eval: float = 0.0
) -> EpisodeBatch:
    settings = config.policy.settings(START_HYPERPARAMETERS)
    return EpisodeBatch(setting, settings, config.policy.action_space, hidden_eval=hidden_eval)


def certain(*controls: HandControl) -> torch.Tensor:
    """Teachers that each know one schedule."""
    return torch.eye(len(GRID), dtype=torch.float64)[[GRID.index(c) for c in controls]]


def schedules(weights: torch.Tensor) -> ScheduleTeacher:
    return ScheduleTeacher(weights.numpy())


def log_rates(targets: torch.Tensor) -> torch.Tensor:
    """Mean log multipliers of the learning rate that targets ask for."""
    lr = CONFIG.policy.action_space.actions[0]
    return targets[..., : len(lr.choices)] @ targets.new_tensor(lr.shifts)


def test_a_teacher_steers_to_its_schedule_in_the_middle_of_the_coming_outer_step():
    runs = batch()
    weights = certain(HandControl(3e-3, "linear"), HandControl(1e-2, "constant"))
    _, targets = demonstrate(runs, schedules(weights), wander=0.0)
    asked = log_rates(targets)
    start = math.log(START_HYPERPARAMETERS["lr"])
    first = math.log(3e-3) + math.log(1 - 3 / 8) - start
    assert asked[0, 0] == pytest.approx(first, rel=TEACHER.relative)
    assert asked[1, 0] == pytest.approx(math.log(1e-2) - start, rel=TEACHER.relative)
    assert (asked[1, 1:].abs() < 1e-6).all()
    rates = runs.inner.hyperparameters[:, 0]
    assert rates.tolist() == pytest.approx([3e-3 * (1 - 7 / 8), 1e-2], rel=TEACHER.relative)
    others = runs.inner.hyperparameters[:, 1:]
    assert torch.equal(others, batch().inner.hyperparameters[:, 1:])


def test_a_teacher_of_two_minds_steers_to_the_geometric_mean():
    runs = batch()
    minds = certain(HandControl(3e-3, "constant"), HandControl(3e-2, "constant"))
    demonstrate(runs, schedules(minds.mean(0).expand(2, -1)), wander=0.0)
    between = math.sqrt(3e-3 * 3e-2)
    assert runs.inner.hyperparameters[:, 0].tolist() == pytest.approx(
        [between] * 2, rel=TEACHER.relative
    )


def test_noise_pushes_off_the_path_and_the_teacher_brings_back():
    weights = certain(HandControl(1e-2, "constant"), HandControl(1e-2, "constant"))
    _, targets = demonstrate(batch(), schedules(weights), wander=0.5)
    assert (log_rates(targets)[:, 1:].abs() > 1e-3).all()


def test_the_two_nearest_choices_have_the_wanted_mean():
    space = ActionSpace(ACTIONS)
    shifts = torch.zeros(3, 8, dtype=torch.float64)
    shifts[:, 0] = torch.tensor([0.123, 1e9, -1e9])
    found = nearest_choices(shifts, space)
    lr = torch.tensor(space.actions[0].shifts, dtype=torch.float64)
    head = found[:, : len(lr)]
    assert found.shape == (3, sum(space.head_sizes))
    assert (head @ lr).tolist() == pytest.approx([0.123, lr[-1].item(), lr[0].item()])
    assert (head[0] > 0).sum() == 2
    assert head[0].nonzero().diff(dim=0).item() == 1
    assert found.sum(-1).tolist() == pytest.approx([len(space.actions)] * 3)


# ---------------------------------------------------------------------- policies as teachers


def policy(config: MetaConfig = CONFIG) -> LearnedPolicy:
    torch.manual_seed(3)
    network = make_network(config)
    for head in network.heads:
        torch.nn.init.normal_(head.logits.weight)
    return LearnedPolicy.from_network(
        network,
        name="teacher",
        action_space=config.policy.action_space,
        start_hyperparameters=START_HYPERPARAMETERS,
    )


def test_a_policy_teaches_what_it_would_decide():
    taught, played = batch(), batch()
    features, targets = demonstrate(taught, PolicyTeacher(policy()), wander=0.0)
    outcome = play(played, policy().network())
    assert features.shape[:2] == targets.shape[:2] == (2, 3)
    assert targets.shape[2] == sum(CONFIG.policy.shape.heads)
    assert torch.equal(taught.inner.hyperparameters, outcome.hyperparameters[:, -1])
    assert not torch.equal(taught.inner.hyperparameters, batch().inner.hyperparameters)


def test_a_policy_without_registers_teaches_one_with_them():
    _, targets = demonstrate(batch(WITH_REGISTERS), PolicyTeacher(policy()), wander=0.0)
    assert targets.shape[2] == sum(WITH_REGISTERS.policy.shape.heads)
    assert targets.sum(-1).flatten().tolist() == pytest.approx([9.0] * 6)


# ---------------------------------------------------------------------- registers


class Scripted(EpisodeBatch):
    """Shows eval losses that a test wrote."""

    def advance(self):
        seen = super().advance()
        shown = torch.tensor(LOSSES[self.outer_step - 1], dtype=torch.float64)
        object.__setattr__(self.observation, "eval_loss", shown)
        return seen


LOSSES = ((3.0, 3.0), (1.0, 2.0), (2.0, 1.99), (9.0, 9.0))


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_the_best_state_is_kept_and_gone_back_to_where_the_eval_loss_rose(hidden: float):
    settings = WITH_REGISTERS.policy.settings(START_HYPERPARAMETERS)
    space = WITH_REGISTERS.policy.action_space
    runs = Scripted(SETTING, settings, space, hidden_eval=hidden)
    weights = certain(HandControl(1e-2, "constant"), HandControl(1e-2, "constant"))
    _, targets = demonstrate(runs, schedules(weights), wander=0.0)
    chosen = targets[..., -len(REGISTER_CHOICES) :].argmax(-1)
    names = [[REGISTER_CHOICES[choice] for choice in row] for row in chosen.tolist()]
    kept = [["save_0", "save_0", "load_0"], ["save_0", "save_0", "save_0"]]
    assert names == (kept if not hidden else [["keep"] * 3] * 2)
