"""Episodes in which a teacher decides, for a policy to imitate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lhopt_fused.actions import REGISTER_CHOICES, ActionSpace
from lhopt_fused.meta.control import control_grid
from lhopt_fused.meta.episode import EpisodeBatch, Seen
from lhopt_fused.meta.setting import outer_boundaries
from lhopt_fused.policy import LearnedPolicy
from lhopt_fused.policy.decision import decide
from lhopt_fused.types import HYPERPARAMETERS

__all__ = ["PolicyTeacher", "ScheduleTeacher", "Teacher", "demonstrate", "nearest_choices"]

Mind = Callable[[Seen], torch.Tensor]
"""From what an outer step shows to probabilities of the choices of each hyperparameter, side by
side: float64 ``[R, C]``."""

_LR: Final = HYPERPARAMETERS.index("lr")
_KEEP, _SAVE, _LOAD = (REGISTER_CHOICES.index(name) for name in ("keep", "save_0", "load_0"))
_RISE: Final = 1.02


class Teacher(Protocol):
    """Who decides in episodes."""

    def begin(self, batch: EpisodeBatch) -> Mind:
        """Its decisions in fresh episodes; called after each outer step but the last."""


@dataclass(frozen=True)
class ScheduleTeacher:
    """Steers each task to its own mean of schedules.

    Attributes:
        weights: float64 ``[T, S]``, what each task's teacher makes of each of
            :func:`~lhopt_fused.meta.control.control_grid`; see
            :func:`~lhopt_fused.meta.teacher.teacher_weights`.
    """

    weights: NDArray[np.float64]

    def begin(self, batch: EpisodeBatch) -> Mind:
        """Decisions that bring each run to its learning rate in the middle of the coming outer
        step, as far as one decision can."""
        setting, now = batch.setting, batch.inner.hyperparameters
        of_runs = torch.tensor(self.weights, device=now.device)[setting.task_of_run.to(now.device)]
        ends = outer_boundaries(setting.total_steps, setting.outer_steps)

        def decisions(seen: Seen) -> torch.Tensor:
            middle = (ends[batch.outer_step - 1] + ends[batch.outer_step]) / 2
            progress = middle / setting.total_steps
            rates = now.new_tensor([x.learning_rate(progress) for x in control_grid()])
            shifts = torch.zeros_like(now)
            shifts[:, _LR] = of_runs @ rates.log() - now[:, _LR].log()
            return nearest_choices(shifts, batch.space)

        return decisions


@dataclass(frozen=True)
class PolicyTeacher:
    """Decides as a policy does.

    Attributes:
        policy: with the choices of the episodes for every hyperparameter.
    """

    policy: LearnedPolicy

    def begin(self, batch: EpisodeBatch) -> Mind:
        """The policy's own probabilities."""
        now = batch.inner.hyperparameters
        network = self.policy.network().to(now.device)
        space, count = self.policy.action_space, sum(_sizes(batch.space))
        state = network.initial_state((len(now),), now.device)
        unused = torch.zeros(len(now), dtype=torch.int64, device=now.device)

        def decisions(seen: Seen) -> torch.Tensor:
            nonlocal state
            logits, state = network(seen.features, state)
            decided = decide(logits, space, "mean", seed=unused, step=unused)
            return decided.probabilities[:, :count]

        return decisions


class _BestState:
    """How a teacher uses the first register: it keeps the state with the lowest eval loss, and goes
    back there before the last outer step if the eval loss has risen by 2 % since.

    Runs that see no eval loss use no register.
    """

    def __init__(self, batch: EpisodeBatch) -> None:
        self._batch = batch
        self._lowest = torch.full_like(batch.inner.hyperparameters[:, 0], math.inf)

    def choices(self) -> torch.Tensor:
        """Index into REGISTER_CHOICES for each run, int64 ``[R]``."""
        batch, seen = self._batch, self._batch.observation
        loss = seen.eval_loss.masked_fill(~seen.has_eval_loss, torch.nan)
        choices = torch.full_like(loss, _KEEP, dtype=torch.int64)
        choices[loss < self._lowest] = _SAVE
        self._lowest = torch.fmin(self._lowest, loss)
        if batch.outer_step == batch.setting.outer_steps - 1:
            choices[loss > _RISE * self._lowest] = _LOAD
        return choices


