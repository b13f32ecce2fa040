"""What a report says: from summaries to blocks of text, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lhopt_fused.evaluation.document import Block, Cell, Heading, Notes, Picture, Table, Text
from lhopt_fused.evaluation.figures import (
    budget_picture,
    curve_picture,
    profile_picture,
    size_picture,
    trajectories,
)
from lhopt_fused.evaluation.goals import goals, limits, losses
from lhopt_fused.evaluation.rows import COMPARED_VERSIONS, Row
from lhopt_fused.evaluation.statistics import Interval
from lhopt_fused.evaluation.summary import (
    CONTROL,
    DEFAULT,
    OPPONENTS,
    TUNED,
    Entry,
    Overall,
    TaskSummary,
    overall,
)
from lhopt_fused.evaluation.tasks.language_model import WIDTHS

__all__ = ["OVERALL_HEADINGS", "contents", "overall_cells"]

OVERALL_HEADINGS: Final = (
    *("optimizer", "tasks", *(f"wins: {name}" for name in OPPONENTS)),
    *("speed-up: tuned", "speed-up: default", "by the clock", "score", "score by the clock"),
)
_POLICY_HEADINGS: Final = (
    *("task", *(f"against {name}" for name in OPPONENTS), "speed-up: tuned", "speed-up: default"),
    *("by the clock", "margin", "rows"),
)
_APART_HEADINGS: Final = (
    *("task", "optimizer's ms a step: AdamW", "ours, no policy", "LHOPT"),
    *("kernel: AdamW's time / ours", "policy's cost, ms a step"),
    *("inner optimizer: speed-up", "policy: gain on it", "policy: margin", "rows"),
)
_TASK_HEADINGS: Final = (
    *("optimizer", "loss", "{metric}", "speed-up: tuned", "by the clock", "speed-up: default"),
    *("margin", "ms a step", "of which optimizer", "configuration", "rows"),
)
_ROW_HEADINGS: Final = (
    *("row", "optimizer", "configuration", "seed", "budget", "steps", "loss", "{metric}"),
    *("loss shown to policies", "seconds", "of which optimizer", "machine"),
)
_NOTES: Final = (
    (
        "Loss",
        "the mean ± standard deviation over seeds on the report split, which neither an optimizer "
        "nor the choice of its configuration sees. Of each optimizer the configuration is the "
        "best by the loss on another split, the one that policies see.",
    ),
    (
        "Tuned, default, median, control",
        "tuned AdamW is the best of its configurations, default is lr 1e-3 all along, median is "
        "its median configuration. The hand control is our own inner optimizer under its best "
        "fixed schedule, without a policy.",
    ),
    (
        "Speed-up",
        "the budget that AdamW needs to reach the same loss, over the budget of the run: the "
        "median over seeds, with a bootstrap 95 % interval over the seeds of both. ≥ and ≤ mean "
        "that the longest or shortest budget that was tried is not enough to tell. Over tasks, "
        "the median with an interval over tasks.",
    ),
    (
        "By the clock",
        "the speed-up by how long a step of tuned AdamW takes, over how long one takes here. "
        "What a policy costs counts, with the evaluations that it asks for, and so does whatever "
        "else the machine was doing.",
    ),
    (
        "Margin",
        "how much lower the loss is, in standard deviations of the other's over seeds: of tuned "
        "AdamW, or of the hand control.",
    ),
    (
        "Policy's gain",
        "the speed-up over tuned AdamW, over that of the hand control; - where both lie beyond "
        "the budgets that were tried.",
    ),
    (
        "Score",
        "AlgoPerf's: 1 for what is fastest on every task to the loss that AdamW's median "
        "configuration ends at, on the split that policies see; 0 for what takes four times as "
        "long or never gets there.",
    ),
)


def contents(found: Sequence[TaskSummary], rows_file: str) -> list[Block]:
    """A whole report.

    Args:
        found: one or more tasks of one size.
        rows_file: the name of the file of rows beside the report.
    """
    results = overall(found)
    labels = [result.label for result in results]
    policies = list(dict.fromkeys(entry.label for task in found for entry in task.policies))
    blocks: list[Block] = [
        Heading(f"Evaluation: {len(found)} tasks, {found[0].size}", level=1),
        Text(_circumstances(found, rows_file)),
    ]
    for label in policies:
        blocks += _policy_part(found, label)
    if cautions := limits(found):
        blocks += [Heading("What these runs cannot tell"), Notes(cautions)]
    lines = [[Cell(text) for text in overall_cells(result)] for result in results]
    blocks += [Heading("Every optimizer"), Table(OVERALL_HEADINGS, lines)]
    blocks += _profile_part(found, labels)
    for label in policies:
        blocks += _apart_part(found, label)
    blocks += _size_part(found, labels)
    blocks += [Heading("How to read this"), Notes(_NOTES)]
    for summary in found:
        blocks += _task_part(summary, labels)
    return blocks


def _circumstances(found: Sequence[TaskSummary], rows_file: str) -> str:
    count = sum(len(summary.rows) for summary in found)
    machines = sorted({row.machine for summary in found for row in summary.rows} - {""})
    compared = [summary.rows[-1].circumstances.compared for summary in found]
    devices = sorted({where["device"] for where in compared})
    versions = sorted({f"{name} {where[name]}" for where in compared for name in COMPARED_VERSIONS})
    return (
        f"{count} runs on {', '.join(devices)} ({', '.join(machines) or 'unknown machine'}) with "
        f"{', '.join(versions)}. Every number of a task names its rows: those in the tables of all "
        f"runs and, by the same ids, in {rows_file}; what is said of all tasks comes from these."
    )


# ---------------------------------------------------------------------- a policy over all tasks


def _policy_part(found: Sequence[TaskSummary], label: str) -> list[Block]:
    asked = [
        [Cell(goal.name), Cell(goal.asked), Cell(goal.found), Cell(_reached(goal.reached))]
        for goal in goals(found, label)
    ]
    blocks: list[Block] = [Heading(label)]
    if asked:
        blocks.append(Table(("goal", "asked", "found", ""), asked))
    if lost := losses(found, label):
        blocks.append(Notes(lost))
    lines = [
        _policy_line(summary, entry)
        for summary in found
        for entry in summary.entries
        if entry.label == label
    ]
    return [*blocks, Table(_POLICY_HEADINGS, lines)]


def _reached(reached: bool) -> str:
    return "reached" if reached else "not reached"


def _policy_line(summary: TaskSummary, entry: Entry) -> list[Cell]:
    return [
        Cell(summary.task, to=_section(summary)),
        *(Cell(_won(entry.wins.get(name))) for name in OPPONENTS),
        *(_speedup_cell(summary, entry, which) for which in ("tuned", "default")),
        Cell(_number(entry.by_the_clock, ".2f")),
        Cell(_margin(entry.margin)),
        _row_cell(entry.rows),
    ]


def _won(win: float | None) -> str:
    return "-" if win is None else {1.0: "wins", 0.5: "even", 0.0: "loses"}[win]


def _speedup_cell(summary: TaskSummary, entry: Entry, which: str) -> Cell:
    """A speed-up, which leads to AdamW's budgets, that it comes from."""
    value = entry.speedup[which]
    return Cell("-") if value is None else Cell(str(value), to=_budget_section(summary))


