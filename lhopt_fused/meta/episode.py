"""A batch of episodes: whole inner training runs that decide together, outer step by outer step."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from lhopt_fused.actions import DEFAULT_ACTION_SPACE, ActionSpace, apply_shifts
from lhopt_fused.ciao import LHOPT_START
from lhopt_fused.kernels import BackendName
from lhopt_fused.meta.baselines import Baseline, Schedule, curves, final_losses
from lhopt_fused.meta.inner import InnerRuns, Settings
from lhopt_fused.meta.reward import PowerCurve, fit_power_curve, speedup_reward, wins
from lhopt_fused.meta.setting import Setting, StartNoise, outer_boundaries
from lhopt_fused.meta.tasks import FAMILIES, HELDOUT, PRIVILEGED, TaskBatch
from lhopt_fused.policy import FEATURES, FeatureState, Observation
from lhopt_fused.policy.features import policy_features
from lhopt_fused.types import HYPERPARAMETERS

__all__ = ["PRIVILEGED_INPUTS", "EpisodeBatch", "Rival", "Seen", "sample_tasks"]

_FREQUENCY: Final[int] = LHOPT_START["inner_feature_frequency"]
_OWN_INPUTS: Final = 5
PRIVILEGED_INPUTS: Final = PRIVILEGED + len(HYPERPARAMETERS) + _OWN_INPUTS
"""How much the critic sees beside the policy features: the task, the start's noise, train and eval
loss on the baseline's scale, whether the policy has an eval loss, and the lengths of the run."""

_LARGEST_LOSS: Final = 10.0


class Seen(NamedTuple):
    """What an outer step shows; float32 ``[R, F]`` for the policy, ``[R, P]`` for the critic."""

    features: torch.Tensor
    privileged: torch.Tensor


class Rival(NamedTuple):
    """What episodes are to end below.

    Attributes:
        settings, schedule: of the inner optimizer and of its learning rate.
        worth: what it adds to the reward.
    """

    settings: Settings
    schedule: Schedule
    worth: float


def sample_tasks(setting: Setting, device: torch.device | str, data_dir: Path | None) -> TaskBatch:
    """The distinct tasks of a setting."""
    family = {**FAMILIES, **HELDOUT}[setting.family]
    return family(data_dir).sample(setting.seed, setting.tasks, device)