@torch.no_grad()
def demonstrate(
    batch: EpisodeBatch, teacher: Teacher, wander: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run episodes under a teacher, pushed off its path by noise.

    Args:
        batch: fresh.
        teacher: whose mean decisions are applied.
        wander: standard deviation of the noise on each log learning rate.

    Returns:
        What the policy would have seen, float32 ``[R, D, F]``, and the teacher's probabilities for
        all heads side by side, float32 ``[R, D, sum(head_sizes)]``.
    """
    generator = torch.Generator().manual_seed(batch.setting.seed % 2**62)
    decisions = teacher.begin(batch)
    kept = _BestState(batch)
    features, targets = [], []
    device = batch.inner.scalars.device
    register = torch.zeros(batch.setting.runs, dtype=torch.int64, device=device)
    seen = batch.advance()
    while not batch.done:
        wanted = decisions(seen)
        shifts = _means(wanted, batch.space)
        if batch.space.registers:
            register = kept.choices()
            certain = F.one_hot(register, len(REGISTER_CHOICES))
            wanted = torch.cat([wanted, certain.to(wanted.dtype)], dim=-1)
        features.append(seen.features)
        targets.append(wanted.float())
        noise = torch.randn(len(shifts), generator=generator, dtype=torch.float64)
        shifts[:, _LR] += wander * noise.to(device)
        batch.act(shifts, register)
        seen = batch.advance()
    return torch.stack(features, dim=1), torch.stack(targets, dim=1)


def nearest_choices(shifts: torch.Tensor, space: ActionSpace) -> torch.Tensor:
    """Probabilities whose mean decisions are the given ones, of the two choices on either side.

    Args:
        shifts: ``[..., 8]``, log multipliers or logit shifts; ones out of a head's reach count as
            the nearest within.
        space: the actions.

    Returns:
        ``[..., C]``, of the choices of every hyperparameter, side by side.
    """
    heads = [
        _around(shift.clamp(min(action.shifts), max(action.shifts)), action.shifts)
        for shift, action in zip(shifts.unbind(-1), space.actions, strict=True)
    ]
    return torch.cat(heads, dim=-1)


def _around(target: torch.Tensor, choices: Sequence[float]) -> torch.Tensor:
    """Probabilities ``[..., C]`` of C ascending choices whose mean is the target, within reach."""
    shifts = target.new_tensor(choices)
    last = len(shifts) - 1
    above = torch.searchsorted(shifts, target.contiguous()).clamp(min(1, last), last)
    below = (above - 1).clamp_min(0)
    gap = shifts[above] - shifts[below]
    share = torch.where(gap > 0, (target - shifts[below]) / gap, 0.0)[..., None]
    nearest = torch.zeros((*target.shape, len(shifts))).to(target)
    nearest.scatter_add_(-1, below[..., None], 1.0 - share)
    return nearest.scatter_add_(-1, above[..., None], share)


def _means(probabilities: torch.Tensor, space: ActionSpace) -> torch.Tensor:
    """Mean shifts ``[..., 8]`` of the choices of every hyperparameter, side by side."""
    heads = torch.split(probabilities, _sizes(space), dim=-1)
    means = [
        (head * head.new_tensor(action.shifts)).sum(-1)
        for head, action in zip(heads, space.actions, strict=True)
    ]
    return torch.stack(means, dim=-1)


def _sizes(space: ActionSpace) -> list[int]:
    """How many choices there are for each hyperparameter."""
    return [len(action.choices) for action in space.actions]
