"""The picture of one LHOPT run: what its policy saw, and where it moved the hyperparameters."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from lhopt_fused.actions import DEFAULT_ACTION_SPACE
from lhopt_fused.demo.figure import FEATURE_LABELS, save_figure
from lhopt_fused.history import OuterStep
from lhopt_fused.types import HYPERPARAMETERS

__all__ = ["draw_history"]

_COLORS: Final = {
    "lr": "#0072b2",
    "ombeta1": "#d55e00",
    "ombeta2": "#e69f00",
    "epsilon": "#56b4e9",
    "weight_decay": "#009e73",
    "group_clip_grad_norm": "#cc79a7",
    "grad_clip_ombeta": "#7a4ba0",
    "lamb_update_norm_ombeta": "#666666",
}


def draw_history(path: Path, history: Sequence[OuterStep], *, title: str) -> None:
    """Write a PNG of ``history`` to ``path``: losses, hyperparameters and some inner features.

    Raises:
        ValueError: there is no outer step to draw.
    """
    if not history:
        raise ValueError("the history holds no outer step")
    features = list(FEATURE_LABELS)
    rows = [["loss"] * 3 + ["moves"] * 3] * 2
    rows += [[name for name in features[i : i + 3] for _ in range(2)] for i in (0, 3)]
    figure = Figure(figsize=(13, 9.4), layout="constrained")
    axes = figure.subplot_mosaic([[str(name) for name in row] for row in rows], sharex=True)
    figure.suptitle(title, fontsize=12, parse_math=False)
    _draw_losses(axes["loss"], history)
    _draw_moves(axes["moves"], history)
    for name in features:
        if not _draw_line(axes[name], history, partial(_feature, name)):
            _say(axes[name], "not measured")
        _fit_after_first(axes[name])
        axes[name].set_title(FEATURE_LABELS[name], fontsize=9)
    for ax in axes.values():
        ax.margins(x=0.01)
        ax.tick_params(labelbottom=True)
    for ax in (axes["loss"], axes["moves"], *(axes[name] for name in features[3:])):
        ax.set_xlabel("inner step")
    save_figure(figure, path)


def _feature(name: str, step: OuterStep) -> float:
    return step.features.get(name, math.nan)


def _draw_losses(ax: Axes, history: Sequence[OuterStep]) -> None:
    ax.set(ylabel="loss", title="Loss: mean over each outer step")
    drawn = [
        _draw_line(ax, history, lambda step: step.train_loss, label="train"),
        _draw_line(ax, history, _eval_loss, label="eval", color="#d55e00"),
    ]
    if any(drawn):
        ax.legend(frameon=False, loc="upper right")
    else:
        _say(ax, "no losses were observed")


def _eval_loss(step: OuterStep) -> float:
    return math.nan if step.eval_loss is None else step.eval_loss


def _draw_moves(ax: Axes, history: Sequence[OuterStep]) -> None:
    """Each hyperparameter while it was in use, which it is not any more after the last decision."""
    ax.set(
        title="Hyperparameters as a multiple of their start",
        ylabel="multiple (log scale)",
        yscale="log",
    )
    edges = [0, *(step.inner_step for step in history)]
    resting = []
    for name, color in _COLORS.items():
        shares = _shares_of_start(name, history)
        if all(share == 1 for share in shares):
            resting.append(name)
        elif all(map(math.isfinite, shares)):
            ax.stairs(shares, edges, baseline=None, label=name, color=color, linewidth=1.8)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"\u00d7{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    if len(resting) == len(_COLORS):
        ax.set_ylim(0.1, 10)
        _say(ax, "the policy left all of them where they started")
    elif resting:
        lines = textwrap.wrap(f"left at their start: {', '.join(resting)}", 60)
        ax.plot([], [], " ", label="\n".join(lines))
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, loc="best", fontsize=8)


def _shares_of_start(name: str, history: Sequence[OuterStep]) -> list[float]:
    """The hyperparameter over its start, in each outer step, before the decision at its end."""
    first = history[0]
    action = DEFAULT_ACTION_SPACE.actions[HYPERPARAMETERS.index(name)]
    after, shift = first.hyperparameters.get(name, math.nan), first.shifts.get(name, 0.0)
    start = after / math.exp(shift)
    if shift and action.kind == "logit" and 0 < after < 1:
        start = 1 / (1 + (1 - after) / after * math.exp(shift))
    if not start > 0:  # 0 or missing: nothing to be relative to
        return [1.0] * len(history)
    return [1.0, *(s.hyperparameters.get(name, math.nan) / start for s in history[:-1])]


def _draw_line(
    ax: Axes, history: Sequence[OuterStep], value: Callable[[OuterStep], float], **style: Any
) -> bool:
    """A line through the finite values, with a dot on each; False if there are none."""
    values = [(step.inner_step, value(step)) for step in history]
    points = [point for point in values if math.isfinite(point[1])]
    if points:
        looks: dict[str, Any] = {
            "color": "#0072b2",
            "linewidth": 1.4,
            "marker": ".",
            "markersize": 4,
        } | style
        ax.plot(*zip(*points, strict=True), **looks)
    return bool(points)


def _fit_after_first(ax: Axes) -> None:
    """Let the first outer step run off the panel where it would flatten all that follows."""
    for line in ax.lines:
        values = np.asarray(line.get_ydata(), float)
        if len(values) < 5:
            continue
        low, high = float(values[1:].min()), float(values[1:].max())
        room = 0.08 * (high - low) or 0.1
        ax.set_ylim(low - room, high + room)


def _say(ax: Axes, message: str) -> None:
    ax.annotate(message, (0.5, 0.5), xycoords="axes fraction", ha="center", color="grey")
