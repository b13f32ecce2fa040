"""Summaries against a store made by hand, and a report that is all in the store."""

from __future__ import annotations

import base64
import errno
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lhopt_fused.evaluation.contents import contents
from lhopt_fused.evaluation.document import html
from lhopt_fused.evaluation.exchange import read_rows
from lhopt_fused.evaluation.goals import goals, limits, losses
from lhopt_fused.evaluation.optimizers import Configuration
from lhopt_fused.evaluation.report import write_report
from lhopt_fused.evaluation.rows import Circumstances, Row
from lhopt_fused.evaluation.run import CurvePoint, RunResult, RunSpec
from lhopt_fused.evaluation.summary import CONTROL, DEFAULT, TUNED, TaskSummary, overall, summaries

HERE = Circumstances("d" * 64, '{"lhopt-fused": "0.1.0", "torch": "2.7"}', "cpu")
CONSTANT: Configuration = {"lr": 1e-3, "schedule": "constant"}
LINEAR: Configuration = {"lr": 3e-3, "schedule": "linear"}
WORST: Configuration = {"lr": 1e-2, "schedule": "constant"}
COSINE: Configuration = {"name": "cosine", "fingerprint": "f" * 64, "eval_loss": "hidden"}
POLICY = "LHOPT: cosine"
TUNED_LOSSES = {0.5: 3.0, 1.0: 2.0, 2.0: 1.5, 4.0: 1.25}


