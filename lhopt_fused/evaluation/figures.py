"""The pictures of an evaluation: each task, performance profiles, and what policies did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lhopt_fused.demo.figure import save_figure
from lhopt_fused.evaluation.statistics import performance_profile
from lhopt_fused.evaluation.store import Row
from lhopt_fused.evaluation.summary import DEFAULT, TUNED, TaskSummary, times_to_target
from lhopt_fused.types import HYPERPARAMETERS

__all__ = ["draw_profiles", "draw_task", "draw_trajectories"]

_COLORS: Final = ("#7f7f7f", "#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#d55e00", "#009e73")
_MORE: Final = ("#7a4ba0", "#a0522d", "#000000")
_TAUS: Final = tuple(np.linspace(1.0, 4.0, 121).tolist())


def _color(label: str, labels: Sequence[str]) -> str:
    known = [*_COLORS, *_MORE]
    return known[labels.index(label) % len(known)]


def draw_task(path: Path, summary: TaskSummary, labels: Sequence[str]) -> None:
    """Learning curves of the best configurations, and AdamW's loss against budget.

    Args:
        path: of the PNG.
        summary: of the task.
        labels: all optimizers of the report, for their colours.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    curves, budgets = figure.subplots(1, 2)
    figure.suptitle(f"{summary.task}, {summary.size}", fontsize=12)
    for label, rows in summary.best.items():
        _draw_curve(curves, rows, label, _color(label, labels))
    curves.set(xlabel="share of the run", ylabel="loss on the split that policies see")
    _limit(curves)
    curves.legend(frameon=False, fontsize=8)
    for which, label in (("default", DEFAULT), ("tuned", TUNED)):
        if label in labels:
            _draw_budgets(budgets, summary, which, _color(label, labels))
    for entry in summary.entries:
        if entry.speedup["tuned"] is not None:
            losses = [loss for loss in entry.losses if math.isfinite(loss)]
            place = 1.0 + 0.03 * (labels.index(entry.label) - len(labels) / 2)
            color = _color(entry.label, labels)
            budgets.scatter([place] * len(losses), losses, s=16, color=color, zorder=3)
    budgets.set(xlabel="budget", ylabel="final loss on the report split", xscale="log")
    budgets.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    budgets.minorticks_off()
    budgets.set_title("AdamW (lines) and the others at budget 1 (dots)", fontsize=9)
    save_figure(figure, path)


def _draw_curve(ax: Axes, rows: Sequence[Row], label: str, color: str) -> None:
    """The mean over seeds, which share their steps unless a run diverged."""
    longest = max(len(row.result.curve) for row in rows)
    kept = [row.result.curve for row in rows if len(row.result.curve) == longest]
    steps = np.array([point.step for point in kept[0]], dtype=np.float64)
    losses = np.array([[point.eval_loss for point in curve] for curve in kept]).mean(0)
    final = float(np.mean([row.result.report_loss for row in rows]))
    name = f"{label}  ({final:.4g} on the report split)"
    ax.plot(steps / max(1.0, steps[-1]), losses, color=color, linewidth=1.6, label=name)


def _draw_budgets(ax: Axes, summary: TaskSummary, which: str, color: str) -> None:
    budgets, losses = summary.baseline(which)
    table = np.array(losses, dtype=np.float64).reshape(-1, len(budgets))
    if len(budgets) > 1:
        middle = table.mean(0)
        ax.plot(budgets, middle, color=color, marker="o", markersize=4, label=f"{which} AdamW")
        ax.fill_between(budgets, table.min(0), table.max(0), color=color, alpha=0.2, linewidth=0)


def _limit(ax: Axes) -> None:
    """Leave out what is far above most: starts and runs that diverge."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines])
    finite = values[np.isfinite(values)]
    if len(finite):
        low, high = finite.min(), np.quantile(finite, 0.95)
        pad = 0.05 * (high - low) or 1.0
        ax.set_ylim(low - pad, high + pad)


def draw_profiles(path: Path, found: Sequence[TaskSummary], labels: Sequence[str]) -> None:
    """Share of tasks on which each optimizer is within tau of the fastest."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    ax = figure.subplots()
    times = times_to_target(found)
    profiles: Mapping[str, np.ndarray] = performance_profile(times, _TAUS) if times else {}
    for label, heights in profiles.items():
        ax.step(_TAUS, heights, where="post", label=label, color=_color(label, labels))
    ax.set(
        xlabel="tau: times as many steps as the fastest to AdamW's median loss",
        ylabel="share of tasks",
        ylim=(-0.02, 1.02),
    )
    if profiles:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_trajectories(path: Path, found: Sequence[TaskSummary]) -> bool:
    """Hyperparameters relative to their start, of each policy on each task; whether there are any.

    Of the seeds, the first is shown.
    """
    shown = [
        (f"{summary.task}\n{label}", rows[0].result.trajectory)
        for summary in found
        for label, rows in summary.best.items()
        if rows[0].result.trajectory
    ]
    if not shown:
        return False
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for ax, (title, trajectory) in zip(axes.flat, shown, strict=False):
        table = np.array(trajectory, dtype=np.float64)
        for index, name in enumerate(HYPERPARAMETERS, 1):
            ratios = table[:, index] / table[0, index]
            ax.plot(table[:, 0], ratios, label=name, color=(*_COLORS, *_MORE)[index])
        ax.set_yscale("log")
        ax.set_title(title, fontsize=9)
    for ax in list(axes.flat)[len(shown) :]:
        ax.set_axis_off()
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save_figure(figure, path)
    return True
