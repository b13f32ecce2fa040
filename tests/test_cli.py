"""The command line: what a stranger types, and what happens when it is wrong."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lhopt_fused import __version__
from lhopt_fused.cli import app
from lhopt_fused.demo import run

SMALL = "--context 16 --width 16 --layers 1 --heads 2 --batch 4 --threads 1 --backend reference"


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"what is learned here is short and easy. " * 50)
    return path


def lhopt(*arguments: str | Path) -> Result:
    """Run ``lhopt`` with strings split at spaces and paths as they are."""
    split = [
        part
        for argument in arguments
        for part in (argument.split() if isinstance(argument, str) else [str(argument)])
    ]
    return CliRunner().invoke(app, split, env={"COLUMNS": "300"})


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_version():
    assert lhopt("--version").output == f"lhopt-fused {__version__}\n"


def test_info_names_every_backend():
    result = lhopt("info")
    assert result.exit_code == 0
    for word in ("torch", "instruction sets", "backend reference", "backend cpu", "backend triton"):
        assert word in result.output


def test_demo_trains_three_optimizers_and_draws_them(tmp_path):
    result = lhopt("demo --steps 5 --threads 1 --backend reference --out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(tmp_path)
    for name in run.OPTIMIZERS.values():
        losses = [float(row["eval_loss"]) for row in rows if row["optimizer"] == name]
        assert name in result.output
        assert losses[-1] < losses[0] - 0.1


def test_train_writes_metrics_picture_and_checkpoint(tmp_path, text_file):
    result = lhopt("train --steps 8", SMALL, "--text", text_file, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "metrics.csv",
        "runs.png",
        "checkpoint.pt",
    }
    assert rows_of(tmp_path / "run")[-1]["step"] == "8"


@pytest.mark.parametrize("optimizer", run.OPTIMIZERS)
def test_ctrl_c_saves_and_resume_goes_on_bit_identically(
    tmp_path, text_file, optimizer, monkeypatch
):
    command = f"train --steps 10 --optimizer {optimizer} {SMALL}"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert lhopt(command, "--text", text_file, "--out", whole).exit_code == 0

    advance = run.Training.advance

    def interrupted(self: run.Training) -> None:
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(run.Training, "advance", interrupted)
        result = lhopt(command, "--text", text_file, "--out", stopped)
    assert result.exit_code == 130
    assert f"lhopt train --resume {stopped / 'checkpoint.pt'}" in result.output

    result = lhopt("train --resume", stopped / "checkpoint.pt")
    assert result.exit_code == 0, result.output
    one, other = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
        for folder in (whole, stopped)
    )
    assert one["step"] == other["step"] == 10
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    losses = [[row["train_loss"] for row in rows_of(folder)] for folder in (whole, stopped)]
    assert losses[0] == losses[1]
    assert_refused(lhopt("train --resume", stopped / "checkpoint.pt"), "has done all its 10 steps")


def test_resume_refuses_other_options_and_another_text(tmp_path, text_file):
    out = tmp_path / "run"
    lhopt("train --steps 1", SMALL, "--text", text_file, "--out", out)
    checkpoint = out / "checkpoint.pt"
    assert_refused(lhopt("train --lr 1 --resume", checkpoint), "--lr", "leave it out")
    text_file.write_bytes(b"another text. " * 200)
    assert_refused(lhopt("train --resume", checkpoint), "is not the text that the run began with")
    text_file.unlink()
    assert_refused(lhopt("train --resume", checkpoint), "cannot read", "text.txt")
    assert_refused(lhopt("train --resume", __file__), "is not a checkpoint")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--steps 0", ("--steps", ">= 1")),
        ("--batch 0", ("--batch", ">= 1")),
        ("--layers -1", ("--layers", ">= 1")),
        ("--threads 0", ("--threads", ">= 1")),
        ("--width 130", ("130 does not split into 4 heads",)),
        ("--lr nan", ("--lr", "> 0")),
        ("--eval-fraction 1", ("--eval-fraction", "(0, 1)")),
        ("--context 2000", ("--text", "2,000 bytes", "smaller --context")),
        ("--optimizer sgd", ("--optimizer", "adamw", "ciao", "torch")),
        ("--backend tpu", ("--backend", "reference", "cpu", "triton")),
    ],
)
def test_bad_options_are_refused(tmp_path, text_file, options, words):
    result = lhopt("train", options, "--text", text_file, "--out", tmp_path / "run")
    assert_refused(result, *words)
    assert not (tmp_path / "run").exists()


def test_bad_files_are_refused(tmp_path, text_file):
    assert_refused(lhopt("train"), "--text", "is missing")
    assert_refused(lhopt("train --text", tmp_path / "none.txt"), "does not exist")
    assert_refused(lhopt("train --text", tmp_path), "is a directory")
    (tmp_path / "empty.txt").touch()
    assert_refused(lhopt("train --text", tmp_path / "empty.txt"), "has 0 bytes")
    under_a_file = text_file / "run"
    result = lhopt("train", SMALL, "--text", text_file, "--out", under_a_file)
    assert_refused(result, "--out", "cannot write")
    assert_refused(lhopt("demo --out", under_a_file), "--out", "cannot write")


def test_backend_that_cannot_run_is_refused(text_file, monkeypatch):
    monkeypatch.setattr(run, "backend_problem", lambda backend: "no such device")
    result = lhopt("train --backend cpu --context 16 --text", text_file)
    assert_refused(result, "'cpu' cannot run here: no such device")
