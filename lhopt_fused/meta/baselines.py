"""Baselines: how far AdamW gets on the tasks of an episode, against inner steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, get_args

import torch

from lhopt_fused.kernels import BackendName
from lhopt_fused.meta.inner import InnerRuns, Settings, adamw_settings
from lhopt_fused.meta.reward import sample_points
from lhopt_fused.meta.tasks import Split, TaskBatch
from lhopt_fused.schedules import DEFAULT_OF_GRID, GRID, SCHEDULES, Schedule

__all__ = [
    "DEFAULT_OF_GRID",
    "GRID",
    "SCHEDULES",
    "Baseline",
    "Curves",
    "Schedule",
    "adamw_grid",
    "curves",
    "final_losses",
]

Baseline = Literal["adamw", "tuned"]
"""``adamw`` is torch's default, 1e-3 all along; ``tuned`` the best of a small grid of learning
rates, each falling linearly to 0 over its budget, at several budgets."""

_TUNED_RATES: Final = (1e-3, 4e-3, 1.6e-2)
_TUNED_BUDGETS: Final = (1 / 3, 2 / 3, 4 / 3)


class Curves(NamedTuple):
    """Report loss of a baseline against inner steps.

    Attributes:
        steps: float64 ``[P]``, 0 at first.
        losses: float64 ``[R, P]``; the first is that of the random start.
    """

    steps: torch.Tensor
    losses: torch.Tensor


def curves(
    tasks: TaskBatch, total_steps: int, baseline: Baseline, backend: BackendName = "auto"
) -> Curves:
    """The baseline on each of R tasks.

    Args:
        tasks: R of them.
        total_steps: of the episode; a baseline goes beyond.
        baseline: which.
        backend: of the inner steps.

    Raises:
        ValueError: there is no such baseline.
    """
    if baseline == "adamw":
        return _constant(tasks, total_steps, backend)
    if baseline == "tuned":
        return _tuned(tasks, total_steps, backend)
    raise ValueError(f"baseline is {baseline!r}, expected one of {', '.join(get_args(Baseline))}")


def _constant(tasks: TaskBatch, total_steps: int, backend: BackendName) -> Curves:
    points = sample_points(total_steps)
    runs = InnerRuns(tasks, adamw_settings(), backend=backend)
    losses = [runs.loss("report")]
    for point in points:
        runs.advance(point - runs.step)
        losses.append(runs.loss("report"))
    return _curves(points, losses)


def _tuned(tasks: TaskBatch, total_steps: int, backend: BackendName) -> Curves:
    settings = [adamw_settings(lr=rate) for rate in _TUNED_RATES]
    schedules = [SCHEDULES["linear"]] * len(settings)
    budgets = sorted({max(1, round(share * total_steps)) for share in _TUNED_BUDGETS})
    start = InnerRuns(tasks, settings[0], backend=backend).loss("report")
    losses = [start]
    for budget in budgets:
        found = final_losses(tasks, settings, schedules, budget, backend)
        losses.append(found.nan_to_num(nan=torch.inf).amin(0))
    return _curves(budgets, losses)


def _curves(points: Sequence[int], losses: Sequence[torch.Tensor]) -> Curves:
    """Losses ``[R]`` at the start and at each of the points, on their device."""
    steps = losses[0].new_tensor([0, *points], dtype=torch.float64)
    return Curves(steps, torch.stack(list(losses), dim=-1))


def final_losses(
    tasks: TaskBatch,
    settings: Sequence[Settings],
    schedules: Sequence[Schedule],
    total_steps: int,
    backend: BackendName = "auto",
    split: Split = "report",
) -> torch.Tensor:
    """Held-out losses at the end of runs under fixed schedules, all in one batch.

    Args:
        tasks: R of them.
        settings: S of them, each run on every task.
        schedules: of the learning rate, one for each of the settings.
        total_steps: inner steps of each run.
        backend: of the inner steps.
        split: of the held-out data.

    Returns:
        float64 ``[S, R]``.
    """
    count = len(settings)
    repeated = tasks.select(torch.arange(tasks.runs, device=tasks.device).repeat(count))
    per_run = [setting for setting in settings for _ in range(tasks.runs)]
    runs = InnerRuns(repeated, per_run, backend=backend)
    peaks = runs.hyperparameters[:, 0].clone()
    for step in range(total_steps):
        shares = [schedule(step / total_steps) for schedule in schedules]
        factors = peaks.new_tensor(shares).repeat_interleave(tasks.runs)
        runs.advance(1, (peaks * factors)[None])
    return runs.loss(split).view(count, tasks.runs)


def adamw_grid() -> tuple[list[Settings], list[Schedule]]:
    """The 35 configurations of AdamW: five learning rates under seven schedules."""
    pairs = [(rate, schedule) for rate in GRID for schedule in SCHEDULES.values()]
    return [adamw_settings(lr=rate) for rate, _ in pairs], [schedule for _, schedule in pairs]
