"""What workers do: pure functions of what is sent to them, each a picklable callable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lhopt_fused.meta.baselines import (
    DEFAULT_OF_GRID,
    SCHEDULES,
    Curves,
    adamw_grid,
    curves,
    final_losses,
)
from lhopt_fused.meta.config import MetaConfig
from lhopt_fused.meta.control import (
    CONTROL_SCHEDULES,
    HandControl,
    control_grid,
)
from lhopt_fused.meta.critic import Critic
from lhopt_fused.meta.demonstrations import Teacher, demonstrate
from lhopt_fused.meta.episode import PRIVILEGED_INPUTS, EpisodeBatch, Rival, sample_tasks
from lhopt_fused.meta.reward import PowerCurve, fit_power_curve, speedup_reward, wins
from lhopt_fused.meta.rollout import collect, play
from lhopt_fused.meta.setting import Setting
from lhopt_fused.policy import FEATURES, PolicyNetwork
from lhopt_fused.policy.network import LayerNormLSTMCell, LSTMState

__all__ = [
    "Collect",
    "Demonstrate",
    "FallLinearly",
    "FindReferences",
    "FirstLook",
    "Play",
    "References",
    "ScoreControls",
    "Weights",
    "ends_below",
    "pack",
]

Weights = Mapping[str, NDArray[np.float32]]
"""A module's ``state_dict`` in NumPy, which every kind of worker can be sent."""


def pack(module: torch.nn.Module) -> Weights:
    """Copies of a module's parameters and buffers."""
    state = module.state_dict()
    return {name: value.detach().cpu().numpy().copy() for name, value in state.items()}


def _unpacked(module: torch.nn.Module, weights: Weights) -> None:
    module.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    module.eval()


class ForgetfulCell(LayerNormLSTMCell):
    """The cell with its memory taken out before every step: what is left is a feed-forward net."""

    def recur(self, read: torch.Tensor, state: LSTMState) -> LSTMState:
        """The state that would be the first."""
        nothing = torch.zeros_like(state.h)
        return super().recur(read, LSTMState(nothing, nothing))


def make_network(config: MetaConfig, weights: Weights | None = None) -> PolicyNetwork:
    """The policy network of a configuration, on its device, fresh or with weights."""
    network = PolicyNetwork(config.policy.shape)
    if not config.policy.memory:
        network.lstm = ForgetfulCell(config.policy.hidden)
    if weights is not None:
        _unpacked(network, weights)
    return network.to(config.device)


def make_critic(config: MetaConfig, weights: Weights | None = None) -> Critic:
    """The critic of a configuration, on its device, fresh or with weights."""
    critic = Critic(len(FEATURES), PRIVILEGED_INPUTS, config.policy.hidden)
    if weights is not None:
        _unpacked(critic, weights)
    return critic.to(config.device)


@dataclass(frozen=True)
class Job:
    """What all jobs know.

    Attributes:
        config: of the meta-training.
        setting: the batch of episodes that this is about.
        data_dir: for families that read files.
    """

    config: MetaConfig
    setting: Setting
    data_dir: Path | None

    def batch(
        self,
        start: Mapping[str, float],
        *,
        noise: bool = False,
        baseline: bool = False,
        rival: HandControl | None = None,
    ) -> EpisodeBatch:
        """Fresh episodes, which start as runs of their length do."""
        config = self.config
        own, space = config.policy.for_run(start, self.setting.total_steps)
        return EpisodeBatch(
            self.setting,
            config.policy.settings(own),
            space,
            noise=config.noise if noise else None,
            hidden_eval=config.tasks.hidden_eval,
            baseline=config.baseline if baseline else None,
            rival=None if rival is None else self.rival(start, rival),
            device=config.device,
            data_dir=self.data_dir,
            hide=config.policy.hide,
        )

    def rival(self, start: Mapping[str, float], control: HandControl) -> Rival:
        """A possible hand control, as episodes are to beat it."""
        settings = self.config.policy.settings({**start, "lr": control.lr})
        schedule = CONTROL_SCHEDULES[control.schedule]
        return Rival(settings, schedule, self.config.win_weight)


@dataclass(frozen=True)
class Collect(Job):
    """Episodes under the policy being trained, to learn from."""

    start: Mapping[str, float]
    control: HandControl
    network: Weights
    critic: Weights
    version: int

    def __call__(self) -> dict[str, NDArray[np.generic]]:
        episodes = collect(
            self.batch(self.start, noise=True, baseline=True, rival=self.control),
            make_network(self.config, self.network),
            make_critic(self.config, self.critic),
            self.version,
            self.config.ppo.discount,
        )
        return {name: tensor.cpu().numpy() for name, tensor in episodes.to_tensors().items()}


@dataclass(frozen=True)
class FirstLook(Job):
    """What the policy sees of each task after the first outer step, ``[T, F]``, without noise."""

    start: Mapping[str, float]

    def __call__(self) -> NDArray[np.float32]:
        batch = self.batch(self.start)
        return batch.advance().features.cpu().numpy()


