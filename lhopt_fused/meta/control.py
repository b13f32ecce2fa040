"""The hand control: the inner optimizer under the one fixed schedule that is best on the training
tasks, which a policy has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lhopt_fused.meta.baselines import SCHEDULES, Schedule

__all__ = [
    "CONTROL_RATES",
    "CONTROL_SCHEDULES",
    "HandControl",
    "control_grid",
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
