"""The picture of one or more runs: losses, step times and inner features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lhopt_fused.demo.record import Row, Summary, series

__all__ = ["FEATURE_LABELS", "draw_runs", "save_figure"]

_STYLES: Final[dict[str, dict[str, Any]]] = {
    "torch AdamW": {"color": "#b8b8b8", "linewidth": 4.0, "zorder": 1},
    "AdamW": {"color": "#0072b2", "linewidth": 1.6, "zorder": 3},
    "CIAO.lhopt": {"color": "#d55e00", "linewidth": 1.6, "zorder": 2},
    "LHOPT": {"color": "#009e73", "linewidth": 1.6, "zorder": 4},
}

FEATURE_LABELS: Final = {
    "log_adam_update_norm_over_param_norm": "log (update norm / parameter norm)",
    "log_noise_scale": "log noise scale",
    "cosine_similarity_grad_momentum": "cosine of gradient and momentum",
    "mean_log_abs_adam_pre_lr_update": "mean log |update| before lr",
    "did_grad_clip": "share of steps that were clipped",
    "sqrt_v_hat_gt_epsilon": "share of elements above epsilon",
}
"""The inner features that say most to the eye, and how a picture calls them."""

_RUN_FEATURES: Final = tuple(FEATURE_LABELS)[:4]


def draw_runs(
    path: Path, runs: Mapping[str, Sequence[Row]], *, title: str, unigram_entropy: float
) -> None:
    """Write a PNG of ``runs`` (name of the optimizer -> rows) to ``path``."""
    measured = {name: rows for name, rows in runs.items() if series(rows, "log_noise_scale")[0]}
    top = ["loss", "loss", "loss", "time"]
    layout = [top, top, list(_RUN_FEATURES)] if measured else [top]
    figure = Figure(figsize=(13, 7.6 if measured else 4.6), layout="constrained")
    axes = figure.subplot_mosaic([[str(name) for name in row] for row in layout])
    figure.suptitle(title, fontsize=12, parse_math=False)
    _draw_losses(axes["loss"], runs, unigram_entropy)
    _draw_times(axes["time"], runs)
    if measured:
        for feature in _RUN_FEATURES:
            _draw_feature(axes[feature], measured, feature, FEATURE_LABELS[feature])
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path | BinaryIO) -> None:
    """Write ``figure`` as a PNG, in the look that all of them share."""
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, axis="y" if ax.get_label() == "time" else "both")
    figure.savefig(path, dpi=150, format="png")


def _draw_losses(ax: Axes, runs: Mapping[str, Sequence[Row]], unigram_entropy: float) -> None:
    for name, rows in runs.items():
        style = _STYLES[name]
        ax.plot(*series(rows, "train_loss"), color=style["color"], linewidth=0.8, alpha=0.45)
        final = Summary(rows).eval_loss
        ax.plot(
            *series(rows, "eval_loss"), label=f"{name}  ({final:.3f} held out, at the end)", **style
        )
    ax.axhline(unigram_entropy, color="black", linewidth=0.8, linestyle=":", zorder=0)
    ax.annotate(
        "byte frequencies alone",
        (1, unigram_entropy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    ax.set(
        xlabel="step", ylabel="loss (nats per byte)", title="Loss: held-out (bold), train (thin)"
    )
    ax.margins(x=0.01)
    ax.legend(frameon=False, loc="upper right")


def _draw_times(ax: Axes, runs: Mapping[str, Sequence[Row]]) -> None:
    """How long one optimizer step took: a box per run, its median written above."""
    times = [series(rows, "optimizer_ms")[1] or [math.nan] for rows in runs.values()]
    boxes = ax.boxplot(
        times,
        widths=0.55,
        showfliers=False,
        whis=(5, 95),
        patch_artist=True,
        medianprops={"color": "black"},
    )
    highest = max(max(whisker.get_ydata()) for whisker in boxes["whiskers"])
    parts = zip(runs, boxes["boxes"], boxes["whiskers"][1::2], strict=True)
    for position, (name, box, whisker) in enumerate(parts, start=1):
        box.set(facecolor=_STYLES[name]["color"], alpha=0.8)
        ax.annotate(
            f"{Summary(runs[name]).optimizer_ms:.2f}",
            (position, max(whisker.get_ydata())),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    names = [name.replace(" ", "\n").replace(".", ".\n") for name in runs]
    ax.set_xticks(range(1, len(runs) + 1), names, fontsize=9)
    ax.set_ylim(0, 1.1 * highest if highest > 0 else 1)
    ax.set(ylabel="milliseconds", title="Optimizer step (median above)")


def _draw_feature(ax: Axes, runs: Mapping[str, Sequence[Row]], feature: str, label: str) -> None:
    for name, rows in runs.items():
        settled = rows[2:]  # without step 0 and the first steps, which dwarf all that follows
        ax.plot(*series(settled, feature), **_STYLES[name])
    ax.set(xlabel="step")
    ax.set_title(label, fontsize=9)
