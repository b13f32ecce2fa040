"""Fixed schedules of the learning rate, and the grid of AdamW configurations made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

__all__ = ["DEFAULT_OF_GRID", "GRID", "SCHEDULES", "Schedule"]

Schedule = Callable[[float], float]

SCHEDULES: Final[dict[str, Schedule]] = {
    "constant": lambda progress: 1.0,
    "multi_step": lambda progress: 0.1 ** ((progress >= 0.5) + (progress >= 0.75)),
    "linear": lambda progress: 1.0 - progress,
    "quadratic": lambda progress: (1.0 - progress) ** 2,
    "exponential": lambda progress: 0.01**progress,
    "cosine": lambda progress: 0.5 * (1.0 + _cos_pi(progress)),
    "cosine_to_tenth": lambda progress: 0.1 + 0.45 * (1.0 + _cos_pi(progress)),
}
"""Learning rate schedules by name: the share of the peak against progress, 0 to 1."""

GRID: Final = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates of the baselines: with each of :data:`SCHEDULES`, 35 configurations."""

DEFAULT_OF_GRID: Final = GRID.index(1e-3) * len(SCHEDULES) + list(SCHEDULES).index("constant")
"""Where torch's default, 1e-3 all along, stands among the configurations of the grid."""


def _cos_pi(progress: float) -> float:
    return float(torch.tensor(progress * torch.pi, dtype=torch.float64).cos())
