"""What was asked of a policy on tasks that it never saw, and what it does; where it falls short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from lhopt_fused.evaluation.optimizers import CONTENDERS
from lhopt_fused.evaluation.plan import BASELINE, BUDGETS
from lhopt_fused.evaluation.statistics import bootstrap_median
from lhopt_fused.evaluation.summary import OPPONENTS, TUNED, Entry, TaskSummary

__all__ = ["SEEDS", "Goal", "goals", "limits", "losses"]

SEEDS: Final = 3
"""How many runs of a configuration are thought to be enough to tell."""

_WORSE_THAN: Final = {
    "default": "default AdamW",
    "tuned": "tuned AdamW",
    "median": "the median configuration of AdamW",
    "control": "the same inner optimizer without a policy",
}


class Goal(NamedTuple):
    """Something asked for.

    Attributes:
        name: what it is about.
        asked: how much.
        found: how much there is.
        reached: whether that is enough.
    """

    name: str
    asked: str
    found: str
    reached: bool


def _entries(found: Sequence[TaskSummary], label: str) -> list[tuple[str, Entry]]:
    return [
        (summary.task, entry)
        for summary in found
        for entry in summary.entries
        if entry.label == label
    ]


def goals(found: Sequence[TaskSummary], label: str) -> list[Goal]:
    """What was asked of a policy, by its label, where the runs are there to say so."""
    entries = [entry for _, entry in _entries(found, label)]
    results = []
    for which, name, share in (
        ("default", "tasks on which it is not worse than default AdamW", 1.0),
        ("tuned", "tasks on which it is better than tuned AdamW", 0.5),
    ):
        wins = [entry.wins[which] for entry in entries if which in entry.wins]
        least = 0.5 if which == "default" else 1.0
        count = sum(win >= least for win in wins)
        if wins:
            asked = "all" if share == 1 else "half"
            enough = count >= share * len(wins)
            results.append(Goal(name, asked, f"{count} of {len(wins)}", enough))
    for which, least in (("tuned", 1.2), ("default", 2.0)):
        median = bootstrap_median([entry.speedup[which] for entry in entries])
        if median is not None:
            name = f"median speed-up over {which} AdamW, in steps"
            results.append(Goal(name, f"≥ {least:g}", str(median), median.value >= least))
    return results


def losses(found: Sequence[TaskSummary], label: str) -> list[tuple[str, str]]:
    """Whom a policy loses against, in words, and on which tasks."""
    results = []
    for which in OPPONENTS:
        known = [(task, entry) for task, entry in _entries(found, label) if which in entry.wins]
        lost = [task for task, entry in known if entry.wins[which] < 0.5]
        if lost:
            worse = f"Worse than {_WORSE_THAN[which]} on {len(lost)} of {len(known)} tasks"
            results.append((worse, ", ".join(lost)))
    return results


def limits(found: Sequence[TaskSummary]) -> list[tuple[str, str]]:
    """What these runs are too few to tell."""
    grid = len(CONTENDERS[BASELINE].grid)
    few_configurations, few_seeds, few_budgets, machines = [], [], [], []
    for summary in found:
        tried = len(summary.labelled.get(TUNED, {}))
        if 0 < tried < grid:
            few_configurations.append(f"{summary.task} ({tried})")
        seeds = min(len(rows) for rows in summary.best.values())
        if seeds < SEEDS:
            few_seeds.append(f"{summary.task} ({seeds})")
        budgets = len(summary.budget_points("tuned"))
        if budgets < len(BUDGETS):
            few_budgets.append(f"{summary.task} ({budgets})")
        if len({row.machine for row in summary.rows}) > 1:
            machines.append(summary.task)
    return [
        (words, ", ".join(tasks))
        for words, tasks in (
            (f"Tuned AdamW is the best of fewer than {grid} configurations on", few_configurations),
            (f"Fewer than {SEEDS} seeds, whose spread says little, on", few_seeds),
            (f"AdamW was run at fewer than {len(BUDGETS)} budgets on", few_budgets),
            ("Runs were made on several machines, and times are compared within one only, on",
             machines),
        )
        if tasks
    ]  # fmt: skip
