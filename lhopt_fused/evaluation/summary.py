"""From the rows of a store to the numbers of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np

from lhopt_fused.evaluation.optimizers import CONTENDERS, SHOWN
from lhopt_fused.evaluation.plan import BASELINE, by_configuration, is_at_one, ranked
from lhopt_fused.evaluation.rows import Row
from lhopt_fused.evaluation.statistics import (
    Interval,
    bootstrap_gain,
    bootstrap_median,
    bootstrap_speedup,
    margin,
    performance_score,
    steps_to_target,
    win,
)
from lhopt_fused.evaluation.task import SIZES, Size

__all__ = [
    "CONTROL",
    "DEFAULT",
    "OPPONENTS",
    "TUNED",
    "BudgetPoint",
    "Entry",
    "Overall",
    "TaskSummary",
    "latest",
    "overall",
    "summaries",
    "times_to_target",
]

DEFAULT: Final = "AdamW, default"
TUNED: Final = CONTENDERS[BASELINE].label
CONTROL: Final = CONTENDERS["ciao"].label
OPPONENTS: Final = ("default", "tuned", "median", "control")
"""Whom an optimizer can win against: three of AdamW's configurations, and the hand control."""


class BudgetPoint(NamedTuple):
    """AdamW at one budget.

    Attributes:
        budget: share of the task's standard number of steps.
        rows: of its best configuration there, by seed.
    """

    budget: float
    rows: Sequence[Row]

    @property
    def losses(self) -> list[float]:
        """On the report split, by seed."""
        return [row.result.report_loss for row in self.rows]


@dataclass(frozen=True)
class Entry:
    """One optimizer on one task: its best configuration at budget 1.

    Attributes:
        label: of the optimizer.
        rows: by seed.
        speedup: over tuned and default AdamW; None where these were not run.
        relative_step: how long a step of tuned AdamW takes, over how long one takes here; NaN
            where these were not on the same machine.
        margin: in deviations of tuned AdamW.
        wins: against :data:`OPPONENTS`, those that there are.
        gain: speed-up over tuned AdamW over that of the hand control: what a policy adds to the
            inner optimizer; None where it is not known.
        control_margin: as ``margin``, of the hand control.
    """

    label: str
    rows: Sequence[Row]
    speedup: Mapping[str, Interval | None]
    relative_step: float
    margin: float
    wins: Mapping[str, float]
    gain: Interval | None
    control_margin: float

    @property
    def is_policy(self) -> bool:
        """Whether a policy is at work."""
        return _is_policy(self.rows[0])

    @property
    def by_the_clock(self) -> float:
        """Speed-up over tuned AdamW in time: that in steps by how long a step takes."""
        over_tuned = self.speedup["tuned"]
        return math.nan if over_tuned is None else over_tuned.value * self.relative_step

    @property
    def losses(self) -> list[float]:
        """On the report split, by seed."""
        return [row.result.report_loss for row in self.rows]

    def mean(self, metric: str) -> float:
        """Of a metric over seeds."""
        return float(np.mean([row.result.metrics.get(metric, math.nan) for row in self.rows]))

    @property
    def step_milliseconds(self) -> float:
        """Of a whole training step; the median over seeds."""
        return _step_milliseconds(self.rows)

    @property
    def optimizer_milliseconds(self) -> float:
        """Of the optimizer in a step, with what a policy costs; the median over seeds."""
        return _milliseconds([row.result.optimizer_seconds / row.result.steps for row in self.rows])

    @property
    def machines(self) -> set[str]:
        """Where it was run."""
        return {row.machine for row in self.rows}


