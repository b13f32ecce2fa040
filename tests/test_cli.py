"""The command line: what a stranger types, and what happens when it is wrong."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from policy.samples import random_policy
from typer.testing import CliRunner, Result

import lhopt_fused
from lhopt_fused import __version__
from lhopt_fused.cli import app
from lhopt_fused.demo import optimizers, run
from lhopt_fused.history import OuterStep, read_csv, write_csv
from lhopt_fused.policy import save_policy

PNG = b"\x89PNG"
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


@pytest.mark.parametrize("arguments", ["--help", "--version", "demo --help", "policy --help"])
def test_help_does_not_wait_for_torch(arguments):
    """Which takes seconds to load; the twin shows that it would be noticed."""
    code = "import sys; from lhopt_fused.cli import app; app({}, standalone_mode=False); {}"
    say = "print('loaded', [name for name in ('torch', 'numpy') if name in sys.modules])"
    asked, loaded = (
        subprocess.run(
            [sys.executable, "-c", code.format(words, say)], capture_output=True, check=True
        ).stdout.decode()
        for words in (arguments.split(), ["policy", "list"])
    )
    assert asked.splitlines()[-1] == "loaded []"
    assert loaded.splitlines()[-1] == "loaded ['torch', 'numpy']"


def test_the_package_has_the_names_that_it_says():
    for name in lhopt_fused.__all__:
        assert getattr(lhopt_fused, name) is not None
        assert name in dir(lhopt_fused)
    with pytest.raises(AttributeError, match="has no attribute 'SGD'"):
        _ = lhopt_fused.SGD


def test_info_names_every_backend():
    result = lhopt("info")
    assert result.exit_code == 0
    for word in ("torch", "instruction sets", "backend reference", "backend cpu", "backend triton"):
        assert word in result.output


def test_demo_trains_four_optimizers_and_draws_them(tmp_path):
    result = lhopt("demo --steps 5 --threads 1 --backend reference --out", tmp_path)
    assert result.exit_code == 0, result.output
    for picture in ("runs.png", "history.png"):
        assert (tmp_path / picture).read_bytes().startswith(PNG)
    assert [step.inner_step for step in read_csv(tmp_path / "history.csv")] == [5]
    assert "LHOPT's 1 outer steps" in result.output
    assert "% of everything" in result.output
    rows = rows_of(tmp_path)
    for name in optimizers.OPTIMIZERS.values():
        losses = [float(row["eval_loss"]) for row in rows if row["optimizer"] == name]
        assert name in result.output
        assert losses[-1] < losses[0] - 0.1


def test_demo_takes_a_policy(tmp_path, policy_file):
    small = "demo --steps 2 --threads 1 --backend reference"
    result = lhopt(small, "--policy", policy_file, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert f"LHOPT, moved by its policy '{policy_file}'" in " ".join(result.output.split())
    refused = lhopt(small, "--policy", "magic", "--out", tmp_path / "not")
    assert_refused(refused, "--policy", "there is no policy 'magic'")
    assert not (tmp_path / "not").exists()


def test_train_writes_metrics_picture_and_checkpoint(tmp_path, text_file):
    result = lhopt("train --steps 8", SMALL, "--text", text_file, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "metrics.csv",
        "runs.png",
        "checkpoint.pt",
    }
    assert rows_of(tmp_path / "run")[-1]["step"] == "8"


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
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
    if optimizer == "lhopt":
        assert (whole / "history.csv").read_text() == (stopped / "history.csv").read_text()
    assert_refused(lhopt("train --resume", stopped / "checkpoint.pt"), "has done all its 10 steps")


def test_a_run_stopped_before_its_first_row_leaves_a_picture(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(run, "_ROWS", 1)
    advance = run.Training.advance

    def interrupted(self: run.Training) -> None:
        signal.raise_signal(signal.SIGINT)
        advance(self)

    monkeypatch.setattr(run.Training, "advance", interrupted)
    command = f"train --steps 40 --optimizer lhopt {SMALL}"
    result = lhopt(command, "--text", text_file, "--out", tmp_path / "run")
    assert result.exit_code == 130, result.output
    assert (tmp_path / "run" / "runs.png").read_bytes().startswith(PNG)
    assert not (tmp_path / "run" / "history.csv").exists()


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
        ("--policy fixed", ("--policy", "is for --optimizer lhopt")),
        ("--optimizer lhopt --policy magic", ("--policy", "there is no policy 'magic'")),
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
    monkeypatch.setattr(optimizers, "backend_problem", lambda backend: "no such device")
    result = lhopt("train --backend cpu --context 16 --text", text_file)
    assert_refused(result, "'cpu' cannot run here: no such device")


# ---------------------------------------------------------------------- policies


@pytest.fixture
def policy_file(tmp_path):
    path = tmp_path / "random.safetensors"
    save_policy(random_policy(0), path)
    return path


def test_train_with_a_policy_file_and_resume(tmp_path, text_file, policy_file):
    out = tmp_path / "run"
    command = f"train --steps 40 --optimizer lhopt {SMALL}"
    result = lhopt(command, "--policy", policy_file, "--text", text_file, "--out", out)
    assert result.exit_code == 0, result.output
    history = read_csv(out / "history.csv")
    start = random_policy(0).start_hyperparameters["lr"]
    assert history[0].hyperparameters["lr"] == pytest.approx(
        start * math.exp(history[0].shifts["lr"])
    )
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["config"]["policy"] == str(policy_file)
    saved["training"]["step"] = 39
    torch.save(saved, out / "checkpoint.pt")
    save_policy(random_policy(1), policy_file)
    result = lhopt("train --resume", out / "checkpoint.pt")
    assert_refused(result, "--resume", "does not fit", "fingerprint")
    policy_file.unlink()
    assert_refused(lhopt("train --resume", out / "checkpoint.pt"), "--policy", "there is no policy")


def test_policy_list_names_the_built_in_ones():
    result = lhopt("policy list")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines] == ["cosine", "default", "fixed", "restarts"]
    assert "The learning rate follows half a cosine to 0" in lines[0]
    assert ["registers" in line for line in lines] == [False, False, False, True]


def test_policy_inspect_shows_what_a_policy_is(policy_file):
    result = lhopt("policy inspect", policy_file)
    assert result.exit_code == 0, result.output
    for word in ("format version", "features", "LSTM of width 32", "trained on", "commit"):
        assert word in result.output
    assert "loads, saves and swaps 3" in result.output
    result = lhopt("policy inspect cosine")
    assert "lr: cosine to 0 of its start" in result.output
    for action in random_policy(0).action_space.actions:
        assert action.name in result.output
    assert_refused(lhopt("policy inspect magic"), "there is no policy 'magic'")


def test_policy_validate_says_yes_or_why_not_in_one_line(tmp_path, policy_file):
    result = lhopt("policy validate", policy_file)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        f"{policy_file} is a valid policy: random, a learned policy (LSTM of width 32), with "
        "restart registers"
    ]
    broken = tmp_path / "broken.safetensors"
    whole = policy_file.read_bytes()
    for content, reason in (
        (whole[:-1], "is not a safetensors file"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "sha256"),
        (b"\x80\x04K\x01.", "is not a safetensors file"),
        (whole.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1), "dtype I32"),
    ):
        broken.write_bytes(content)
        result = lhopt("policy validate", broken)
        assert_refused(result, str(broken), reason)
        assert len(result.output.splitlines()) == 1
    assert_refused(lhopt("policy validate", tmp_path), "is a directory")
    assert_refused(lhopt("policy validate", tmp_path / "none"), "there is no file")


def test_what_a_file_says_is_printed_as_plain_text(tmp_path):
    rule = tmp_path / "rule.json"
    rule.write_text(json.dumps({"[red]a\n\x1b[2J\ud800": 1}))
    result = lhopt("policy validate", rule)
    assert_refused(result, str(rule))
    assert len(result.output.splitlines()) == 1
    assert "\x1b" not in result.output


# ---------------------------------------------------------------------- plots


def outer_steps(count: int, **fields: Any) -> list[OuterStep]:
    """A history of a policy that halves the learning rate each time."""
    names = ("lr", "weight_decay", "group_clip_grad_norm")
    return [
        OuterStep(
            **{
                "outer_step": k + 1,
                "inner_step": 10 * (k + 1),
                "progress": (k + 1) / count,
                "train_loss": 4.0 / (k + 1),
                "eval_loss": None,
                "features": {"log_noise_scale": 0.1 * k},
                "shifts": dict.fromkeys(names, 0.0) | {"lr": -math.log(2)},
                "register": "keep",
                "hyperparameters": dict.fromkeys(names, 0.5) | {"lr": 0.1 / 2 ** (k + 1)},
            }
            | fields
        )
        for k in range(count)
    ]


@pytest.mark.parametrize(
    "history",
    [
        outer_steps(8),
        outer_steps(1),
        outer_steps(8, eval_loss=1.0, features={}),
        outer_steps(8, train_loss=math.nan, hyperparameters={}, shifts={}),
        outer_steps(8, train_loss=math.inf, eval_loss=math.inf),
    ],
    ids=["usual", "single", "no features", "nothing", "infinite"],
)
def test_plot_draws_a_history(tmp_path, history):
    write_csv(history, tmp_path / "history.csv")
    result = lhopt("plot", tmp_path / "history.csv")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "history.png").read_bytes().startswith(PNG)
    other = tmp_path / "other.picture"
    assert lhopt("plot", tmp_path / "history.csv", "--out", other).exit_code == 0
    assert other.read_bytes().startswith(PNG)


def test_plot_refuses_what_is_no_history(tmp_path):
    path = tmp_path / "history.csv"
    assert_refused(lhopt("plot", path), "HISTORY", "cannot read")
    for content, reason in (
        (b"", "no outer step"),
        (b"a,b\n1,2\n", "no column 'outer_step'"),
        (b"\xff\xfe\n\xff", "not a history"),
    ):
        path.write_bytes(content)
        assert_refused(lhopt("plot", path), "HISTORY", reason)
    write_csv(outer_steps(2), path)
    path.write_text(path.read_text().replace("4.0", "four"))
    assert_refused(lhopt("plot", path), "HISTORY", "line 2", "four")
    write_csv(outer_steps(2), path)
    assert_refused(lhopt("plot", path, "--out", tmp_path / "none" / "a.png"), "--out", "No such")
