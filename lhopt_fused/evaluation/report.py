"""The report of an evaluation in Markdown, with its pictures; from the rows of a store alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lhopt_fused.evaluation.figures import draw_profiles, draw_task, draw_trajectories
from lhopt_fused.evaluation.statistics import Interval
from lhopt_fused.evaluation.store import Row
from lhopt_fused.evaluation.summary import (
    Entry,
    Overall,
    TaskSummary,
    overall,
    summaries,
)
from lhopt_fused.evaluation.task import Size

__all__ = ["OVERALL_HEADINGS", "overall_cells", "write_report"]

OVERALL_HEADINGS: Final = (
    *("optimizer", "tasks", "wins: default", "wins: tuned", "wins: median"),
    *("speed-up: tuned", "speed-up: default", "score"),
)
_TASK_HEADINGS: Final = (
    *("optimizer", "loss", "{metric}", "speed-up: tuned", "by the clock"),
    *("speed-up: default", "margin"),
    *("ms a step", "of which optimizer", "configuration", "rows"),
)
_NOTES: Final = """
Wins and speed-ups are against default AdamW, tuned AdamW and the median configuration of AdamW;
over all tasks, shares and medians. Losses are means ± standard deviations over seeds on the report
split, which nobody sees before the end. Of each optimizer the configuration is the best by the
loss on another split, the one that policies see. *Tuned* AdamW is the best of its configurations,
*default* is lr 1e-3 all along, *median* is the median configuration. A speed-up is the budget that
AdamW needs to reach the same loss over the budget of the run, the median over seeds with a
bootstrap 95 % interval; ≥ and ≤ mean that the longest or shortest budget that was tried is not
enough to tell. *By the clock* it is multiplied by how long a step of tuned AdamW takes, over how
long one takes here. A margin is in standard deviations of tuned AdamW over seeds, positive where
the loss is lower. The score of the profiles is AlgoPerf's: 1 for what is fastest on every task to
the loss that AdamW's median configuration ends at, 0 for what takes four times as long or never
gets there. The optimizer's milliseconds hold what a policy costs, with the evaluations that it
asks for; *CIAO, fixed schedule* is LHOPT's own inner optimizer without a policy, so that what lies
between the two is the policy's. Rows are those of the store.
"""


def write_report(rows: Sequence[Row], size: Size, folder: Path) -> list[Overall]:
    """Write ``report.md`` and its pictures.

    Args:
        rows: of a store.
        size: of the tasks.
        folder: is made where there is none.

    Returns:
        The summary over all tasks; nothing where there are no rows of this size.

    Raises:
        OSError: the folder cannot be written to.
    """
    found = summaries(rows, size)
    if not found:
        return []
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    results = overall(found)
    labels = [result.label for result in results]
    parts = [
        f"# Evaluation: {len(found)} tasks, {size}\n",
        _table(OVERALL_HEADINGS, [overall_cells(result) for result in results]),
    ]
    draw_profiles(pictures / "profiles.png", found, labels)
    parts.append("![performance profiles](pictures/profiles.png)\n" + _NOTES)
    if draw_trajectories(pictures / "trajectories.png", found):
        parts.append("![hyperparameters of policies](pictures/trajectories.png)\n")
    for summary in found:
        name = f"{summary.task}.png"
        draw_task(pictures / name, summary, labels)
        parts += [_task_part(summary), f"![{summary.task}](pictures/{name})\n"]
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")
    return results


def _task_part(summary: TaskSummary) -> str:
    metric = next(iter(summary.rows[0].result.metrics), "metric")
    headings = [heading.format(metric=metric.replace("_", " ")) for heading in _TASK_HEADINGS]
    where = summary.rows[-1].circumstances
    lines = [
        f"## {summary.task}\n",
        _table(headings, [_task_cells(entry, metric) for entry in summary.entries]),
        f"{len(summary.rows)} runs on {where.device} with {where.versions}, data "
        f"`{where.data[:12]}`.",
    ]
    if summary.left_out:
        lines.append(
            f"{summary.left_out} runs of other data, versions or devices are left out here."
        )
    return "\n".join(lines) + "\n"


def _task_cells(entry: Entry, metric: str) -> list[str]:
    configuration = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value[:12]}"
        for name, value in entry.rows[0].spec.configuration.items()
    )
    return [
        entry.label,
        _spread(entry.losses),
        _number(entry.mean(metric)),
        _interval(entry.speedup["tuned"]),
        _number(entry.by_the_clock, ".2f"),
        _interval(entry.speedup["default"]),
        "-" if math.isnan(entry.margin) else f"{entry.margin:+.1f}",
        f"{entry.step_milliseconds:.2f}",
        f"{entry.optimizer_milliseconds:.2f}",
        configuration,
        " ".join(str(row.id) for row in entry.rows),
    ]


def overall_cells(result: Overall) -> list[str]:
    """One line of the table over all tasks."""
    return [
        result.label,
        str(result.tasks),
        *(_share(result.wins[name]) for name in ("default", "tuned", "median")),
        *(_number(result.speedup[name], ".2f") for name in ("tuned", "default")),
        _number(result.score, ".2f"),
    ]


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, rule, *lines)) + "\n"


def _spread(losses: Sequence[float]) -> str:
    mean = sum(losses) / len(losses)
    if len(losses) < 2 or not math.isfinite(mean):
        return _number(mean)
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))
    return f"{_number(mean)} ± {deviation:.2g}"


def _number(value: float, form: str = ".4g") -> str:
    return "-" if math.isnan(value) else "diverged" if math.isinf(value) else f"{value:{form}}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def _interval(value: Interval | None) -> str:
    return "-" if value is None else str(value)