class TaskSummary:
    """All that was run on one task, under the same circumstances.

    Args:
        rows: of one task and size.

    Attributes:
        task, size: of the rows.
        rows: those of the circumstances under which the last was run.
        left_out: number of rows of other circumstances: other data, versions or devices.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        latest = max(rows, key=lambda row: row.id)
        self.task, self.size = latest.spec.task, latest.spec.size
        shared = latest.circumstances.compared
        self.rows = [row for row in rows if row.circumstances.compared == shared]
        self.left_out = len(rows) - len(self.rows)

    @cached_property
    def labelled(self) -> dict[str, dict[str, list[Row]]]:
        """By label and configuration, the rows at budget 1; the baseline first."""
        found: dict[str, list[Row]] = {}
        for row in filter(is_at_one, self.rows):
            found.setdefault(_label(row), []).append(row)
        order = [contender.label for contender in CONTENDERS.values()]
        names = sorted(found, key=lambda name: (order.index(name.split(": ")[0]), name))
        return {name: by_configuration(found[name]) for name in names}

    @cached_property
    def best(self) -> dict[str, list[Row]]:
        """Of each optimizer, the rows of its best configuration, and default AdamW's."""
        found = {name: _best(tried) for name, tried in self.labelled.items()}
        default = [row for row in self.rows if is_at_one(row) and _is_default(row)]
        return ({DEFAULT: sorted(default, key=_seed)} if default else {}) | found

    @property
    def parameters(self) -> int:
        """Of the model, how many numbers."""
        return self.rows[-1].result.parameters

    def budget_points(self, which: str) -> list[BudgetPoint]:
        """AdamW at each budget: the configuration that is best there, or default.

        Args:
            which: "tuned" or "default".

        Returns:
            By budget, of those where all seeds are complete.
        """
        rows = [row for row in self.rows if row.spec.optimizer == BASELINE]
        rows = rows if which == "tuned" else [row for row in rows if _is_default(row)]
        seeds = sorted({row.spec.seed for row in rows if is_at_one(row)})
        points = []
        for budget in sorted({row.spec.budget for row in rows}):
            tried = by_configuration(row for row in rows if row.spec.budget == budget)
            chosen = tried[ranked(tried)[0]]
            if [row.spec.seed for row in chosen] == seeds:
                points.append(BudgetPoint(budget, chosen))
        return points

    def baseline(self, which: str) -> tuple[list[float], list[list[float]]]:
        """Budgets ``[B]`` and losses ``[T, B]`` of :meth:`budget_points`, by seed."""
        points = self.budget_points(which)
        losses = zip(*(point.losses for point in points), strict=True)
        return [point.budget for point in points], [list(seed) for seed in losses]

    @cached_property
    def entries(self) -> list[Entry]:
        """Default AdamW, tuned AdamW and all others."""
        return [self._entry(label, rows) for label, rows in self.best.items()]

    @property
    def policies(self) -> list[Entry]:
        """The entries of LHOPT."""
        return [entry for entry in self.entries if entry.is_policy]

    def _entry(self, label: str, rows: Sequence[Row]) -> Entry:
        losses = [row.result.report_loss for row in rows]
        speedup = {}
        for which in ("tuned", "default"):
            budgets, baseline = self.baseline(which)
            known = len(budgets) > 1 and label not in (DEFAULT, TUNED)
            speedup[which] = bootstrap_speedup(losses, budgets, baseline) if known else None
        opponents = self._opponents()
        control = opponents.get("control", [])
        return Entry(
            label,
            rows,
            speedup,
            self._relative_step(rows),
            margin(losses, opponents.get("tuned", [])),
            {name: win(losses, other) for name, other in opponents.items()},
            self._gain(losses, control) if _is_policy(rows[0]) else None,
            margin(losses, control),
        )

    def _relative_step(self, rows: Sequence[Row]) -> float:
        tuned = self.best.get(TUNED, [])
        if not tuned or len({row.machine for row in [*tuned, *rows]}) > 1:
            return math.nan
        return _step_milliseconds(tuned) / _step_milliseconds(rows)

    def _gain(self, losses: Sequence[float], control: Sequence[float]) -> Interval | None:
        budgets, baseline = self.baseline("tuned")
        known = len(budgets) > 1 and len(control) > 0
        return bootstrap_gain(losses, control, budgets, baseline) if known else None

    def _opponents(self) -> dict[str, list[float]]:
        """Losses by :data:`OPPONENTS`; of the median configuration, one: the median of means."""
        grid = self.labelled.get(TUNED, {})
        found = {
            which: [row.result.report_loss for row in self.best[label]]
            for which, label in (("default", DEFAULT), ("tuned", TUNED), ("control", CONTROL))
            if label in self.best
        }
        means = [float(np.mean([row.result.report_loss for row in rows])) for rows in grid.values()]
        return found | ({"median": [float(np.median(means))]} if means else {})

    @cached_property
    def target(self) -> float:
        """The loss for profiles, on the split that policies see: AdamW's median configuration's."""
        grid = self.labelled.get(TUNED, {})
        means = [float(np.mean([row.result.eval_loss for row in rows])) for rows in grid.values()]
        return float(np.median(means)) if means else math.nan

    def time_to_target(self, label: str, clock: bool = False) -> float:
        """Steps or seconds until the target is reached; the median over seeds, inf for never."""
        times = [
            steps_to_target(
                self.target,
                [point.seconds if clock else point.step for point in row.result.curve],
                [point.eval_loss for point in row.result.curve],
            )
            for row in self.best.get(label, [])
        ]
        return float(np.median(times)) if times else math.inf