@dataclass(frozen=True)
class Demonstrate(Job):
    """Episodes under a teacher, to imitate."""

    start: Mapping[str, float]
    teacher: Teacher

    def __call__(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        batch = self.batch(self.start, noise=True)
        features, targets = demonstrate(batch, self.teacher, self.config.cloning.wander)
        return features.cpu().numpy(), targets.cpu().numpy()


@dataclass(frozen=True)
class ScoreControls(Job):
    """The final loss of each of the possible hand controls on each task, and its reward.

    ``[C, T]`` both."""

    start: Mapping[str, float]

    def __call__(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        tasks = sample_tasks(self.setting, self.config.device, self.data_dir)
        rivals = [self.rival(self.start, control) for control in control_grid()]
        losses = final_losses(
            tasks,
            [rival.settings for rival in rivals],
            [rival.schedule for rival in rivals],
            self.setting.total_steps,
        )
        curve = _fit(curves(tasks, self.setting.total_steps, self.config.baseline))
        rewards = [speedup_reward(curve, row, self.setting.total_steps) for row in losses]
        return losses.cpu().numpy(), torch.stack(rewards).cpu().numpy()


class References(NamedTuple):
    """What a policy is compared with on the R tasks of a setting; report losses, float64.

    Attributes:
        default: AdamW at 1e-3, ``[R]``.
        grid: AdamW in each of its 35 configurations, ``[35, R]``.
        tuned: that configuration of them which another run of the task, from another random start,
            ended lowest with on the data that policies are shown, ``[R]``.
        control: the hand control, ``[R]``.
        curve_steps, curve_losses: the baseline of the reward.
    """

    default: NDArray[np.float64]
    grid: NDArray[np.float64]
    tuned: NDArray[np.float64]
    control: NDArray[np.float64]
    curve_steps: NDArray[np.float64]
    curve_losses: NDArray[np.float64]

    def rewards(self, losses: NDArray[np.float64], total_steps: int) -> NDArray[np.float64]:
        """Log speed-up over the baseline, ``[R]``, of runs that ended at ``losses``."""
        steps, points = torch.tensor(self.curve_steps), torch.tensor(self.curve_losses)
        curve = _fit(Curves(steps, points))
        return speedup_reward(curve, torch.tensor(losses), total_steps).numpy()

    def won(self, losses: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """1 where runs ended below an opponent, 0.5 where equal, float64 ``[R]``, by its name.

        The opponents are those of the fields, ``median`` of the grid, and ``hindsight``, the lowest
        of its losses on each task.
        """
        grid = np.nan_to_num(self.grid, nan=np.inf)
        others = {
            "default": self.default,
            "tuned": self.tuned,
            "hindsight": grid.min(0),
            "median": np.median(grid, axis=0),
            "control": self.control,
        }
        return {name: ends_below(losses, x) for name, x in others.items()}


def ends_below(losses: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where runs ended below others, 0.5 where equal, float64 ``[R]``."""
    return wins(torch.tensor(losses), torch.tensor(others)).numpy()


@dataclass(frozen=True)
class FindReferences(Job):
    """The references of a setting."""

    start: Mapping[str, float]
    control: HandControl

    def __call__(self) -> References:
        tasks = sample_tasks(self.setting, self.config.device, self.data_dir)
        steps = self.setting.total_steps
        settings, schedules = adamw_grid()
        grid = final_losses(tasks, settings, schedules, steps)
        trial = final_losses(tasks.again(1), settings, schedules, steps, split="eval")
        chosen = trial.nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
        tuned = grid.gather(0, chosen)[0]
        rival = self.rival(self.start, self.control)
        control = final_losses(tasks, [rival.settings], [rival.schedule], steps)[0]
        default = grid[DEFAULT_OF_GRID]
        found = curves(tasks, steps, self.config.baseline)
        arrays = (default, grid, tuned, control, found.steps, found.losses)
        return References(*(array.cpu().numpy() for array in arrays))


@dataclass(frozen=True)
class FallLinearly(Job):
    """Report losses ``[R]`` of runs that start as a policy's do and fall linearly to 0."""

    start: Mapping[str, float]

    def __call__(self) -> NDArray[np.float64]:
        tasks = sample_tasks(self.setting, self.config.device, self.data_dir)
        own, _ = self.config.policy.for_run(self.start, self.setting.total_steps)
        settings = [self.config.policy.settings(own)]
        linear = [SCHEDULES["linear"]]
        return final_losses(tasks, settings, linear, self.setting.total_steps)[0].cpu().numpy()


@dataclass(frozen=True)
class Play(Job):
    """Episodes as the trained policy would be used, without noise."""

    start: Mapping[str, float]
    network: Weights

    def __call__(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        batch = self.batch(self.start)
        outcome = play(batch, make_network(self.config, self.network))
        return outcome.losses.cpu().numpy(), outcome.hyperparameters.cpu().numpy()


def _fit(found: Curves) -> PowerCurve:
    return fit_power_curve(found.losses[:, 0], found.steps[1:], found.losses[:, 1:])