def _section(summary: TaskSummary) -> Heading:
    return Heading(summary.task)


def _budget_section(summary: TaskSummary) -> Heading:
    return Heading(f"{summary.task}: AdamW at its budgets", level=3)


def _apart_part(found: Sequence[TaskSummary], label: str) -> list[Block]:
    """What the kernel, the inner optimizer and the policy each are worth."""
    lines = []
    for summary in found:
        entries = {entry.label: entry for entry in summary.entries}
        if {label, CONTROL, TUNED} <= set(entries):
            lines.append(_apart_line(summary, entries[TUNED], entries[CONTROL], entries[label]))
    if not lines:
        return []
    return [
        Heading(f"Kernel and policy apart: {label}"),
        Text(
            "The kernel is what a step of our inner optimizer costs beside torch's fused AdamW; "
            "the inner optimizer is what its best fixed schedule gains over tuned AdamW, in "
            "steps; the policy is what it adds to that, or takes from it, and what it costs."
        ),
        Table(_APART_HEADINGS, lines),
    ]


def _apart_line(summary: TaskSummary, tuned: Entry, control: Entry, policy: Entry) -> list[Cell]:
    adamw, ours, whole = (e.optimizer_milliseconds for e in (tuned, control, policy))
    same = len(tuned.machines | control.machines | policy.machines) == 1
    ratio, cost = (adamw / ours, whole - ours) if same else (math.nan, math.nan)
    return [
        Cell(summary.task, to=_section(summary)),
        *(Cell(f"{time:.2f}") for time in (adamw, ours, whole)),
        Cell(_number(ratio, ".2f")),
        Cell(_number(cost, ".2f")),
        _speedup_cell(summary, control, "tuned"),
        Cell(_interval(policy.gain)),
        Cell(_margin(policy.control_margin)),
        _row_cell([*tuned.rows, *control.rows, *policy.rows]),
    ]


def _profile_part(found: Sequence[TaskSummary], labels: Sequence[str]) -> list[Block]:
    if all(math.isnan(summary.target) for summary in found):
        return []
    pictures = [
        Picture(f"profiles_{unit}.png", f"In {unit}", profile_picture(found, labels, clock=clock))
        for unit, clock in (("steps", False), ("seconds", True))
    ]
    return [Heading("Performance profiles"), pictures]


def _size_part(found: Sequence[TaskSummary], labels: Sequence[str]) -> list[Block]:
    picture = size_picture(found, WIDTHS, labels)
    if picture is None:
        return []
    title = "Dots are tasks; the lines go through language models that differ in width alone"
    return [Heading("Speed-up against the size of the model"), Picture("sizes.png", title, picture)]


# ---------------------------------------------------------------------- one task


