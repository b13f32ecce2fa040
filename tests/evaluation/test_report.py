"""Summaries against a store made by hand, and a report that is all in the store."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lhopt_fused.evaluation.optimizers import Configuration
from lhopt_fused.evaluation.report import write_report
from lhopt_fused.evaluation.run import CurvePoint, RunResult, RunSpec
from lhopt_fused.evaluation.store import Circumstances, Row
from lhopt_fused.evaluation.summary import DEFAULT, TUNED, TaskSummary, overall, summaries

HERE = Circumstances("d" * 64, '{"lhopt-fused": "0.1.0", "torch": "2.7"}', "cpu")
CONSTANT: Configuration = {"lr": 1e-3, "schedule": "constant"}
LINEAR: Configuration = {"lr": 3e-3, "schedule": "linear"}
WORST: Configuration = {"lr": 1e-2, "schedule": "constant"}
COSINE: Configuration = {"name": "cosine", "fingerprint": "f" * 64}
POLICY = "LHOPT: cosine"
TUNED_LOSSES = {0.5: 3.0, 1.0: 2.0, 2.0: 1.5, 4.0: 1.25}


def result(loss: float, eval_loss: float | None = None, trajectory: bool = False) -> RunResult:
    """Ten steps of 0.1 seconds; of 0.2 under a policy."""
    last = loss if eval_loss is None else eval_loss
    curve = [CurvePoint(0, 0.0, math.nan, 9.0), CurvePoint(5, 1.0, 8.0, 2 * last)]
    curve.append(CurvePoint(10, 2.0, 4.0, last))
    moves = [[0.5, *[1e-3] * 8], [1.0, *[1e-4] * 7, math.nan]] if trajectory else []
    return RunResult(
        10, loss, {"accuracy": 1 - loss / 10}, last, curve, 1.0 + trajectory, 0.5, moves
    )


def made() -> list[Row]:
    """One task: default AdamW ends at 4 / budget, tuned as in the table, the policy at 1.5."""
    rows: list[Row] = []

    def add(optimizer: str, given: Configuration, seed: int, budget: float, r: RunResult) -> None:
        spec = RunSpec("toy", "small", optimizer, given, seed, budget)
        rows.append(Row(len(rows) + 1, spec, HERE, r))

    for seed, shift in enumerate((-0.1, 0.0, 0.1)):
        for budget, loss in TUNED_LOSSES.items():
            add("adamw", LINEAR, seed, budget, result(loss + shift, loss))
            add("adamw", CONSTANT, seed, budget, result(4 / budget + shift))
        add("adamw", WORST, seed, 1.0, result(math.inf))
        add("lhopt", COSINE, seed, 1.0, result(1.5, trajectory=True))
    return rows


def test_a_task_is_summed_up() -> None:
    summary = TaskSummary(made())
    assert list(summary.best) == [DEFAULT, TUNED, POLICY]
    entries = {entry.label: entry for entry in summary.entries}
    policy = entries[POLICY]
    assert policy.speedup["tuned"] is not None
    assert policy.speedup["tuned"].value == pytest.approx(2.0)
    assert policy.speedup["default"] is not None
    assert policy.speedup["default"].value == pytest.approx(2 * 2**0.5)  # halfway from 2 to 1
    assert policy.by_the_clock == pytest.approx(1.0)  # steps take twice as long
    assert math.isnan(entries[TUNED].by_the_clock)
    assert policy.margin == pytest.approx(5.0)  # 0.5 of 0.1
    assert policy.wins == {"default": 1.0, "tuned": 1.0, "median": 1.0}
    assert entries[TUNED].margin == 0.0
    assert entries[TUNED].wins == {"default": 1.0, "tuned": 0.5, "median": 1.0}
    assert entries[DEFAULT].wins == {"default": 0.5, "tuned": 0.0, "median": 0.5}
    assert entries[DEFAULT].speedup == {"tuned": None, "default": None}
    assert policy.mean("accuracy") == pytest.approx(0.85)
    assert policy.step_milliseconds == pytest.approx(200)
    assert policy.optimizer_milliseconds == pytest.approx(50)


def test_baselines_need_all_seeds() -> None:
    rows = [r for r in made() if (r.spec.seed, r.spec.budget) != (2, 4.0)]
    budgets, losses = TaskSummary(rows).baseline("tuned")
    assert budgets == [0.5, 1.0, 2.0]
    assert losses[1] == [3.0, 2.0, 1.5]


def test_the_best_is_chosen_by_what_policies_see() -> None:
    """Configurations that look good on the report split only are not taken."""
    rows = [
        replace(r, result=replace(r.result, report_loss=0.0))
        if r.spec.configuration == WORST
        else r
        for r in made()
    ]
    assert TaskSummary(rows).best[TUNED][0].spec.configuration == LINEAR


def test_profiles_are_by_the_median_configuration() -> None:
    summary = TaskSummary(made())
    assert summary.target == 4.0
    assert summary.time_to_target(DEFAULT) == 1.0
    assert summary.time_to_target(POLICY) == 0.5
    assert summary.time_to_target("nobody") == math.inf
    found = {item.label: item for item in overall([summary])}
    assert found[POLICY].score == 1.0
    assert found[DEFAULT].score == pytest.approx(2 / 3)
    assert found[POLICY].speedup["tuned"] == pytest.approx(2.0)


def test_other_circumstances_are_not_mixed_in() -> None:
    old = [replace(r, circumstances=HERE._replace(data="old")) for r in made()]
    new = [replace(r, id=r.id + 1000) for r in made()]
    summary = TaskSummary([*old, *new])
    assert summary.left_out == len(old)
    assert summary.rows == new


def test_packages_of_one_optimizer_are_no_other_circumstances() -> None:
    versions = '{"lhopt-fused": "0.1.0", "schedulefree": "1.4", "torch": "2.7"}'
    rows = made()
    spec = RunSpec("toy", "small", "schedule_free", {"lr": 1e-3}, 0)
    rows.append(Row(99, spec, HERE._replace(versions=versions), result(1.0)))
    summary = TaskSummary(rows)
    assert summary.left_out == 0
    assert "Schedule-Free AdamW" in summary.best


def test_the_last_form_of_a_policy_counts() -> None:
    rows = made()
    spec = replace(rows[-1].spec, configuration={**COSINE, "fingerprint": "e" * 64})
    rows.append(Row(99, spec, HERE, result(1.75)))
    assert [row.id for row in TaskSummary(rows).best[POLICY]] == [99]


def without(*labels: str) -> list[Row]:
    return [row for row in made() if row.spec.optimizer not in labels]


def diverged() -> list[Row]:
    return [
        replace(r, result=result(math.inf, math.inf)) if r.spec.optimizer == "lhopt" else r
        for r in made()
    ]


@pytest.mark.parametrize(
    ("rows", "pictures", "words"),
    [
        (made, {"trajectories.png"}, ["| LHOPT: cosine | 1 | 100% |", "± 0.1", "`dddddddddddd`"]),
        (lambda: without("adamw"), {"trajectories.png"}, ["| LHOPT: cosine | 1 | - |"]),
        (lambda: without("lhopt"), set(), ["| AdamW, tuned | 1 | 100% |"]),
        (diverged, set(), ["| LHOPT: cosine | diverged |", "≤ 0.50 [0.50, 0.50]"]),
    ],
)
def test_a_report_is_written(
    rows: Callable[[], list[Row]], pictures: set[str], words: list[str], tmp_path: Path
) -> None:
    assert write_report(rows(), "small", tmp_path)
    found = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert found == {"toy.png", "profiles.png"} | pictures
    text = (tmp_path / "report.md").read_text()
    for word in words:
        assert word in text
    assert all(f"pictures/{name}" in text for name in found)


def test_numbers_name_their_rows(tmp_path: Path) -> None:
    write_report(made(), "small", tmp_path)
    text = (tmp_path / "report.md").read_text()
    (line,) = [line for line in text.splitlines() if "fingerprint" in line]
    ids = [row.id for row in made() if row.spec.optimizer == "lhopt"]
    assert line.endswith(f"| {' '.join(map(str, ids))} |")


def test_there_is_nothing_to_report(tmp_path: Path) -> None:
    assert write_report(made(), "full", tmp_path) == []
    assert summaries([], "small") == []