@dataclass(frozen=True)
class Overall:
    """One optimizer over all tasks.

    Attributes:
        label: of the optimizer.
        tasks: on how many it was run.
        wins: share of these, against :data:`OPPONENTS`; NaN where there is none.
        speedup: median over tasks, over each of AdamW's; None where there is none.
        by_the_clock: the same in time, over tuned AdamW.
        score: AlgoPerf's, in steps.
        clock_score: the same in seconds.
    """

    label: str
    tasks: int
    wins: Mapping[str, float]
    speedup: Mapping[str, Interval | None]
    by_the_clock: float
    score: float
    clock_score: float


def summaries(rows: Iterable[Row], size: Size) -> list[TaskSummary]:
    """One for each task, in the order of their names."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.spec.size == size:
            found.setdefault(row.spec.task, []).append(row)
    return [TaskSummary(found[task]) for task in sorted(found)]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each task and size, the rows that are compared: made as the last of them was; by id."""
    found = list(rows)
    kept = [row for size in SIZES for task in summaries(found, size) for row in task.rows]
    return sorted(kept, key=lambda row: row.id)


def times_to_target(found: Sequence[TaskSummary], clock: bool = False) -> dict[str, list[float]]:
    """Of each optimizer, on each task whose target is known: steps, or seconds by the clock."""
    known = [summary for summary in found if not math.isnan(summary.target)]
    labels = dict.fromkeys(label for summary in known for label in summary.best)
    return {label: [task.time_to_target(label, clock) for task in known] for label in labels}


def overall(found: Sequence[TaskSummary]) -> list[Overall]:
    """Every optimizer over all tasks."""
    scores, clock_scores = (_scores(times_to_target(found, clock)) for clock in (False, True))
    labels = dict.fromkeys(entry.label for summary in found for entry in summary.entries)
    results = []
    for label in labels:
        entries = [e for summary in found for e in summary.entries if e.label == label]
        wins = {
            name: _mean([e.wins[name] for e in entries if name in e.wins]) for name in OPPONENTS
        }
        speedup = {
            which: bootstrap_median([e.speedup[which] for e in entries])
            for which in ("tuned", "default")
        }
        clock = [e.by_the_clock for e in entries if not math.isnan(e.by_the_clock)]
        own = (scores.get(label, math.nan), clock_scores.get(label, math.nan))
        by_the_clock = float(np.median(clock)) if clock else math.nan
        results.append(Overall(label, len(entries), wins, speedup, by_the_clock, *own))
    return results


def _scores(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return performance_score(times) if times else {}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _step_milliseconds(rows: Sequence[Row]) -> float:
    return _milliseconds([row.result.seconds / row.result.steps for row in rows])


def _milliseconds(seconds: Sequence[float]) -> float:
    return 1e3 * float(np.median(seconds))


def _best(tried: Mapping[str, list[Row]]) -> list[Row]:
    """Of the best configuration; where a policy has changed, of the last."""
    last = max((rows[-1] for rows in tried.values()), key=lambda row: row.id)
    return tried[last.spec.hyperparameters if _is_policy(last) else ranked(tried)[0]]


def _is_policy(row: Row) -> bool:
    return "fingerprint" in row.spec.configuration


def _seed(row: Row) -> int:
    return row.spec.seed


def _label(row: Row) -> str:
    """Of an optimizer, with the policy of LHOPT and whether it is shown eval losses."""
    label = CONTENDERS[row.spec.optimizer].label
    policy = row.spec.configuration.get("name")
    shown = " with eval losses" if row.spec.configuration.get("eval_loss") == SHOWN else ""
    return label if policy is None else f"{label}: {policy}{shown}"


def _is_default(row: Row) -> bool:
    return row.spec.optimizer == BASELINE and row.spec.configuration == CONTENDERS[BASELINE].default
