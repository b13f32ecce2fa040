"""The picture of a meta-training run: its learning curve, and what its policy does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from lhopt_fused.demo.figure import save_figure
from lhopt_fused.meta.control import HandControl
from lhopt_fused.meta.display import Played
from lhopt_fused.meta.setting import Setting, outer_boundaries
from lhopt_fused.types import HYPERPARAMETERS

if TYPE_CHECKING:
    from lhopt_fused.meta.ablate import Interval

__all__ = ["draw_ablations", "draw_training", "read_log"]

Row = Mapping[str, float]

_WINS: Final = {
    "validation_beats_default": ("AdamW at 1e-3, constant", "#999999"),
    "validation_beats_tuned": ("tuned AdamW", "#d55e00"),
    "validation_beats_control": ("the hand control", "#0072b2"),
}
_COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4ba0")
_LR: Final = HYPERPARAMETERS.index("lr")
_SETTINGS_DRAWN: Final = 5
_SMOOTHED: Final = 20  # updates


def read_log(path: Path) -> list[Row]:
    """The updates in a run's log, oldest first; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw_training(
    path: Path,
    rows: Sequence[Row],
    played: Played,
    control: HandControl,
    start: Mapping[str, float],
    *,
    title: str,
) -> None:
    """Write a PNG of a run.

    Args:
        path: of the picture.
        rows: as :func:`read_log` gives them.
        played: what the policy did in its last validation; may be empty.
        control: the hand control, to draw beside it.
        start: hyperparameters that runs start with.
        title: above it.
    """
    figure = Figure(figsize=(15, 8.6), layout="constrained")
    axes = figure.subplot_mosaic([["reward", "entropy", "wins"], ["lr", "lr", "others"]])
    figure.suptitle(title, fontsize=12, parse_math=False)
    _draw_rewards(axes["reward"], rows)
    _draw_lines(axes["entropy"], rows, {"entropy": ("of all heads together", _COLORS[0])})
    axes["entropy"].set(title="Entropy of the policy", ylabel="nats")
    axes["entropy"].ticklabel_format(useOffset=False)
    _draw_lines(axes["wins"], rows, _WINS)
    axes["wins"].axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes["wins"].set(title="Share of new tasks that end below ...", ylim=(-0.03, 1.03))
    axes["wins"].yaxis.set_major_formatter(PercentFormatter(1.0))
    for name in ("reward", "entropy", "wins"):
        axes[name].set_xlabel("episodes")
        axes[name].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _draw_learning_rates(axes["lr"], _spread(played), control, start)
    _draw_others(axes["others"], played, start)
    for name in ("lr", "others"):
        axes[name].set(xlabel="progress of the run", ylabel="multiple of its start", yscale="log")
        axes[name].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes[name].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"\u00d7{value:g}"))
        axes[name].yaxis.set_minor_formatter(NullFormatter())
        if not played:
            _say(axes[name], "no validation yet")
    save_figure(figure, path)


def draw_ablations(path: Path, panels: Mapping[str, Mapping[str, Interval]]) -> None:
    """What ablations did, side by side: for each title, a mean with its interval by their names.

    A panel may leave names out; the first has all of them."""
    names = list(next(iter(panels.values())))
    figure = Figure(
        figsize=(5.5 * len(panels) + 2.0, 0.35 * len(names) + 1.5), layout="constrained"
    )
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, intervals) in zip(axes, panels.items(), strict=True):
        for name, (mean, low, high) in intervals.items():
            sides = [[mean - low], [high - mean]]
            ax.errorbar(mean, names.index(name), xerr=sides, fmt="o", capsize=3, color="C0")
        ax.axvline(0.0, color="grey", linewidth=0.8)
        ax.grid(axis="x", alpha=0.3)
        ax.set_xlabel(title)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    save_figure(figure, path)


