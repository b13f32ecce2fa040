"""The command: from nothing to a report, again from the store, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lhopt_fused.cli import app
from lhopt_fused.evaluation import command
from lhopt_fused.evaluation.store import Store
from lhopt_fused.evaluation.tasks import SHORT, TASKS, fashion


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def invoke(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["eval", *arguments])
    return found.exit_code, " ".join(found.output.split())


@pytest.mark.usefixtures("toy")
def test_an_evaluation_from_nothing_and_again(tmp_path: Path) -> None:
    options = ("--tasks", "toy", "--quick", "--seeds", "2", "--workers", "1", "--policy", "cosine")
    out = str(tmp_path / "one")
    code, output = invoke(*options, "--out", out)
    assert code == 0
    assert "configurations: 22 runs, 0 of them in the store" in output
    assert "budgets: 8 runs, 0 of them in the store" in output
    report = tmp_path / "one" / "report.md"
    text = report.read_text()
    for label in ("AdamW, default", "Muon", "Prodigy", "Schedule-Free", "CIAO", "LHOPT: cosine"):
        assert f"| {label}" in text
    assert len(Store(tmp_path / "one" / "runs.sqlite").rows()) == 30

    report.unlink()
    found = CliRunner().invoke(app, ["report", out])
    assert (found.exit_code, report.read_text()) == (0, text)
    assert "runs," not in found.output

    code, output = invoke(*options, "--out", out)
    assert "configurations: 22 runs, 22 of them in the store" in output
    assert report.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--tasks", "chess"), "--tasks: 'chess' is none of language_model_narrow,"),
        (("--size", "huge"), "--size: 'huge' is none of small, full"),
        (("--optimizers", "adamw,sgd"), "--optimizers: 'sgd' is none of adamw,"),
        (("--policy", "none"), "there is no policy 'none'"),
        (("--tasks", "gmf"), "MovieLens not found: give --data-dir; get it from"),
        (("--tasks", "fashion_mlp"), "Fashion-MNIST not found: expected"),
        (("--device", "cuda"), "--device is cuda, but torch finds no GPU here"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, ...], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fashion, "_SYSTEM", tmp_path / "not-installed")
    fashion.fashion_splits.cache_clear()
    code, output = invoke(*arguments, "--out", str(tmp_path / "out"))
    assert code == 2
    assert f"Error: {problem}" in output


def test_an_empty_store_has_no_report(tmp_path: Path) -> None:
    Store(tmp_path / "runs.sqlite")
    found = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert found.exit_code == 0
    assert "There are no such runs in" in found.output


def test_quick_is_for_a_first_look() -> None:
    given = ("all", "small", "adamw", [], False)
    whole, quick, asked = (
        command._plan(*given, seeds=None, quick=False),
        command._plan(*given, seeds=None, quick=True),
        command._plan("resnet", *given[1:], seeds=2, quick=True),
    )
    assert (list(whole.tasks), whole.seeds) == (list(TASKS), 3)
    assert (list(quick.tasks), quick.seeds) == (list(SHORT), 1)
    assert set(SHORT) < set(TASKS)
    assert (asked.tasks, asked.seeds) == (["resnet"], 2)
