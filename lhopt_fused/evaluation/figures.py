"""The pictures of an evaluation: each task, performance profiles, sizes, and what policies did."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lhopt_fused.demo.figure import save_figure
from lhopt_fused.evaluation.rows import Row
from lhopt_fused.evaluation.statistics import performance_profile
from lhopt_fused.evaluation.summary import DEFAULT, TUNED, TaskSummary, times_to_target
from lhopt_fused.types import HYPERPARAMETERS

__all__ = ["budget_picture", "curve_picture", "profile_picture", "size_picture", "trajectories"]

_COLORS: Final = (
    *("#7f7f7f", "#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#d55e00", "#009e73"),
    *("#7a4ba0", "#a0522d", "#000000"),
)
_TAUS: Final = tuple(np.linspace(1.0, 4.0, 121).tolist())
_SHADES: Final = 64  # of lines and their edges; a page holds many pictures
_SIZE: Final = (5.2, 4.4)  # inches; readable where the picture is as wide as a phone


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    """The picture, with the names of what is in it below."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = 2 if max(map(len, names), default=0) > 16 else 4
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    drawn, small = io.BytesIO(), io.BytesIO()
    save_figure(figure, drawn)
    Image.open(drawn).convert("RGB").quantize(_SHADES).save(small, format="png", optimize=True)
    return small.getvalue()


def _color(label: str, labels: Sequence[str]) -> str:
    return _COLORS[labels.index(label) % len(_COLORS)]


def curve_picture(summary: TaskSummary, labels: Sequence[str], *, clock: bool) -> bytes:
    """Learning curves of each optimizer's best configuration, means over seeds.

    Args:
        summary: of the task.
        labels: all optimizers of the report, for their colours.
        clock: against seconds of training, else steps.
    """
    figure, ax = _panel()
    for label, rows in summary.best.items():
        _draw_curve(ax, rows, label, _color(label, labels), clock)
    over = "seconds of training" if clock else "steps"
    ax.set(xlabel=over, ylabel="loss on the split that policies see")
    _limit(ax)
    return _png(figure)


def _draw_curve(ax: Axes, rows: Sequence[Row], label: str, color: str, clock: bool) -> None:
    """The mean over seeds, which share their steps unless a run diverged."""
    longest = max(len(row.result.curve) for row in rows)
    kept = [row.result.curve for row in rows if len(row.result.curve) == longest]
    across = np.array([[p.seconds if clock else p.step for p in curve] for curve in kept]).mean(0)
    losses = np.array([[point.eval_loss for point in curve] for curve in kept]).mean(0)
    ax.plot(across, losses, color=color, linewidth=1.6, label=label)


def _limit(ax: Axes) -> None:
    """Leave out what is far above most: starts and runs that diverge."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines])
    finite = values[np.isfinite(values)]
    if len(finite):
        low, high = finite.min(), np.quantile(finite, 0.95)
        pad = 0.05 * (high - low) or 1.0
        ax.set_ylim(low - pad, high + pad)


def budget_picture(summary: TaskSummary, labels: Sequence[str]) -> bytes:
    """AdamW's final loss against its budget, and where the others end at budget 1."""
    figure, ax = _panel()
    for which, label in (("default", DEFAULT), ("tuned", TUNED)):
        if label in labels:
            _draw_budgets(ax, summary, which, label, _color(label, labels))
    for entry in summary.entries:
        if entry.speedup["tuned"] is not None:
            losses = [loss for loss in entry.losses if math.isfinite(loss)]
            place = 1.0 + 0.03 * (labels.index(entry.label) - len(labels) / 2)
            color = _color(entry.label, labels)
            places = [place] * len(losses)
            ax.scatter(places, losses, s=16, color=color, zorder=3, label=entry.label)
    ax.set(xlabel="budget", ylabel="final loss on the report split", xscale="log")
    ax.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    ax.minorticks_off()
    return _png(figure)


def _draw_budgets(ax: Axes, summary: TaskSummary, which: str, label: str, color: str) -> None:
    """A line through the means over seeds, in a band from the lowest to the highest."""
    budgets, losses = summary.baseline(which)
    table = np.array(losses, dtype=np.float64).reshape(-1, len(budgets))
    if len(budgets) > 1:
        ax.plot(budgets, table.mean(0), color=color, marker="o", markersize=4, label=label)
        ax.fill_between(budgets, table.min(0), table.max(0), color=color, alpha=0.2, linewidth=0)


def profile_picture(found: Sequence[TaskSummary], labels: Sequence[str], *, clock: bool) -> bytes:
    """Share of tasks on which each optimizer is within tau of the fastest; some target is known."""
    figure, ax = _panel()
    for label, heights in performance_profile(times_to_target(found, clock), _TAUS).items():
        ax.step(_TAUS, heights, where="post", label=label, color=_color(label, labels))
    unit = "seconds" if clock else "steps"
    ax.set(
        xlabel=f"{unit} to AdamW's median loss, over those of the fastest (tau)",
        ylabel="share of tasks",
        ylim=(-0.02, 1.02),
    )
    return _png(figure)


def size_picture(
    found: Sequence[TaskSummary], family: Sequence[str], labels: Sequence[str]
) -> bytes | None:
    """Speed-up over tuned AdamW against the size of the model.

    Args:
        found: tasks; each is a dot.
        family: tasks that differ in the width of their model alone; a line goes through them.
        labels: all optimizers of the report; of these, our inner optimizer and LHOPT are shown.

    Returns:
        None where no speed-up is known.
    """
    figure, ax = _panel()
    shown = [label for label in labels if label.startswith(("CIAO", "LHOPT"))]
    for label in shown:
        dots = _sizes(found, label)
        line = _sizes([summary for summary in found if summary.task in family], label)
        color = _color(label, labels)
        if dots:
            sizes, speedups = zip(*dots, strict=True)
            ax.scatter(sizes, speedups, s=18, alpha=0.5, color=color, label=label)
        if len(line) > 1:
            ax.plot(*zip(*line, strict=True), color=color, marker="o")
    if not ax.collections:
        return None
    ax.axhline(1.0, color="black", linewidth=0.8, linestyle=":", zorder=0)
    ax.set(xlabel="parameters of the model", ylabel="speed-up over tuned AdamW", xscale="log")
    return _png(figure)


def _sizes(found: Sequence[TaskSummary], label: str) -> list[tuple[int, float]]:
    """Parameters and speed-up on each task, the smallest first."""
    return sorted(
        (summary.parameters, speedup.value)
        for summary in found
        for entry in summary.entries
        if entry.label == label and (speedup := entry.speedup["tuned"]) is not None
    )


def trajectories(summary: TaskSummary) -> list[tuple[str, bytes]]:
    """Label and picture of each policy: hyperparameters relative to their first, of one seed."""
    found = []
    for entry in summary.policies:
        steps = np.array(entry.rows[0].result.trajectory, dtype=np.float64)
        if len(steps) == 0:
            continue
        figure, ax = _panel()
        for index, name in enumerate(HYPERPARAMETERS, 1):
            ax.plot(
                steps[:, 0], steps[:, index] / steps[0, index], label=name, color=_COLORS[index]
            )
        ax.set(xlabel="share of the run", ylabel="times its first value", yscale="log")
        found.append((entry.label, _png(figure)))
    return found
