"""What meta-training sees and does is what deployment sees and does, step by step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tolerances import LEARNED_RUN, STACKED_RUN, Tolerance, assert_close

from lhopt_fused import LHOPT
from lhopt_fused.actions import DEFAULT_ACTION_SPACE, REGISTER_CHOICES, ActionSpace, apply_shifts
from lhopt_fused.ciao import LHOPT_START
from lhopt_fused.meta.config import MetaConfig, PolicyConfig
from lhopt_fused.meta.episode import EpisodeBatch
from lhopt_fused.meta.inner import InnerRuns, ciao_settings
from lhopt_fused.meta.jobs import Job
from lhopt_fused.meta.rollout import play
from lhopt_fused.meta.setting import Setting
from lhopt_fused.meta.tasks import FAMILIES, TaskBatch
from lhopt_fused.policy import (
    FEATURES,
    LearnedPolicy,
    NetworkShape,
    Observation,
    PolicyNetwork,
    RunDecision,
    RunObservation,
    StartOptions,
    load_policy,
)
from lhopt_fused.types import HYPERPARAMETERS

SPACE = ActionSpace(DEFAULT_ACTION_SPACE.actions, registers=True)
START = {name: float(LHOPT_START[name]) for name in HYPERPARAMETERS}
SETTING = Setting("xor", 3, 3, 1, 44, 8)  # without normalisation, behind which biases see noise


class Scripted:
    """A policy that does what it was told, and notes what it was shown."""

    name = "scripted"
    action_space = SPACE
    start_hyperparameters = START
    start_options = StartOptions()

    def __init__(self, shifts: torch.Tensor, register: torch.Tensor) -> None:
        self.script = list(zip(shifts, register.tolist(), strict=True))
        self.seen: list[RunObservation] = []

    def start_run(self, *, mode: str = "mean", seed: int = 0) -> Scripted:
        return self

    def decide(self, observation: RunObservation) -> RunDecision:
        index = len(self.seen)
        self.seen.append(observation)
        shifts, register = self.script[index] if index < len(self.script) else (torch.zeros(8), 0)
        now = torch.tensor(observation.hyperparameters, dtype=torch.float64)
        after = apply_shifts(now, shifts.double(), SPACE.actions)
        nothing = np.empty(0, np.float32), np.empty(0, np.float64)
        return RunDecision(after.numpy(), shifts.numpy(), register, *nothing)

    def get_state(self) -> np.ndarray:
        return np.empty(0, np.float64)

    def set_state(self, state: np.ndarray) -> None:
        assert state.size == 0


def script() -> tuple[torch.Tensor, torch.Tensor]:
    """Decisions after all outer steps but the last: shifts, and every kind of use of a register."""
    generator = torch.Generator().manual_seed(0)
    shifts = torch.randn(7, 8, generator=generator, dtype=torch.float64) * 0.3
    names = ["keep", "save_0", "save_2", "swap_0", "load_2", "load_1", "swap_1"]
    return shifts, torch.tensor([REGISTER_CHOICES.index(name) for name in names])


def deploy(tasks: TaskBatch, policy: Scripted | LearnedPolicy, **options: object) -> LHOPT:
    """LHOPT on the first of the tasks, as a user would write it."""
    task = tasks.select(torch.tensor([0]))
    params = {name: torch.nn.Parameter(value[0]) for name, value in task.init().items()}

    def stacked() -> dict[str, torch.Tensor]:
        return {name: value[None] for name, value in params.items()}

    optimizer = LHOPT(
        list(params.values()),
        SETTING.total_steps,
        outer_steps=SETTING.outer_steps,
        policy=policy,
        eval_fn=lambda: task.eval_loss(stacked(), "eval")[0],
        **options,
    )
    for step in range(SETTING.total_steps):
        loss = task.train_loss(stacked(), step)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.observe(train_loss=loss)
        optimizer.step()
    return optimizer


def episode(tasks: int, space: ActionSpace = SPACE) -> EpisodeBatch:
    setting = Setting(SETTING.family, SETTING.seed, tasks, 1, SETTING.total_steps, 8)
    return EpisodeBatch(setting, ciao_settings(), space)


def assert_same_observation(
    mine: Observation, run: int, theirs: RunObservation, tolerance: Tolerance | None
) -> None:
    for name in RunObservation._fields:
        here = getattr(mine, name)[run].double()
        there = torch.tensor(getattr(theirs, name), dtype=torch.float64)
        if tolerance is None:
            assert torch.equal(here.nan_to_num(nan=-7.0), there.nan_to_num(nan=-7.0)), name
        else:
            assert torch.equal(here.isnan(), there.isnan()), name
            scale = there.abs().nan_to_num(nan=0.0)
            assert_close(here.nan_to_num(nan=0.0), there.nan_to_num(nan=0.0), tolerance, scale)


@pytest.mark.parametrize(("tasks", "tolerance"), [(1, None), (3, STACKED_RUN)])
def test_meta_training_and_deployment_see_and_do_the_same(
    tasks: int, tolerance: Tolerance | None
) -> None:
    shifts, register = script()
    policy = Scripted(shifts, register)
    batch = episode(tasks)
    optimizer = deploy(batch.inner.tasks, policy, restart_registers=3)
    for step in range(SETTING.outer_steps):
        batch.advance()
        assert_same_observation(batch.observation, 0, policy.seen[step], tolerance)
        if not batch.done:
            batch.act(shifts[step].expand(tasks, 8), register[step].expand(tasks))
    assert batch.done
    assert len(policy.seen) == len(optimizer.history) == SETTING.outer_steps


def test_the_comparison_sees_a_decision_that_comes_too_late() -> None:
    shifts, register = script()
    policy = Scripted(shifts, register)
    batch = episode(1)
    deploy(batch.inner.tasks, policy, restart_registers=3)
    batch.advance()
    batch.advance()
    with pytest.raises(AssertionError, match="off by"):
        assert_same_observation(batch.observation, 0, policy.seen[1], STACKED_RUN)


def test_a_learned_policy_takes_the_runs_the_same_way() -> None:
    """The runner in C++ under LHOPT against the network under the environment."""
    torch.manual_seed(0)
    space = DEFAULT_ACTION_SPACE
    network = PolicyNetwork(NetworkShape(len(FEATURES), space.head_sizes, 32, 16)).eval()
    for head in network.heads:
        torch.nn.init.normal_(head.logits.weight, std=0.5)
    policy = LearnedPolicy.from_network(
        network, name="random", action_space=space, start_hyperparameters=START
    )
    batch = episode(1, space)
    optimizer = deploy(batch.inner.tasks, policy)
    outcome = play(batch, network)
    for step, now in zip(optimizer.history, outcome.hyperparameters[0], strict=False):
        there = torch.tensor(list(step.hyperparameters.values()), dtype=torch.float64)
        assert_close(now, there, LEARNED_RUN, there)
    moved = outcome.hyperparameters[0, -1] / torch.tensor(list(START.values()))
    assert (moved.log().abs() > 0.05).sum() >= 6  # else nothing was compared


def test_registers_hold_each_runs_own_state() -> None:
    tasks = FAMILIES["clusters"]().sample(0, 3)
    runs = InnerRuns(tasks, ciao_settings(), feature_frequency=1)
    yes = torch.ones(3, dtype=torch.bool)

    def outer_step() -> None:
        runs.advance(4)
        runs.observe(100, 25, yes)

    def use(*names: str) -> None:
        choice = torch.tensor([REGISTER_CHOICES.index(name) for name in names])
        runs.apply(torch.zeros(3, 8, dtype=torch.float64), choice)

    outer_step()
    saved = {name: value.clone() for name, value in runs.params.items()}
    use("save_1", "keep", "save_2")
    outer_step()
    later = {name: value.clone() for name, value in runs.params.items()}
    use("load_1", "load_1", "load_1")  # the others have nothing in register 1
    for name, value in runs.params.items():
        assert torch.equal(value[0], saved[name][0])
        assert torch.equal(value[1:], later[name][1:])
    use("keep", "keep", "swap_2")
    for name, value in runs.params.items():
        assert torch.equal(value[2], saved[name][2])
    use("keep", "keep", "load_2")
    for name, value in runs.params.items():
        assert torch.equal(value[2], later[name][2])


def test_a_run_that_diverges_leaves_the_others_alone() -> None:
    tasks = FAMILIES["clusters"]().sample(0, 3)
    settings = [ciao_settings(lr=1e-2)] * 3
    wild = [settings[0], ciao_settings(lr=1e30), settings[2]]
    calm, broken = (InnerRuns(tasks, s, feature_frequency=4) for s in (settings, wild))
    calm.advance(12)
    broken.advance(12)
    assert not broken.loss("eval")[1].isfinite() or broken.loss("eval")[1] > 1e6
    for name, value in calm.params.items():
        assert torch.equal(value[[0, 2]], broken.params[name][[0, 2]])


@pytest.mark.parametrize("total_steps", [12, 300])
def test_episodes_start_where_runs_of_their_length_do(total_steps: int) -> None:
    config = MetaConfig("start", policy=PolicyConfig(lr_steps=48, lr_reach=1.5))
    setting = Setting("quadratic", 3, 2, 1, total_steps, 4)
    batch = Job(config, setting, None).batch(START)
    policy = replace(load_policy("fixed"), start_options=config.policy.start_options)
    optimizer = LHOPT([torch.nn.Parameter(torch.ones(2))], total_steps, policy=policy)
    group = optimizer.param_groups[0]
    assert batch.space.actions[0].high == optimizer.policy.action_space.actions[0].high
    assert batch.space.actions[0].high == pytest.approx(1.5 * group["lr"])
    assert batch.inner.hyperparameters[:, 0].tolist() == [group["lr"]] * 2
    assert group["lr"] != START["lr"]