def _series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Episodes, and the finite values of a column there."""
    points = [
        (row["episodes"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))
    ]
    return [x for x, _ in points], [y for _, y in points]


def _draw_lines(
    ax: Axes, rows: Sequence[Row], columns: Mapping[str, tuple[str, str]], **style: Any
) -> None:
    looks: dict[str, Any] = {"linewidth": 1.6, "marker": ".", "markersize": 4} | style
    for name, (label, color) in columns.items():
        episodes, values = _series(rows, name)
        if episodes:
            ax.plot(episodes, values, label=label, color=color, **looks)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, fontsize=8)
    else:
        _say(ax, "nothing yet")


def _draw_rewards(ax: Axes, rows: Sequence[Row]) -> None:
    episodes, rewards = _series(rows, "reward")
    ax.plot(episodes, rewards, color="#b8b8b8", linewidth=0.7)
    window = min(_SMOOTHED, len(rewards))
    if window:
        smooth = np.convolve(rewards, np.ones(window) / window, "valid")
        label = f"training tasks, mean of {window} updates"
        ax.plot(episodes[window - 1 :], smooth, color="#666666", linewidth=1.6, label=label)
    columns = {
        "validation_reward": ("new tasks, without noise", _COLORS[0]),
        "validation_control_reward": ("the hand control there", _COLORS[1]),
    }
    _draw_lines(ax, rows, columns)
    ax.set(title="Reward: log speed-up over the baseline", ylabel="reward")


def _spread(played: Played) -> Played:
    """A few settings, from the shortest runs to the longest."""
    ordered = sorted(played, key=lambda play: play[0].outer_steps)
    count = min(_SETTINGS_DRAWN, len(ordered))
    places = np.linspace(0, max(0, len(ordered) - 1), count).round().astype(int)
    return [ordered[place] for place in places]


def _edges(setting: Setting) -> NDArray[np.float64]:
    """Progress at the edges of the outer steps."""
    ends = outer_boundaries(setting.total_steps, setting.outer_steps)
    return np.array([0, *ends]) / setting.total_steps


def _in_use(hyperparameters: NDArray[np.float64], index: int, start: float) -> NDArray[np.float64]:
    """A hyperparameter in each outer step as a multiple of its start, ``[R, D + 1]``."""
    first = np.ones((len(hyperparameters), 1))
    return np.concatenate([first, hyperparameters[..., index] / start], axis=1)


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the runs, in the logarithm."""
    median: NDArray[np.float64] = np.exp(np.median(np.log(values), axis=0))
    return median


def _draw_learning_rates(
    ax: Axes, played: Played, control: HandControl, start: Mapping[str, float]
) -> None:
    for (setting, hyperparameters), color in zip(played, _COLORS, strict=False):
        values = _in_use(hyperparameters, _LR, start["lr"])
        edges = _edges(setting)
        for row in values:
            ax.stairs(row, edges, baseline=None, color=color, linewidth=0.5, alpha=0.4)
        inner_steps = setting.total_steps // setting.outer_steps
        label = f"{setting.family}, {setting.outer_steps} x {inner_steps}"
        ax.stairs(_median(values), edges, baseline=None, color=color, linewidth=2.0, label=label)
    if played:
        progress = np.linspace(0.0, 0.995, 200)
        rates = [control.learning_rate(x) / start["lr"] for x in progress]
        label = f"hand control: {control.lr:g}, {control.schedule.replace('_', ' ')}"
        ax.plot(progress, rates, color="black", linewidth=1.4, linestyle="--", label=label)
        ax.legend(frameon=False, fontsize=8)
    ax.set_title("Learning rate on new tasks (family, outer x inner steps; thick: median)")


def _draw_others(ax: Axes, played: Played, start: Mapping[str, float]) -> None:
    """The median of every other hyperparameter over all settings."""
    ax.set_title("The other hyperparameters: median over all settings")
    progress = np.linspace(0.0, 0.999, 120)
    names = [name for name in HYPERPARAMETERS if name != "lr"]
    for name, color in zip(names, _COLORS, strict=True):
        index = HYPERPARAMETERS.index(name)
        rows = []
        for setting, hyperparameters in played:
            values = _in_use(hyperparameters, index, start[name])
            rows.append(values[:, np.searchsorted(_edges(setting), progress, side="right") - 1])
        if rows:
            median = _median(np.concatenate(rows))
            ax.plot(progress, median, color=color, linewidth=1.6, label=name)
    if played:
        ax.legend(frameon=False, fontsize=8)


def _say(ax: Axes, message: str) -> None:
    ax.annotate(message, (0.5, 0.5), xycoords="axes fraction", ha="center", color="grey")
