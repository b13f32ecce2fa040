"""From the rows of a store to the numbers of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from lhopt_fused.evaluation.optimizers import CONTENDERS
from lhopt_fused.evaluation.plan import BASELINE, by_configuration, is_at_one, ranked
from lhopt_fused.evaluation.statistics import (
    Interval,
    bootstrap_speedup,
    margin,
    performance_score,
    steps_to_target,
    win,
)
from lhopt_fused.evaluation.store import Row
from lhopt_fused.evaluation.task import Size

__all__ = [
    "DEFAULT",
    "TUNED",
    "Entry",
    "Overall",
    "TaskSummary",
    "overall",
    "summaries",
    "times_to_target",
]

DEFAULT: Final = "AdamW, default"
TUNED: Final = CONTENDERS[BASELINE].label


@dataclass(frozen=True)
class Entry:
    """One optimizer on one task: its best configuration at budget 1.

    Attributes:
        label: of the optimizer.
        rows: by seed.
        speedup: over tuned and default AdamW; None where these were not run.
        by_the_clock: speed-up over tuned AdamW in time: that in steps by how long a step takes;
            NaN where it is not known.
        margin: in deviations of tuned AdamW.
        wins: against "default", "tuned" and "median" AdamW.
    """

    label: str
    rows: Sequence[Row]
    speedup: Mapping[str, Interval | None]
    by_the_clock: float
    margin: float
    wins: Mapping[str, float]

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
        self.rows = [row for row in rows if _shared(row) == _shared(latest)]
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

    def baseline(self, which: str) -> tuple[list[float], list[list[float]]]:
        """Budgets, and AdamW's losses by seed at each: of the configuration best there, or default.

        Args:
            which: "tuned" or "default".

        Returns:
            Budgets ``[B]`` and losses ``[T, B]``, of the seeds and budgets that are complete.
        """
        rows = [row for row in self.rows if row.spec.optimizer == BASELINE]
        rows = rows if which == "tuned" else [row for row in rows if _is_default(row)]
        seeds = sorted({row.spec.seed for row in rows if is_at_one(row)})
        by_budget: dict[float, list[float]] = {}
        for budget in sorted({row.spec.budget for row in rows}):
            tried = by_configuration(row for row in rows if row.spec.budget == budget)
            chosen = tried[ranked(tried)[0]]
            if [row.spec.seed for row in chosen] == seeds:
                by_budget[budget] = [row.result.report_loss for row in chosen]
        return list(by_budget), [list(losses) for losses in zip(*by_budget.values(), strict=True)]

    @cached_property
    def entries(self) -> list[Entry]:
        """Default AdamW, tuned AdamW and all others."""
        return [self._entry(label, rows) for label, rows in self.best.items()]

    def _entry(self, label: str, rows: Sequence[Row]) -> Entry:
        losses = [row.result.report_loss for row in rows]
        speedup = {}
        for which in ("tuned", "default"):
            budgets, baseline = self.baseline(which)
            known = len(budgets) > 1 and label not in (DEFAULT, TUNED)
            speedup[which] = bootstrap_speedup(losses, budgets, baseline) if known else None
        opponents = self._opponents()
        over_tuned, by_the_clock = speedup["tuned"], math.nan
        if over_tuned is not None:
            relative = _step_milliseconds(self.best[TUNED]) / _step_milliseconds(rows)
            by_the_clock = over_tuned.value * relative
        return Entry(
            label,
            rows,
            speedup,
            by_the_clock,
            margin(losses, opponents.get("tuned", [])),
            {name: win(losses, other) for name, other in opponents.items()},
        )

    def _opponents(self) -> dict[str, list[float]]:
        """Losses of AdamW: default, tuned, and the median of its configurations."""
        grid = self.labelled.get(TUNED, {})
        found = {
            which: [row.result.report_loss for row in self.best[label]]
            for which, label in (("default", DEFAULT), ("tuned", TUNED))
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

    def time_to_target(self, label: str) -> float:
        """Share of a run until the target is reached; the median over seeds, inf for never."""
        times = [
            steps_to_target(
                self.target,
                [point.step / max(1, row.result.curve[-1].step) for point in row.result.curve],
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
        wins: share of these, against each of AdamW's.
        speedup: median over tasks, over each of AdamW's; NaN where there is none.
        score: AlgoPerf's.
    """

    label: str
    tasks: int
    wins: Mapping[str, float]
    speedup: Mapping[str, float]
    score: float


def summaries(rows: Iterable[Row], size: Size) -> list[TaskSummary]:
    """One for each task, in the order of their names."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.spec.size == size:
            found.setdefault(row.spec.task, []).append(row)
    return [TaskSummary(found[task]) for task in sorted(found)]


def times_to_target(found: Sequence[TaskSummary]) -> dict[str, list[float]]:
    """Of each optimizer, on each task whose target is known."""
    known = [summary for summary in found if not math.isnan(summary.target)]
    labels = dict.fromkeys(label for summary in known for label in summary.best)
    return {label: [summary.time_to_target(label) for summary in known] for label in labels}


def overall(found: Sequence[TaskSummary]) -> list[Overall]:
    """Every optimizer over all tasks."""
    times = times_to_target(found)
    scores = performance_score(times) if times else {}
    labels = dict.fromkeys(entry.label for summary in found for entry in summary.entries)
    results = []
    for label in labels:
        entries = [e for summary in found for e in summary.entries if e.label == label]
        wins = {name: _mean([e.wins[name] for e in entries if name in e.wins]) for name in _WINS}
        speedup = {
            which: _median([e.speedup[which] for e in entries]) for which in ("tuned", "default")
        }
        results.append(Overall(label, len(entries), wins, speedup, scores.get(label, math.nan)))
    return results


_WINS: Final = ("default", "tuned", "median")


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _median(values: Sequence[Interval | None]) -> float:
    known = [value.value for value in values if value is not None]
    return float(np.median(known)) if known else math.nan


def _step_milliseconds(rows: Sequence[Row]) -> float:
    return _milliseconds([row.result.seconds / row.result.steps for row in rows])


def _milliseconds(seconds: Sequence[float]) -> float:
    return 1e3 * float(np.median(seconds))


def _best(tried: Mapping[str, list[Row]]) -> list[Row]:
    """Of the best configuration; where a policy has changed, of the last."""
    last = max((rows[-1] for rows in tried.values()), key=lambda row: row.id)
    is_policy = "fingerprint" in last.spec.configuration
    return tried[last.spec.hyperparameters if is_policy else ranked(tried)[0]]


def _seed(row: Row) -> int:
    return row.spec.seed


def _label(row: Row) -> str:
    """Of an optimizer, with the policy of LHOPT."""
    label = CONTENDERS[row.spec.optimizer].label
    policy = row.spec.configuration.get("name")
    return label if policy is None else f"{label}: {policy}"


def _is_default(row: Row) -> bool:
    return row.spec.optimizer == BASELINE and row.spec.configuration == CONTENDERS[BASELINE].default


def _shared(row: Row) -> tuple[str, ...]:
    """What must be the same for rows to be compared."""
    versions = json.loads(row.circumstances.versions)
    own = [f"{name} {versions.get(name)}" for name in ("lhopt-fused", "protocol", "torch")]
    return (row.circumstances.data, row.circumstances.device, *own)