def _task_part(summary: TaskSummary, labels: Sequence[str]) -> list[Block]:
    metric = next(iter(summary.rows[0].result.metrics), "metric")
    headings, row_headings = (
        [name.format(metric=metric.replace("_", " ")) for name in names]
        for names in (_TASK_HEADINGS, _ROW_HEADINGS)
    )
    where = summary.rows[-1].circumstances
    text = f"{summary.parameters:,} parameters, data {where.data[:12]}."
    if not math.isnan(summary.target):
        text += f" AdamW's median configuration ends at {summary.target:.4g}, the profiles' target."
    if summary.left_out:
        text += f" {summary.left_out} runs of other data, versions or devices are left out."
    return [
        _section(summary),
        Text(text),
        Table(headings, [_task_line(summary, entry, metric) for entry in summary.entries]),
        _task_pictures(summary, labels),
        *_budget_part(summary),
        Table(
            row_headings,
            [_row_line(row, metric) for row in summary.rows],
            folded=f"All {len(summary.rows)} runs of {summary.task}",
            ids=[row.id for row in summary.rows],
        ),
    ]


def _task_pictures(summary: TaskSummary, labels: Sequence[str]) -> list[Picture]:
    name = summary.task
    pictures = [
        Picture(f"{name}_{unit}.png", title, curve_picture(summary, labels, clock=clock))
        for unit, title, clock in (
            ("steps", "Learning curves, means over seeds", False),
            ("seconds", "The same by the clock", True),
        )
    ]
    if len(summary.budget_points("tuned")) > 1:
        title = "AdamW's loss against its budget (lines), the others at budget 1 (dots)"
        pictures.append(Picture(f"{name}_budgets.png", title, budget_picture(summary, labels)))
    for index, (label, png) in enumerate(trajectories(summary)):
        title = f"What {label} did to the hyperparameters"
        pictures.append(Picture(f"{name}_policy{index}.png", title, png))
    return pictures


def _budget_part(summary: TaskSummary) -> list[Block]:
    lines = [
        [
            Cell(label),
            Cell(f"{point.budget:g}"),
            Cell(_spread(point.losses)),
            Cell(_configuration(point.rows[0])),
            _row_cell(point.rows),
        ]
        for which, label in (("default", DEFAULT), ("tuned", TUNED))
        for point in summary.budget_points(which)
    ]
    headings = ("optimizer", "budget", "loss", "configuration", "rows")
    return [_budget_section(summary), Table(headings, lines)] if lines else []


def _task_line(summary: TaskSummary, entry: Entry, metric: str) -> list[Cell]:
    return [
        Cell(entry.label),
        Cell(_spread(entry.losses)),
        Cell(_number(entry.mean(metric))),
        _speedup_cell(summary, entry, "tuned"),
        Cell(_number(entry.by_the_clock, ".2f")),
        _speedup_cell(summary, entry, "default"),
        Cell(_margin(entry.margin)),
        Cell(f"{entry.step_milliseconds:.2f}"),
        Cell(f"{entry.optimizer_milliseconds:.2f}"),
        Cell(_configuration(entry.rows[0])),
        _row_cell(entry.rows),
    ]


def _row_line(row: Row, metric: str) -> list[Cell]:
    result = row.result
    texts = (
        *(str(row.id), row.spec.optimizer, _configuration(row), str(row.spec.seed)),
        *(f"{row.spec.budget:g}", str(result.steps), _number(result.report_loss, ".6g")),
        _number(result.metrics.get(metric, math.nan)),
        _number(result.eval_loss, ".6g"),
        *(f"{result.seconds:.2f}", f"{result.optimizer_seconds:.2f}", row.machine),
    )
    return [Cell(text) for text in texts]


def _row_cell(rows: Sequence[Row]) -> Cell:
    return Cell(rows=[row.id for row in rows])


def _configuration(row: Row) -> str:
    given: Mapping[str, float | str] = row.spec.configuration
    return ", ".join(
        f"{name} {value[:12]}" if isinstance(value, str) else f"{name} {value:g}"
        for name, value in given.items()
    )


# ---------------------------------------------------------------------- numbers as text


def overall_cells(result: Overall) -> list[str]:
    """One line of the table over all tasks."""
    return [
        result.label,
        str(result.tasks),
        *(_share(result.wins[name]) for name in OPPONENTS),
        *(_interval(result.speedup[name]) for name in ("tuned", "default")),
        *(
            _number(value, ".2f")
            for value in (result.by_the_clock, result.score, result.clock_score)
        ),
    ]


def _spread(losses: Sequence[float]) -> str:
    mean = sum(losses) / len(losses)
    if len(losses) < 2 or not math.isfinite(mean):
        return _number(mean)
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))
    return f"{_number(mean)} ± {deviation:.2g}"


def _number(value: float, form: str = ".4g") -> str:
    return "-" if math.isnan(value) else "diverged" if math.isinf(value) else f"{value:{form}}"


def _margin(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.1f}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def _interval(value: Interval | None) -> str:
    return "-" if value is None else str(value)
