"""Stopped, killed, on a full disk, twice at once: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from evaluation.toys import fill_disk
from typer.testing import CliRunner

from lhopt_fused.cli import app
from lhopt_fused.evaluation.store import Store

OPTIONS = (
    *("eval", "--tasks", "toy", "--optimizers", "adamw,ciao,lhopt", "--policy", "cosine"),
    *("--quick", "--seeds", "3"),
)
RUNS = 3 * (6 + 1 + 1) + 3 * 2 * 2  # of the first stage, and of two budgets
LONGEST_SECONDS = 300.0  # until a test gives up


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start(out: Path, workers: int) -> subprocess.Popen[str]:
    """The command in a process group of its own, as in a terminal."""
    script = Path(__file__).parent / "slow_toy.py"
    return subprocess.Popen(
        [sys.executable, str(script), *OPTIONS, "--workers", str(workers), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_rows(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Until there are so many in the store."""
    path = out / "runs.sqlite"
    give_up = time.monotonic() + LONGEST_SECONDS
    while not path.exists() or path.stat().st_size == 0 or len(Store(path).rows()) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up
        time.sleep(0.02)


def finish(out: Path) -> str:
    """The same command to its end, here."""
    found = CliRunner().invoke(app, [*OPTIONS, "--workers", "1", "--out", str(out)])
    assert found.exit_code == 0, found.output
    return " ".join(found.output.split())


def content(out: Path) -> list[str]:
    return list(map(repr, Store(out / "runs.sqlite").rows()))


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("number", "workers", "code"),
    [
        (signal.SIGINT, 1, 130),
        (signal.SIGINT, 2, 130),
        (signal.SIGTERM, 1, 130),
        (signal.SIGKILL, 2, -signal.SIGKILL),
    ],
)
def test_what_was_done_stays_and_the_rest_is_done_once(
    number: int, workers: int, code: int, tmp_path: Path
) -> None:
    process = start(tmp_path, workers)
    wait_for_rows(process, tmp_path, 3)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=LONGEST_SECONDS)[0]
    assert process.returncode == code
    assert ("the same command goes on from here" in output) == (code == 130)
    before = content(tmp_path)
    assert 3 <= len(before) < RUNS
    output = finish(tmp_path)
    assert f"configurations: 24 runs, {min(24, len(before))} of them in the store" in output
    after = content(tmp_path)
    assert (after[: len(before)], len(after)) == (before, RUNS)


@pytest.mark.usefixtures("toy")
def test_a_stop_while_processes_begin(tmp_path: Path) -> None:
    """They are hit by the same Ctrl-C before they have said that it is not for them."""
    process = start(tmp_path, 2)
    assert process.stdout is not None
    for line in process.stdout:
        if "configurations: 24 runs" in line:
            break
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=LONGEST_SECONDS)[0]
    assert process.returncode == 130, output
    assert "the same command goes on from here" in output
    finish(tmp_path)
    assert len(content(tmp_path)) == RUNS


@pytest.mark.usefixtures("toy")
def test_two_commands_share_a_store(tmp_path: Path) -> None:
    processes = [start(tmp_path, 1) for _ in range(2)]
    for process in processes:
        output = process.communicate(timeout=LONGEST_SECONDS)[0]
        assert process.returncode == 0, output
    assert len(content(tmp_path)) == RUNS
    report = (tmp_path / "report.md").read_text()
    assert "24 of them" in finish(tmp_path)
    assert (tmp_path / "report.md").read_text() == report
    assert not list(tmp_path.rglob(".report*"))


@pytest.mark.usefixtures("toy")
def test_a_disk_that_is_full_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path / "runs.sqlite")
    with monkeypatch.context() as patch:
        fill_disk(patch)
        found = CliRunner().invoke(app, [*OPTIONS, "--workers", "1", "--out", str(tmp_path)])
    assert found.exit_code == 2
    assert "Error: the store" in found.output
    assert "database or disk is full. Nothing that was in it is lost" in found.output
    before = content(tmp_path)
    assert len(before) < RUNS
    finish(tmp_path)
    after = content(tmp_path)
    assert (after[: len(before)], len(after)) == (before, RUNS)
