"""Training runs: they learn, they are the same for one seed, and they resume bit-identically."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lhopt_fused.demo.model import GPTConfig
from lhopt_fused.demo.optimizers import OPTIMIZERS, backend_problem, default_lr
from lhopt_fused.demo.record import COLUMNS, Summary, series
from lhopt_fused.demo.run import (
    RunConfig,
    Training,
    load_checkpoint,
    save_checkpoint,
)
from lhopt_fused.demo.text import InputError, Text
from lhopt_fused.types import INNER_FEATURES

CONFIG = RunConfig(
    steps=24,
    batch=4,
    lr=1e-2,
    backend="reference",
    threads=1,
    model=GPTConfig(context=16, width=16, layers=1, heads=2),
)
TIMES = ("optimizer_ms", "step_ms", "outer_ms")


@pytest.fixture
def text():
    return Text.split(b"what is learned here is short and easy. " * 100, 0.1, context=16)


def finished(training: Training) -> Training:
    while not training.is_done:
        training.advance()
    return training


def without_times(training: Training) -> list[list[float]]:
    columns = [name for name in COLUMNS if name not in TIMES]
    return [[row[name] for name in columns] for row in training.rows]


def assert_same(one: Training, other: Training) -> None:
    rows, other_rows = (torch.tensor(without_times(t), dtype=torch.float64) for t in (one, other))
    torch.testing.assert_close(rows, other_rows, rtol=0, atol=0, equal_nan=True)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loss_falls_and_rows_are_complete(text, optimizer):
    config = replace(CONFIG, optimizer=optimizer, lr=5 * default_lr(optimizer, "cosine", 0))
    training = finished(Training(config, text))
    _, losses = series(training.rows, "eval_loss")
    assert losses[-1] < losses[0] - 0.5
    assert training.rows[-1]["step"] == config.steps
    measured = {name for name in INNER_FEATURES if series(training.rows, name)[0]}
    expected = set() if optimizer == "torch" else set(INNER_FEATURES)
    clips = optimizer in ("ciao", "lhopt")
    assert measured == (expected if clips else expected - {"did_grad_clip"})
    summary = Summary(training.rows)
    assert 0 < summary.optimizer_share < 1
    assert (0 < summary.outer_seconds < summary.seconds) == (optimizer != "torch")


def test_lhopts_policy_sees_the_losses_and_moves_the_learning_rate(text):
    training = finished(
        Training(replace(CONFIG, optimizer="lhopt", policy="cosine", steps=64), text)
    )
    assert [step.inner_step for step in training.history] == [16, 32, 48, 64]
    losses = [row["train_loss"] for row in training.rows[1:]]  # a row for each step
    for step in training.history:
        mean = sum(losses[step.inner_step - 16 : step.inner_step]) / 16
        assert step.train_loss == pytest.approx(mean)
        lr = CONFIG.lr * (1 + math.cos(math.pi * step.progress)) / 2
        assert step.hyperparameters["lr"] == pytest.approx(lr, abs=1e-8)
    rows = [row for row in training.rows if not math.isnan(row["log_noise_scale"])]
    assert [row["step"] for row in rows] == [16, 32, 48, 64]


def test_adamw_follows_torchs(text):
    ours, torchs = (
        finished(Training(replace(CONFIG, optimizer=name), text)) for name in ("adamw", "torch")
    )
    assert ours.evaluate() == pytest.approx(torchs.evaluate(), abs=1e-3)


def test_one_seed_gives_one_run(text):
    assert_same(finished(Training(CONFIG, text)), finished(Training(CONFIG, text)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_run_is_bit_identical(tmp_path, text, optimizer):
    config = replace(CONFIG, optimizer=optimizer, steps=230)  # 2 steps in a row of measurements
    first = Training(config, text)
    for _ in range(25):
        first.advance()
    save_checkpoint(tmp_path / "checkpoint.pt", first, ["a.txt"])
    saved = load_checkpoint(tmp_path / "checkpoint.pt")
    assert saved["config"] == config
    resumed = Training(saved["config"], text)
    resumed.load_state_dict(saved["training"])
    for training in (first, resumed):
        for _ in range(25):
            training.advance()
    assert_same(first, resumed)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_other_files_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"format": "another"}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="is not a checkpoint of lhopt train"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch", -1),
        ("threads", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("eval_fraction", 1.0),
        ("seed", -1),
        ("optimizer", "sgd"),
        ("backend", "tpu"),
    ],
)
def test_config_names_the_option_it_refuses(name, value):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: "):
        replace(CONFIG, **{name: value})


def test_reference_backend_runs_everywhere():
    assert backend_problem("reference") is None