class EpisodeBatch:
    """R episodes of one setting, in step.

    Each turn is :meth:`advance`, then :meth:`act` unless :attr:`done`; :meth:`rewards` at the end.

    Args:
        setting: what the episodes are about.
        start: options and numbers that runs start from, before the noise.
        space: what may be done.
        noise: of the start; None for none.
        hidden_eval: share of the runs that show no eval loss.
        baseline: what the reward compares with; None where no reward is asked for.
        rival: what it is worth more to beat, if anything.
        backend: of the inner steps.
        device: where the runs are.
        data_dir: for families that read files.
        hide: policy features that are always 0, by patterns of their names.

    Attributes:
        outer_step: outer steps done.
        inner: the inner runs.
        observation: of the last outer step, float64.
    """

    observation: Observation

    def __init__(
        self,
        setting: Setting,
        start: Settings,
        space: ActionSpace = DEFAULT_ACTION_SPACE,
        *,
        noise: StartNoise | None = None,
        hidden_eval: float = 0.0,
        baseline: Baseline | None = None,
        rival: Rival | None = None,
        backend: BackendName = "auto",
        device: torch.device | str = "cpu",
        data_dir: Path | None = None,
        hide: tuple[str, ...] = (),
    ) -> None:
        self.setting, self.space = setting, space
        self.outer_step = 0
        self._boundaries = outer_boundaries(setting.total_steps, setting.outer_steps)
        distinct = sample_tasks(setting, device, data_dir)
        task_of_run = setting.task_of_run.to(device)
        self._curve: PowerCurve | None = None
        self._scale: torch.Tensor | None = None
        if baseline is not None:
            steps, losses = curves(distinct, setting.total_steps, baseline, backend)
            losses = losses[task_of_run]
            self._curve = fit_power_curve(losses[:, 0], steps[1:], losses[:, 1:])
            self._scale = _loss_scale(losses)
        self._bonus: tuple[torch.Tensor, float] | None = None
        if rival is not None:
            found = final_losses(
                distinct, [rival.settings], [rival.schedule], setting.total_steps, backend
            )
            self._bonus = found[0, task_of_run], rival.worth
        tasks = distinct.select(task_of_run)
        self.inner = InnerRuns(tasks, start, backend=backend, feature_frequency=_FREQUENCY)
        rng = np.random.default_rng([setting.seed, 1])
        shifts = torch.zeros(setting.runs, len(HYPERPARAMETERS), dtype=torch.float64)
        if noise is not None:
            shifts = noise.draw(rng, setting.runs, space.actions)
        self.has_eval_loss = torch.from_numpy(rng.random(setting.runs) >= hidden_eval).to(device)
        shifts = shifts.to(device)
        self.inner.begin(apply_shifts(self.inner.hyperparameters, shifts, space.actions))
        self._described = torch.cat([tasks.describe(), shifts.float()], dim=-1)
        self._memory = FeatureState.initial((setting.runs,), device)
        self._hidden = [
            index
            for index, name in enumerate(FEATURES)
            if any(fnmatchcase(name, pattern) for pattern in hide)
        ]

    @property
    def done(self) -> bool:
        """Whether the last outer step is over."""
        return self.outer_step == self.setting.outer_steps

    def advance(self) -> Seen:
        """Do the inner steps of one outer step and show what they were like."""
        end = self._boundaries[self.outer_step]
        self.inner.advance(end - self.inner.step)
        self.outer_step += 1
        self.observation = self.inner.observe(
            self.setting.total_steps, self.setting.outer_steps, self.has_eval_loss
        )
        features, self._memory = policy_features(self.observation, self._memory, self.space.actions)
        features[:, self._hidden] = 0.0
        return Seen(features, self._privileged())

    def act(self, shifts: torch.Tensor, register: torch.Tensor) -> None:
        """Apply decisions; they hold from the next outer step on.

        Args:
            shifts: float64 ``[R, 8]``, log multipliers or logit shifts.
            register: int64 ``[R]``, index into REGISTER_CHOICES.
        """
        uses = register if self.space.registers else None
        self.inner.apply(shifts, uses, self.space.actions)
        self._memory = self._memory.after(shifts, register)

    def shifts_of(self, choices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What :meth:`act` takes for a choice per head, int64 ``[R, H]``."""
        values = [
            choices.new_tensor(action.shifts, dtype=torch.float64)[choice]
            for action, choice in zip(self.space.actions, choices.unbind(-1), strict=False)
        ]
        register = choices[:, -1] if self.space.registers else torch.zeros_like(choices[:, 0])
        return torch.stack(values, dim=-1), register

    def rewards(self) -> torch.Tensor:
        """Log speed-up over the baseline at the end of each episode, float64 ``[R]``, within 3.

        For an episode that ends below its rival, what that is worth comes on top.

        Raises:
            RuntimeError: the episodes are not over, or were begun without a baseline.
        """
        if not self.done or self._curve is None:
            raise RuntimeError("rewards need episodes that are over, begun with a baseline")
        losses = self.inner.loss("report")
        reward = speedup_reward(self._curve, losses, self.setting.total_steps)
        if self._bonus is not None:
            rival_losses, worth = self._bonus
            reward += worth * wins(losses, rival_losses)
        return reward

    def _privileged(self) -> torch.Tensor:
        """What only the critic sees: float32 ``[R, PRIVILEGED_INPUTS]``, all finite."""
        seen = self.observation
        losses = torch.stack([seen.train_loss, self.inner.loss("eval")], dim=-1)
        if self._scale is not None:
            low, width = torch.split(self._scale, 1, dim=-1)
            losses = (losses - low) / width
        run = losses.new_tensor([self.setting.total_steps, self.setting.outer_steps]).log()
        own = torch.cat(
            [
                losses.nan_to_num(nan=_LARGEST_LOSS).clamp(-_LARGEST_LOSS, _LARGEST_LOSS),
                self.has_eval_loss[:, None].double(),
                run.expand(len(losses), 2),
            ],
            dim=-1,
        )
        return torch.cat([self._described, own.float()], dim=-1)


def _loss_scale(losses: torch.Tensor) -> torch.Tensor:
    """Lowest loss of each curve ``[R, P]``, and how far it fell: float64 ``[R, 2]``."""
    usable = losses.nan_to_num(nan=torch.inf)
    low = usable.amin(-1)
    low = torch.where(low.isfinite(), low, 0.0)
    width = torch.where(usable[:, 0].isfinite(), usable[:, 0] - low, 1.0)
    return torch.stack([low, torch.where(width > 0, width, 1.0)], dim=-1)
