"""The hand control: the inner optimizer under the one fixed schedule that is best on the training
tasks. It is what a policy starts from, and what it has to beat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch

from lhopt_fused.meta.baselines import SCHEDULES
from lhopt_fused.meta.episode import EpisodeBatch
from lhopt_fused.meta.learner import within_reach
from lhopt_fused.meta.setting import Setting, outer_boundaries
from lhopt_fused.types import HYPERPARAMETERS

__all__ = ["CONTROL_RATES", "HandControl", "control_grid", "teacher_shifts"]

CONTROL_RATES: Final = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Learning rates among which the hand control is searched."""

_LR: Final = HYPERPARAMETERS.index("lr")


@dataclass(frozen=True)
class HandControl:
    """A fixed schedule of the learning rate, all else as LHOPT starts.

    Attributes:
        lr: its peak.
        schedule: one of ``baselines.SCHEDULES``, by name.
    """

    lr: float
    schedule: str

    def learning_rate(self, progress: float) -> float:
        """The learning rate at ``progress``, 0 to 1."""
        return self.lr * SCHEDULES[self.schedule](progress)

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"lr": self.lr, "schedule": self.schedule}


def control_grid() -> list[HandControl]:
    """All that the hand control is chosen from."""
    return [HandControl(lr, schedule) for lr in CONTROL_RATES for schedule in SCHEDULES]


def teacher_shifts(
    control: HandControl, setting: Setting, outer_step: int, learning_rates: torch.Tensor
) -> torch.Tensor:
    """Decisions that bring runs to the hand control's learning rate for the coming outer step.

    Args:
        control: the teacher.
        setting: of the runs.
        outer_step: outer steps done, 1 to all but one.
        learning_rates: float64 ``[R]``, now.

    Returns:
        float64 ``[R, 8]``, zero but for the learning rate, for which they may be out of reach.
    """
    ends = outer_boundaries(setting.total_steps, setting.outer_steps)
    middle = (ends[outer_step - 1] + ends[outer_step]) / 2 / setting.total_steps
    shifts = learning_rates.new_zeros(len(learning_rates), len(HYPERPARAMETERS))
    shifts[:, _LR] = math.log(control.learning_rate(middle)) - learning_rates.log()
    return shifts


@torch.no_grad()
def demonstrate(
    batch: EpisodeBatch, control: HandControl, wander: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run episodes under the teacher, pushed off its path by noise.

    Args:
        batch: fresh.
        control: the teacher.
        wander: standard deviation of the noise on each log learning rate.

    Returns:
        What the policy would have seen, float32 ``[R, D, F]``, and what the teacher says there,
        float32 ``[R, D, 8]``.
    """
    generator = torch.Generator().manual_seed(batch.setting.seed % 2**62)
    features, targets = [], []
    device = batch.inner.scalars.device
    register = torch.zeros(batch.setting.runs, dtype=torch.int64, device=device)
    seen = batch.advance()
    while not batch.done:
        rates = batch.inner.hyperparameters[:, _LR]
        shifts = teacher_shifts(control, batch.setting, batch.outer_step, rates)
        shifts = within_reach(shifts, batch.space)
        features.append(seen.features)
        targets.append(shifts.float())
        noise = torch.randn(len(shifts), generator=generator, dtype=torch.float64)
        moved = shifts.clone()
        moved[:, _LR] += wander * noise.to(device)
        batch.act(moved, register)
        seen = batch.advance()
    return torch.stack(features, dim=1), torch.stack(targets, dim=1)