def result(loss: float, eval_loss: float | None = None, trajectory: bool = False) -> RunResult:
    """Ten steps of 0.1 seconds; of 0.2 under a policy."""
    last = loss if eval_loss is None else eval_loss
    curve = [CurvePoint(0, 0.0, math.nan, 9.0), CurvePoint(5, 1.0, 8.0, 2 * last)]
    curve.append(CurvePoint(10, 2.0, 4.0, last))
    moves = [[0.5, *[1e-3] * 8], [1.0, *[1e-4] * 7, math.nan]] if trajectory else []
    return RunResult(
        10, loss, {"accuracy": 1 - loss / 10}, last, curve, 1.0 + trajectory, 0.5, moves, 77
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
    assert policy.gain is None
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
    assert summary.time_to_target(DEFAULT) == 10
    assert summary.time_to_target(POLICY) == 5
    assert summary.time_to_target(DEFAULT, clock=True) == 2.0
    assert summary.time_to_target("nobody") == math.inf
    found = {item.label: item for item in overall([summary])}
    assert found[POLICY].score == 1.0
    assert found[DEFAULT].score == pytest.approx(2 / 3)
    assert found[POLICY].speedup["tuned"] is not None
    assert found[POLICY].speedup["tuned"].value == pytest.approx(2.0)


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
    shown = replace(spec, configuration={**COSINE, "eval_loss": "shown"})
    rows.append(Row(100, shown, HERE, result(1.25)))
    assert TaskSummary(rows).best.keys() >= {POLICY, f"{POLICY} with eval losses"}


CIAO: Configuration = {"lr": 3e-2, "schedule": "linear"}


def with_control(loss: float, machine: str = "") -> list[Row]:
    """The same with the hand control, at a loss."""
    rows = made()
    for seed in range(3):
        spec = RunSpec("toy", "small", "ciao", CIAO, seed)
        rows.append(Row(len(rows) + 1, spec, HERE, result(loss + 0.1 * (seed - 1)), machine))
    return rows


@pytest.mark.parametrize(
    ("loss", "gain", "win"), [(2.0, 2.0, 1.0), (1.5, 1.0, 0.5), (1.25, 0.5**0.5, 0.0)]
)
def test_what_a_policy_adds_to_the_hand_control(loss: float, gain: float, win: float) -> None:
    """Tuned AdamW reaches these at budgets 1, 2 and halfway from there to 4; the policy's at 2."""
    (policy,) = TaskSummary(with_control(loss)).policies
    assert policy.gain is not None
    assert policy.gain.value == pytest.approx(gain)
    assert policy.wins["control"] == win
    assert policy.control_margin == pytest.approx((loss - 1.5) / 0.1)


def test_nothing_is_known_where_both_are_beyond_all_budgets() -> None:
    rows = [
        replace(r, result=replace(r.result, report_loss=0.5)) if r.spec.optimizer == "lhopt" else r
        for r in with_control(0.5)
    ]
    (policy,) = TaskSummary(rows).policies
    assert policy.speedup["tuned"] is not None
    assert policy.speedup["tuned"].at_least
    assert policy.gain is None


def test_times_of_different_machines_are_not_compared() -> None:
    entries = {e.label: e for e in TaskSummary(with_control(1.5, "elsewhere")).entries}
    assert entries[POLICY].by_the_clock == pytest.approx(1.0)
    assert math.isnan(entries[CONTROL].by_the_clock)
    assert entries[CONTROL].speedup["tuned"] is not None


def test_goals_are_reached_or_not() -> None:
    found = [TaskSummary(made())]
    assert [goal.reached for goal in goals(found, POLICY)] == [True] * 4
    assert losses(found, POLICY) == []
    (default, tuned, *speedups) = goals([TaskSummary(diverged())], POLICY)
    assert (default.reached, default.found, default.asked) == (False, "0 of 1", "all")
    assert (tuned.reached, tuned.asked) == (False, "half")
    assert [goal.reached for goal in speedups] == [False, False]
    assert all(goal.found.startswith("≤ 0.50") for goal in speedups)
    lost = losses([TaskSummary(diverged())], POLICY)
    assert ("Worse than default AdamW on 1 of 1 tasks", "toy") in lost
    assert goals([TaskSummary(without("adamw"))], POLICY) == []


def test_half_of_the_tasks_is_enough_for_one_goal_and_not_for_another() -> None:
    other = [replace(r, spec=replace(r.spec, task="other")) for r in diverged()]
    default, tuned, *_ = goals([TaskSummary(made()), TaskSummary(other)], POLICY)
    assert (default.found, default.reached) == ("1 of 2", False)
    assert (tuned.found, tuned.reached) == ("1 of 2", True)


def test_what_runs_are_too_few_to_tell_is_said() -> None:
    words = dict(limits([TaskSummary(made())]))
    assert words == {
        "Tuned AdamW is the best of fewer than 35 configurations on": "toy (3)",
        "AdamW was run at fewer than 7 budgets on": "toy (4)",
    }
    rows = [r for r in with_control(1.0, "elsewhere") if r.spec.seed == 0]
    words = dict(limits([TaskSummary(rows)]))
    assert words["Fewer than 3 seeds, whose spread says little, on"] == "toy (1)"
    assert "within one only, on" in " ".join(words)


# ---------------------------------------------------------------------- the report


def without(*labels: str) -> list[Row]:
    return [row for row in made() if row.spec.optimizer not in labels]


def diverged() -> list[Row]:
    return [
        replace(r, result=result(math.inf, math.inf)) if r.spec.optimizer == "lhopt" else r
        for r in made()
    ]


CURVES = {"toy_steps.png", "toy_seconds.png"}
BASELINES = {"toy_budgets.png", "profiles_steps.png", "profiles_seconds.png"}


@pytest.mark.parametrize(
    ("rows", "pictures", "words"),
    [
        (
            made,
            CURVES | BASELINES | {"toy_policy0.png", "sizes.png"},
            ["| LHOPT: cosine | 1 | 100% |", "± 0.1", "dddddddddddd", "| all | 1 of 1 | reached |"],
        ),
        (
            lambda: without("adamw"),
            CURVES | {"toy_policy0.png"},
            ["| LHOPT: cosine | 1 | - |", "[toy](#toy)"],
        ),
        (lambda: without("lhopt"), CURVES | BASELINES, ["| AdamW, tuned | 1 | 100% |"]),
        (
            diverged,
            CURVES | BASELINES | {"sizes.png"},
            ["| LHOPT: cosine | diverged |", "≤ 0.50 [0.50, 0.50]", "| not reached |"],
        ),
        (
            lambda: with_control(2.0),
            CURVES | BASELINES | {"toy_policy0.png", "sizes.png"},
            ["## Kernel and policy apart: LHOPT: cosine", "| 2.00 [", "| CIAO, fixed schedule |"],
        ),
    ],
)
def test_a_report_is_written(
    rows: Callable[[], list[Row]], pictures: set[str], words: list[str], tmp_path: Path
) -> None:
    assert write_report(rows(), "small", tmp_path)
    found = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert found == pictures
    text = (tmp_path / "report.md").read_text()
    page = Page.read(tmp_path / "report.html")
    for word in words:
        assert word in text
    assert all(f"pictures/{name}" in text for name in found)
    assert len(page.pictures) == len(found)
    assert page.links <= page.anchors


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.pictures: list[str] = []
        self.metas: list[dict[str, str | None]] = []
        self.others: list[str] = []
        self.open: list[str] = []
        self.words = ""

    @classmethod
    def read(cls, path: Path) -> Page:
        page = cls()
        page.feed(path.read_text())
        page.close()
        assert page.open == []
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if given.get("id"):
            assert f"#{given['id']}" not in self.anchors
            self.anchors.add(f"#{given['id']}")
        if tag == "a":
            self.links.add(given["href"] or "")
        if tag == "img":
            self.pictures.append(given["src"] or "")
        if tag == "meta":
            self.metas.append(given)
        self.others += [tag] if tag in ("link", "script", "iframe") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_page_needs_nothing_else_and_fits_a_phone(tmp_path: Path) -> None:
    write_report(with_control(2.0), "small", tmp_path)
    page = Page.read(tmp_path / "report.html")
    assert all(source.startswith("data:image/png;base64,") for source in page.pictures)
    first = base64.b64decode(page.pictures[0].partition(",")[2])
    assert first == (tmp_path / "pictures" / "profiles_steps.png").read_bytes()
    assert page.others == []
    text = (tmp_path / "report.html").read_text()
    assert "url(" not in text
    assert "http" not in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.metas
    assert text.count("<table>") == text.count('<div class="wide"><table>')


def test_the_page_and_markdown_say_the_same(tmp_path: Path) -> None:
    write_report(with_control(2.0), "small", tmp_path)
    words = "".join(Page.read(tmp_path / "report.html").words.split())
    for line in (tmp_path / "report.md").read_text().splitlines():
        for cell in line.strip("|# ").split(" | "):
            plain = re.sub(r"[*]|^- |!?\[(.*)\]\([^)]*\)", r"\1", cell.strip())
            if not set(plain) <= set("-: "):
                assert "".join(plain.split()) in words, plain


def test_text_is_no_markup(tmp_path: Path) -> None:
    rows = [replace(r, spec=replace(r.spec, task="<b>toy</b>")) for r in made()]
    blocks = contents(summaries(rows, "small"), "rows")
    assert "<b>" not in html(blocks)
    assert "&lt;b&gt;toy" in html(blocks)


def test_numbers_name_their_rows(tmp_path: Path) -> None:
    write_report(made(), "small", tmp_path)
    text = (tmp_path / "report.md").read_text()
    (line,) = [line for line in text.splitlines() if "fingerprint" in line]
    ids = [row.id for row in made() if row.spec.optimizer == "lhopt"]
    assert line.endswith(f"| {' '.join(map(str, ids))} |")
    anchors = Page.read(tmp_path / "report.html").anchors
    assert {f"#row-{row.id}" for row in made()} <= anchors
    kept = read_rows(tmp_path / "rows.jsonl")
    assert [(row.id, row.spec) for row in kept] == [(row.id, row.spec) for row in made()]


def test_a_report_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(made(), "small", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", full)
        with pytest.raises(OSError, match="No space left"):
            write_report(with_control(2.0), "small", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_there_is_nothing_to_report(tmp_path: Path) -> None:
    assert write_report(made(), "full", tmp_path) == []
    assert summaries([], "small") == []
