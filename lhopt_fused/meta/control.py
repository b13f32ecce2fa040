"""The hand control: the inner optimizer under the one fixed schedule that is best on the training
tasks, which a policy has to beat; and runs under teachers, which each follow one for their task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from lhopt_fused.meta.baselines import SCHEDULES, Schedule
from lhopt_fused.meta.episode import EpisodeBatch
from lhopt_fused.meta.learner import within_reach
from lhopt_fused.meta.setting import outer_boundaries
from lhopt_fused.types import HYPERPARAMETERS

__all__ = [
    "CONTROL_RATES",
    "CONTROL_SCHEDULES",
    "HandControl",
    "control_grid",
    "demonstrate",
]

CONTROL_RATES: Final = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Learning rates among which the hand control is searched."""

_STILL: Final = 1e-3


def _stopping(share: float) -> Schedule:
    return lambda progress: max(1.0 - progress / share, _STILL)


CONTROL_SCHEDULES: Final[Mapping[str, Schedule]] = {
    **SCHEDULES,
    "quarter": _stopping(1 / 4),
    "sixteenth": _stopping(1 / 16),
}
"""Schedules among which it is searched: those of the baselines, and two that fall to almost nothing
in the first part of the run, as suits tasks that overfit."""

_LR: Final = HYPERPARAMETERS.index("lr")


@dataclass(frozen=True)
class HandControl:
    """A fixed schedule of the learning rate, all else as LHOPT starts.

    Attributes:
        lr: its peak.
        schedule: one of :data:`CONTROL_SCHEDULES`, by name.
    """

    lr: float
    schedule: str

    def learning_rate(self, progress: float) -> float:
        """The learning rate at ``progress``, 0 to 1."""
        return self.lr * CONTROL_SCHEDULES[self.schedule](progress)

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"lr": self.lr, "schedule": self.schedule}


def control_grid() -> list[HandControl]:
    """All that the hand control is chosen from."""
    return [HandControl(lr, schedule) for lr in CONTROL_RATES for schedule in CONTROL_SCHEDULES]


def _teacher_rates(weights: torch.Tensor, progress: float) -> torch.Tensor:
    """Log learning rate ``[R]`` of teachers ``[R, C]`` at ``progress``: the mean over schedules."""
    rates = [control.learning_rate(progress) for control in control_grid()]
    return weights @ weights.new_tensor(rates).log()


@torch.no_grad()
def demonstrate(
    batch: EpisodeBatch, weights: torch.Tensor, wander: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run episodes under their teachers, pushed off their paths by noise.

    Args:
        batch: fresh.
        weights: float64 ``[R, C]``, what the teacher of each run makes of each of
            :func:`control_grid`; see :func:`~lhopt_fused.meta.teacher.teacher_weights`.
        wander: standard deviation of the noise on each log learning rate.

    Returns:
        What the policy would have seen, float32 ``[R, D, F]``, and the decisions that bring the
        run to its teacher's learning rate in the coming outer step as far as one decision can,
        float32 ``[R, D, 8]``.
    """
    generator = torch.Generator().manual_seed(batch.setting.seed % 2**62)
    ends = outer_boundaries(batch.setting.total_steps, batch.setting.outer_steps)
    features, targets = [], []
    device = batch.inner.scalars.device
    register = torch.zeros(batch.setting.runs, dtype=torch.int64, device=device)
    seen = batch.advance()
    while not batch.done:
        middle = (ends[batch.outer_step - 1] + ends[batch.outer_step]) / 2
        wanted = _teacher_rates(weights, middle / batch.setting.total_steps)
        shifts = torch.zeros_like(batch.inner.hyperparameters)
        shifts[:, _LR] = wanted - batch.inner.hyperparameters[:, _LR].log()
        shifts = within_reach(shifts, batch.space)
        features.append(seen.features)
        targets.append(shifts.float())
        noise = torch.randn(len(shifts), generator=generator, dtype=torch.float64)
        moved = shifts.clone()
        moved[:, _LR] += wander * noise.to(device)
        batch.act(moved, register)
        seen = batch.advance()
    return torch.stack(features, dim=1), torch.stack(targets, dim=1)
