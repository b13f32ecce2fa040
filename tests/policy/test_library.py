"""Built-in policies and rules: found by name, acting as described, refused by field."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy.samples import START, START_ROW, observation, of_run, random_policy

from lhopt_fused import LHOPT
from lhopt_fused.policy import (
    LearnedPolicy,
    PolicyFileError,
    RulePolicy,
    RunObservation,
    builtin_policies,
    load_policy,
    save_policy,
)

COSINE = {
    "format_version": 1,
    "name": "mine",
    "description": "x",
    "start_hyperparameters": START,
    "schedules": {"lr": {"shape": "linear", "final": 0.5}},
}


def seen(progress: float, hyperparameters: list[float] | None = None) -> RunObservation:
    one = of_run(observation(torch.Generator().manual_seed(0), 1, progress), 0)
    return one._replace(hyperparameters=hyperparameters or START_ROW.tolist())


def test_the_built_in_ones() -> None:
    assert builtin_policies() == ["cosine", "default", "fixed", "restarts"]
    for name in builtin_policies():
        policy = load_policy(name)
        assert policy.name == name
        start = dict(policy.start_hyperparameters)
        assert start | {"lr": 0} == START | {"lr": 0}


@pytest.mark.parametrize("name", ["default", "restarts"])
def test_learned_ones_say_on_what_and_are_small(name: str) -> None:
    policy = load_policy(name)
    assert isinstance(policy, LearnedPolicy)
    assert policy.action_space.registers == (name == "restarts")
    assert {"config", "control", "validation", "episodes", "hours"} <= policy.trained_on.keys()
    assert policy.start_hyperparameters["lr"] <= policy.trained_on["control"]["lr"]
    folder = resources.files("lhopt_fused.policy") / "builtin"
    with resources.as_file(folder / f"{name}.safetensors") as path:
        assert path.stat().st_size < 5e6
    assert "## Limits" in (folder / f"{name}.md").read_text()


@pytest.mark.parametrize("rises", [False, True])
def test_restarts_goes_back_where_the_eval_loss_rose(rises: bool) -> None:
    """It keeps the state with the lowest eval loss, and ends near it, not where training went."""
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = LHOPT([parameter], 200, outer_steps=20, policy="restarts", restart_registers=3)
    at_best = parameter.detach().clone()
    for step in range(200):
        parameter.grad = torch.full_like(parameter, 1.0)
        rest = abs(step - 100) / 100 if rises else 1 - step / 200
        optimizer.observe(2.0 - step / 200, 1.0 + rest)
        optimizer.step()
        if step == 99:
            at_best.copy_(parameter.detach())
    choices = [outer_step.register for outer_step in optimizer.history]
    assert "save_0" in choices[:10]
    assert ("load_0" in choices[-3:]) == rises
    moved = (parameter - at_best).norm() / (at_best - 1).norm()
    assert (moved < 0.2) == rises


def test_fixed_never_acts() -> None:
    """Not by a bit, and not even on values out of bounds."""
    run = load_policy("fixed").start_run()
    values = [7.0, 1 / 3, 0.5, 0.0, math.nan, 0.1, 0.2, 0.3]
    decision = run.decide(seen(0.5, values))
    assert np.array_equal(decision.hyperparameters, values, equal_nan=True)
    assert not decision.shifts.any()
    assert decision.register == 0


def test_cosine_follows_a_cosine_through_log_multipliers() -> None:
    run = load_policy("cosine").start_run()
    values = START_ROW.tolist()
    for step in range(21):
        decision = run.decide(seen(step / 20, values))
        before, values = values, decision.hyperparameters.tolist()
        expected = max(1e-3 * (1 + math.cos(math.pi * step / 20)) / 2, 1e-8)
        assert values[0] == pytest.approx(expected, rel=1e-12)
        assert values[0] == pytest.approx(before[0] * math.exp(decision.shifts[0]), rel=1e-12)
        assert values[1:] == START_ROW.tolist()[1:]
    assert values[0] == 1e-8  # the bound of its action


def test_cosine_takes_the_start_of_the_run() -> None:
    start = START_ROW.tolist()
    start[0] = 0.1
    one = seen(0.5, start)._replace(start_hyperparameters=start)
    decision = load_policy("cosine").start_run().decide(one)
    assert decision.hyperparameters[0] == pytest.approx(0.05)


def test_rules_remember_nothing() -> None:
    run = load_policy("cosine").start_run(mode="sample", seed=3)
    run.set_state(run.get_state())
    with pytest.raises(ValueError, match="3 numbers, expected 0 for a rule"):
        run.set_state(np.zeros(3))
    with pytest.raises(ValueError, match="progress is 2"):
        run.decide(seen(2.0))
    with pytest.raises(ValueError, match="mode is 'x'"):
        load_policy("cosine").start_run(mode="x")


def test_files_load_through_the_same_door(tmp_path: Path) -> None:
    save_policy(random_policy(0), tmp_path / "learned.safetensors")
    (tmp_path / "rule.json").write_text(json.dumps(COSINE))
    assert isinstance(load_policy(tmp_path / "learned.safetensors"), LearnedPolicy)
    rule = load_policy(str(tmp_path / "rule.json"))
    assert isinstance(rule, RulePolicy)
    assert rule.start_run().decide(seen(1.0)).hyperparameters[0] == pytest.approx(5e-4)
    names = "cosine, default, fixed"
    with pytest.raises(FileNotFoundError, match=f"'fixd': the built-in ones are {names}"):
        load_policy("fixd")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, r"rule\.format_version is 2, expected 1"),
        ({"format_version": True}, r"rule\.format_version is True"),
        ({"schedules": []}, r"rule\.schedules is"),
        ({"schedules": {"lrr": {"shape": "cosine", "final": 0}}}, r"schedules\.lrr is for no"),
        ({"schedules": {"lr": {"shape": "sine", "final": 0}}}, r"schedules\.lr\.shape is 'sine'"),
        ({"schedules": {"lr": {"shape": "cosine"}}}, r"schedules\.lr\.final is missing"),
        ({"schedules": {"lr": {"shape": "cosine", "final": 2}}}, r"schedules\.lr\.final is 2"),
        ({"start_hyperparameters": {}}, r"start_hyperparameters\.lr is missing"),
        ({"start_hyperparameters": {**START, "lr": 2}}, r"start_hyperparameters\.lr is 2"),
        ({"name": 3}, r"rule\.name is 3"),
        ({"colour": 3}, r"rule\.colour is unknown"),
    ],
)
def test_rules_are_refused_by_field(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rule.json"
    path.write_text(json.dumps({**COSINE, **change}))
    with pytest.raises(PolicyFileError, match=message):
        load_policy(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", "[" * 100_000, "\xff", '"\\ud800"'])
def test_what_is_no_rule_at_all(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rule.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PolicyFileError):
        load_policy(path)
