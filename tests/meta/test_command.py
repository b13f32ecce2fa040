"""``lhopt meta-train``: what it writes, how it stops, goes on, and refuses."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from meta.runs import CHANGES, Inline, outcome, same, trained
from typer.testing import CliRunner, Result

from lhopt_fused.cli import app
from lhopt_fused.meta import command
from lhopt_fused.policy import load_policy

PNG = b"\x89PNG"


def arguments(folder: Path, *more: str) -> list[str]:
    """Of a small run, with the changes of other tests."""
    changes = [part for change in CHANGES for part in ("--set", change)]
    return ["meta-train", "tiny", "--out", str(folder), *changes, *more]


def lhopt(*words: str) -> Result:
    return CliRunner().invoke(app, words, env={"COLUMNS": "300"})


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output


@pytest.fixture
def inline(monkeypatch) -> Inline:
    """Workers of a command in this process."""
    workers = Inline()
    monkeypatch.setattr(command, "_workers", lambda config, ray: workers)
    return workers


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


@pytest.mark.filterwarnings("default")  # tensorboard's own
def test_a_run_writes_everything_and_goes_on(inline, tmp_path):
    first = lhopt(*arguments(tmp_path, "--set", "updates=3"))
    assert first.exit_code == 0, first.output
    assert "Meta-training 'tiny'" in first.output
    assert "Going on" not in first.output
    for phase in ("hand control", "imitation", "what to beat", "validation", "PPO"):
        assert phase in first.output
    assert load_policy(tmp_path / "tiny.safetensors").trained_on["updates"] == 3
    assert (tmp_path / "training.png").read_bytes().startswith(PNG)
    second = lhopt(*arguments(tmp_path))
    assert second.exit_code == 0, second.output
    assert "Going on after update 3, 24 episodes" in second.output
    assert load_policy(tmp_path / "tiny.safetensors").trained_on["updates"] == 5
    shown = scalars(tmp_path)
    _, rows = outcome(tmp_path)
    assert [step for step, _ in shown["reward"]] == [8, 16, 24, 32, 40]
    assert [value for _, value in shown["ppo/entropy"]] == pytest.approx(
        [row["entropy"] for row in rows]
    )
    assert [step for step, _ in shown["validation/beats_control"]] == [16, 32]


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    """The one signal comes in the middle; the twin was never stopped."""
    code = f"""
import os, signal
from lhopt_fused.meta import command
from lhopt_fused.cli import app

plain = command._Record.update
def update(self, update):
    if update.index == 2:
        os.kill(os.getpid(), signal.SIGINT)
    plain(self, update)
command._Record.update = update
if __name__ == "__main__":
    app({arguments(tmp_path / "stopped", "--workers", "1")!r})
"""
    stopped = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert stopped.returncode == 130, stopped.stderr.decode()
    assert b"Stopped and saved: the same command goes on" in stopped.stdout
    trained(tmp_path / "stopped", Inline(), "workers=1")
    trained(tmp_path / "whole", Inline())
    one, other = outcome(tmp_path / "stopped"), outcome(tmp_path / "whole")
    for state in (one[0], other[0]):
        state["config"]["workers"] = None
    assert same(one, other)


def test_ctrl_c_before_the_first_update_keeps_nothing(inline, tmp_path, monkeypatch):
    found = inline.start

    def start(jobs):
        signal.raise_signal(signal.SIGINT)
        return found(jobs)

    monkeypatch.setattr(inline, "start", start)
    result = lhopt(*arguments(tmp_path))
    assert result.exit_code == 130
    assert "Stopped before the first update: the same command begins again" in result.output
    assert not (tmp_path / "checkpoint.pt").exists()


def test_minutes_and_workers_are_options(tmp_path):
    assert_refused(lhopt(*arguments(tmp_path, "--minutes", "0")), "minutes is 0.0, expected more")
    assert_refused(lhopt(*arguments(tmp_path, "--workers", "0")), "workers is 0, expected at least")
    assert not list(tmp_path.iterdir())


def test_wrong_input_is_refused(inline, tmp_path):
    assert_refused(lhopt("meta-train", "huge"), "'huge': the shipped ones are ablation, cluster")
    assert_refused(lhopt("meta-train", "tiny", "--set", "seeds=1"), "no key seeds; did you mean")
    assert_refused(lhopt("meta-train", "gpu"), "device is 'cuda'", "torch finds no GPU here")
    (tmp_path / "file").touch()
    assert_refused(lhopt(*arguments(tmp_path / "file")), "File exists")
    assert_refused(lhopt(*arguments(tmp_path, "--data-dir", str(tmp_path / "none"))), "none")


def test_the_folder_of_another_run_is_refused(inline, tmp_path):
    trained(tmp_path, Inline(), "updates=1")
    result = lhopt(*arguments(tmp_path, "--set", "seed=4"))
    assert_refused(result, "checkpoint.pt was written with seed = 0, the configuration has 4")


def test_data_that_is_not_there_is_named(inline, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = lhopt(*arguments(tmp_path / "run", "--data-dir", str(empty)))
    assert_refused(result, f"{empty} has no folder images or text")


@pytest.mark.parametrize(
    ("module", "extra", "more"),
    [("dacite", "meta", []), ("tensorboard", "meta", []), ("ray", "ray", ["--ray", "local"])],
)
def test_a_missing_extra_is_named(tmp_path, module, extra, more):
    code = f"""
import sys
sys.modules[{module!r}] = None
from lhopt_fused.cli import app
app({arguments(tmp_path, *more)!r})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 2, result.stderr.decode()
    assert f"pip install 'lhopt-fused[{extra}]'".encode() in result.stderr
    assert b"Traceback" not in result.stderr
