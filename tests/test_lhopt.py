"""LHOPT: outer steps, losses, decisions, registers, and resuming anywhere."""

from __future__ import annotations

import copy
import csv
import itertools
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import device_of, make_params, set_grads, with_triton

from lhopt_fused import CIAO, LHOPT
from lhopt_fused.actions import ACTIONS, ActionSpace
from lhopt_fused.ciao import LHOPT_START
from lhopt_fused.history import OuterStep, read_csv, tensorboard_callback, write_csv
from lhopt_fused.policy import (
    FEATURES,
    LearnedPolicy,
    NetworkShape,
    PolicyNetwork,
    StartOptions,
    load_policy,
)
from lhopt_fused.types import HYPERPARAMETERS


def random_policy(seed: int = 0, registers: bool = False) -> LearnedPolicy:
    """A small network with random weights: it does something at every outer step."""
    space = ActionSpace(ACTIONS, registers)
    torch.manual_seed(seed)
    network = PolicyNetwork(
        NetworkShape(len(FEATURES), space.head_sizes, hidden=16, head_hidden=16)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
    return LearnedPolicy.from_network(
        network,
        name=f"random-{seed}",
        action_space=space,
        start_hyperparameters={name: LHOPT_START[name] for name in HYPERPARAMETERS},
    )


def run(
    optimizer: LHOPT, params: list[torch.nn.Parameter], first: int, last: int, **losses: Any
) -> None:
    for step in range(first, last):
        set_grads(params, step)
        optimizer.observe(train_loss=torch.tensor(2.0 / (step + 1)), **losses)
        optimizer.step()


def same(left: Any, right: Any) -> bool:
    """Equal to the bit, NaN included."""
    return repr(left) == repr(right)


def test_a_policy_that_never_acts_is_ciao() -> None:
    params, plain = make_params(), make_params()
    run(LHOPT(params, 20, policy="fixed"), params, 0, 20)
    optimizer = CIAO.lhopt(plain)
    for step in range(20):
        set_grads(plain, step)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


def test_a_policy_brings_its_options_and_arguments_overrule_them() -> None:
    options = StartOptions("delayed", lamb_ignore_vectors=False)
    policy = replace(load_policy("fixed"), start_options=options)
    params, plain = make_params(), make_params()
    run(LHOPT(params, 20, policy=policy), params, 0, 20)
    optimizer = CIAO.lhopt(plain, trust="delayed", lamb_ignore_vectors=False)
    for step in range(20):
        set_grads(plain, step)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
    group = LHOPT(make_params(), 20, policy=policy, trust="exact").param_groups[0]
    assert (group["trust"], group["lamb_ignore_vectors"]) == ("exact", False)


@pytest.mark.parametrize(("total_steps", "expected"), [(100, 0.06), (400, 0.03), (40_000, 0.003)])
def test_longer_runs_start_at_lower_learning_rates(total_steps: int, expected: float) -> None:
    fixed = load_policy("fixed")
    start = {**fixed.start_hyperparameters, "lr": 0.03}
    policy = replace(fixed, start_hyperparameters=start, start_options=StartOptions(lr_steps=400))
    for given, lr in (({}, expected), ({"lr": 0.02}, 0.02)):
        group = LHOPT(make_params(), total_steps, policy=policy, **given).param_groups[0]
        assert group["lr"] == pytest.approx(lr)
        assert group["epsilon"] == start["epsilon"]
    alike = replace(policy, start_options=StartOptions())
    assert LHOPT(make_params(), total_steps, policy=alike).param_groups[0]["lr"] == 0.03


def test_decisions_take_the_learning_rate_no_further_than_its_reach() -> None:
    network = random_policy().network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.heads[0].logits.bias[-1] = 50.0  # the learning rate times 2, every time
    start = {**{name: LHOPT_START[name] for name in HYPERPARAMETERS}, "lr": 0.01}
    rates = {}
    for reach in (3.0, None):
        policy = LearnedPolicy.from_network(
            network,
            name="raising",
            action_space=ActionSpace(ACTIONS),
            start_hyperparameters=start,
            start_options=StartOptions(lr_steps=40, lr_reach=reach),
        )
        params = make_params()
        optimizer = LHOPT(params, 10, outer_steps=5, policy=policy)
        run(optimizer, params, 0, 10)
        rates[reach] = [step.hyperparameters["lr"] for step in optimizer.history]
    assert rates[3.0] == pytest.approx([0.04, 0.06, 0.06, 0.06, 0.06])
    assert rates[None] == pytest.approx([0.04, 0.08, 0.16, 0.32, 0.64])


def test_cosine_takes_the_learning_rate_down() -> None:
    params = make_params()
    optimizer = LHOPT(params, 40, outer_steps=10, policy="cosine", lr=0.02)
    run(optimizer, params, 0, 40)
    for step in optimizer.history[:-1]:
        expected = 0.02 * (1 + math.cos(math.pi * step.progress)) / 2
        assert step.hyperparameters["lr"] == pytest.approx(expected)
        assert step.hyperparameters["epsilon"] == LHOPT_START["epsilon"]


@pytest.mark.parametrize(("total", "outer"), [(20, 5), (17, 5), (100, 7), (3, 3), (5, 1)])
def test_outer_steps_cover_the_run_evenly(total: int, outer: int) -> None:
    params = make_params(shapes=[(3, 3)])
    optimizer = LHOPT(params, total, outer_steps=outer)
    run(optimizer, params, 0, total)
    ends = [0, *(step.inner_step for step in optimizer.history)]
    lengths = np.diff(ends)
    assert len(lengths) == outer
    assert ends[-1] == total
    assert max(lengths) - min(lengths) <= 1


def test_a_policy_moves_every_group_and_leaves_zeros_alone() -> None:
    params = make_params()
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0, "lr": 0.01}]
    optimizer = LHOPT(groups, 20, outer_steps=4, policy=random_policy())
    run(optimizer, params, 0, 20)
    first, second = optimizer.param_groups
    shift = sum(step.shifts["lr"] for step in optimizer.history)
    assert first["lr"] == pytest.approx(1e-3 * math.exp(shift))
    assert second["lr"] == pytest.approx(1e-2 * math.exp(shift))
    assert second["weight_decay"] == 0.0
    assert first["weight_decay"] != LHOPT_START["weight_decay"]


def test_losses_are_means_of_what_was_observed() -> None:
    params = make_params()
    optimizer = LHOPT(params, 8, outer_steps=2)
    observed: list[Any] = [1.0, torch.tensor(2.0, requires_grad=True), torch.tensor([3.0]), 4]
    for step, loss in enumerate(observed):
        set_grads(params, step)
        optimizer.observe(train_loss=loss, eval_loss=10.0 if step == 1 else None)
        optimizer.step()
    assert optimizer.history[0].train_loss == 2.5
    assert optimizer.history[0].eval_loss == 10.0
    for step in range(4):
        set_grads(params, step)
        optimizer.step()
    assert math.isnan(optimizer.history[1].train_loss)
    assert optimizer.history[1].eval_loss is None


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (torch.zeros(2), ValueError, r"one number, got a tensor of shape \(2,\); reduce it first"),
        (torch.zeros(0), ValueError, r"one number, got a tensor of shape \(0,\)"),
        ("1.5", TypeError, "a loss must be one number or a tensor, got str"),
        ([1.5], TypeError, "a loss must be one number or a tensor, got list"),
        (torch.tensor(1j), TypeError, "one real number, got a complex tensor"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, error: type[Exception], message: str) -> None:
    params = make_params(shapes=[(3, 3)])
    optimizer = LHOPT(params, 2, outer_steps=2)
    for losses in ({"train_loss": loss}, {"train_loss": 1.0, "eval_loss": loss}):
        with pytest.raises(error, match=message):
            optimizer.observe(**losses)
    set_grads(params, 0)
    optimizer.step()
    assert math.isnan(optimizer.history[0].train_loss), "half of what was refused has been taken"


@pytest.mark.parametrize(
    "make_loss",
    [
        lambda x: x,
        np.float32,
        torch.tensor,
        lambda x: torch.tensor([[x]], dtype=torch.bfloat16),
        lambda x: torch.tensor(x, requires_grad=True) * 1.0,
        *([lambda x: torch.tensor(x, device="cuda")] if torch.cuda.is_available() else []),
    ],
)
@pytest.mark.parametrize("loss", [2.5, math.nan, math.inf, -math.inf])
def test_losses_may_come_as_they_are(make_loss: Any, loss: float) -> None:
    params = make_params(shapes=[(3, 3)])
    optimizer = LHOPT(params, 2, outer_steps=2)
    set_grads(params, 0)
    optimizer.observe(train_loss=make_loss(loss), eval_loss=make_loss(loss))
    optimizer.step()
    assert same([optimizer.history[0].train_loss, optimizer.history[0].eval_loss], [loss, loss])


def test_eval_fn_and_closure_are_observed() -> None:
    (param,) = make_params(shapes=[(4, 3)])
    calls: list[bool] = []

    def evaluate() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return param.square().mean()

    def closure() -> float:
        param.grad = 2 * param.detach()
        return param.detach().square().sum().item()

    optimizer = LHOPT([param], 6, outer_steps=3, eval_fn=evaluate, lr=1e-3)
    start = param.detach().square().sum().item()
    for _ in range(6):
        optimizer.step(closure)
    assert calls == [False] * 3
    assert optimizer.history[0].train_loss == pytest.approx(start, rel=0.01)
    assert optimizer.history[0].eval_loss is not None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, -1.0, 0.0])
def test_strange_losses_do_not_break_policy_or_registers(loss: float) -> None:
    params = make_params()
    policy = random_policy(3, registers=True)
    optimizer = LHOPT(params, 24, outer_steps=24, policy=policy, sample=True, restart_registers=3)
    for step in range(24):
        set_grads(params, step)
        optimizer.observe(train_loss=loss, eval_loss=loss)
        optimizer.step()
    for step_record in optimizer.history:
        assert all(math.isfinite(value) for value in step_record.hyperparameters.values())
    used = [seen for seen in optimizer.registers.losses if not same(seen, math.nan)]
    assert {step.register.split("_")[0] for step in optimizer.history} > {"save", "swap"}
    assert all(same(seen, loss) for seen in used)
    assert all(bool(p.isfinite().all()) for p in params)


def test_an_outer_step_without_one_good_gradient_is_survived() -> None:
    params = make_params()
    optimizer = LHOPT(params, 12, outer_steps=6, policy=random_policy())

    def train() -> None:
        for step in range(12):
            set_grads(params, step)
            if step < 6:
                params[0].grad[0] = math.nan
            optimizer.step()

    with pytest.warns(RuntimeWarning, match="NaN or inf"):
        train()
    assert optimizer.skipped_steps == 6
    for step_record in optimizer.history:
        assert all(math.isfinite(value) for value in step_record.hyperparameters.values())
    assert all(bool(p.isfinite().all()) for p in params)


def test_groups_may_join_in_the_middle_of_a_run() -> None:
    """Which is no learning-rate scheduler at work."""
    params = make_params()
    optimizer = LHOPT(params[:1], 12, outer_steps=6, policy="cosine")
    run(optimizer, params[:1], 0, 6)
    optimizer.add_param_group({"params": params[1:], "lr": 0.01})
    run(optimizer, params, 6, 10)
    first, second = (group["lr"] for group in optimizer.param_groups)
    shift = sum(step.shifts["lr"] for step in optimizer.history if step.inner_step > 6)
    assert second == pytest.approx(0.01 * math.exp(shift))
    assert first == pytest.approx(1e-3 * (1 + math.cos(math.pi * 10 / 12)) / 2)


def test_a_scheduler_and_a_policy_cannot_both_move_lr() -> None:
    params = make_params()
    optimizer = LHOPT(params, 20, outer_steps=4, policy="cosine")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train() -> None:
        for step in range(20):
            set_grads(params, step)
            optimizer.step()
            schedule.step()

    with pytest.raises(RuntimeError, match="a learning-rate scheduler and a policy"):
        train()
    fixed = LHOPT(make_params(), 20, policy="fixed")
    params = fixed.param_groups[0]["params"]
    schedule = torch.optim.lr_scheduler.ExponentialLR(fixed, 0.9)
    for step in range(20):
        set_grads(params, step)
        fixed.step()
        schedule.step()
    assert fixed.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.9**20)


def test_after_the_last_step_the_policy_rests() -> None:
    params = make_params()
    optimizer = LHOPT(params, 4, outer_steps=2)
    run(optimizer, params, 0, 4)
    lr = optimizer.param_groups[0]["lr"]
    with pytest.warns(RuntimeWarning, match="more than total_steps=4") as caught:
        run(optimizer, params, 4, 10)
    assert len(caught) == 1
    assert optimizer.param_groups[0]["lr"] == lr
    assert len(optimizer.history) == 2


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps must be"),
        ({"total_steps": 2.5}, ValueError, "total_steps must be"),
        ({"total_steps": 4, "outer_steps": 5}, ValueError, "needs at least as many inner steps"),
        ({"total_steps": 4, "outer_steps": 0}, ValueError, "outer_steps must be"),
        ({"total_steps": 4, "policy": "magic"}, FileNotFoundError, "there is no policy 'magic'"),
        ({"total_steps": 4, "lr": -1.0}, ValueError, "lr must be a number"),
        ({"total_steps": 4, "seed": -1}, ValueError, "seed is -1, expected 0 to"),
        ({"total_steps": 4, "policy": 3}, TypeError, "policy must be a name, a path or a Policy"),
        ({"total_steps": 4, "eval_fn": 1.5}, TypeError, "eval_fn must be a function, got 1.5"),
        ({"total_steps": 4, "callback": []}, TypeError, "callback must be a function"),
        ({"total_steps": 4, "restart_registers": -1}, ValueError, "restart_registers must be"),
        (
            {"total_steps": 4, "policy": random_policy(registers=True)},
            ValueError,
            "pass restart_registers=3",
        ),
    ],
)
def test_bad_input(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LHOPT(make_params(), **keywords)


# ---------------------------------------------------------------------- registers


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_registers_bring_a_training_state_back_to_the_bit(
    tmp_path: Path, backend: Any, on_disk: bool
) -> None:
    params = make_params(torch.bfloat16)
    folder = tmp_path / "registers" if on_disk else None
    optimizer = LHOPT(
        params,
        100,
        policy="fixed",
        backend=backend,
        restart_registers=3,
        register_folder=folder,
        keep_grad_signs=True,
    )
    run(optimizer, params, 0, 4)
    optimizer.save_register(1)
    run(optimizer, params, 4, 9)
    reached = [p.detach().clone() for p in params]
    optimizer.swap_register(1)
    run(optimizer, params, 4, 9)
    assert all(torch.equal(p, q) for p, q in zip(params, reached, strict=True))
    run(optimizer, params, 9, 11)
    optimizer.load_register(1)
    assert all(torch.equal(p, q) for p, q in zip(params, reached, strict=True))
    optimizer.load_register(0)  # empty: nothing happens
    assert all(torch.equal(p, q) for p, q in zip(params, reached, strict=True))
    with pytest.raises(IndexError, match="no restart register 3"):
        optimizer.save_register(3)
    held = sum(p.nbytes for p in params)
    assert optimizer.register_bytes > held


def test_a_policy_uses_registers() -> None:
    params = make_params()
    optimizer = LHOPT(
        params,
        60,
        outer_steps=30,
        policy=random_policy(3, registers=True),
        sample=True,
        restart_registers=3,
    )
    run(optimizer, params, 0, 60)
    chosen = {step.register for step in optimizer.history}
    assert len(chosen) > 3
    assert any(not math.isnan(progress) for progress in optimizer.registers.progress)


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize(
    ("backend", "draw"),
    [
        *((("reference", "cpu")[draw % 2], draw) for draw in range(20)),
        *(case for draw in range(20, 25) for case in with_triton(draw)),
    ],
)
def test_resumes_bit_identically_wherever_it_is_saved(
    tmp_path: Path, backend: str, draw: int
) -> None:
    chance = random.Random(draw)
    saved_at = chance.randrange(1, 30)
    dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16])
    registers = chance.random() < 0.5
    keywords: dict[str, Any] = {
        "outer_steps": chance.choice([3, 7, 30]),
        "policy": random_policy(draw, registers),
        "restart_registers": 3 if registers else 0,
        "sample": chance.random() < 0.5,
        "seed": draw,
        "trust": chance.choice(["exact", "delayed"]),
        "keep_grad_signs": chance.random() < 0.5,
        "inner_feature_frequency": chance.choice([1, 2, 4]),
        "backend": backend,
        "register_folder": tmp_path if registers and chance.random() < 0.5 else None,
    }
    params = make_params(dtype, device=device_of(backend))
    optimizer = LHOPT(params, 30, **keywords)
    run(optimizer, params, 0, saved_at)
    torch.save((params, optimizer.state_dict()), tmp_path / "run.pt")
    run(optimizer, params, saved_at, 30)

    loaded, state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = LHOPT(loaded, 30, **keywords)
    resumed.load_state_dict(state)
    run(resumed, loaded, saved_at, 30)
    assert all(torch.equal(p, q) for p, q in zip(params, loaded, strict=True))
    assert same(optimizer.history, resumed.history)


RESUME = """
import sys, torch
from cases import make_params, set_grads
from policy.samples import random_policy
from lhopt_fused import LHOPT

stop, last, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
params, saved = torch.load(path, weights_only=True) if stop else (make_params(), None)
policy = random_policy(0)
optimizer = LHOPT(params, 20, outer_steps=5, policy=policy, sample=True, restart_registers=3)
if saved:
    optimizer.load_state_dict(saved)
for step in range(stop, last):
    set_grads(params, step)
    optimizer.observe(train_loss=2.0 / (step + 1))
    optimizer.step()
torch.save((params, optimizer.state_dict()), path)
"""


def test_resumes_in_a_new_process(tmp_path: Path) -> None:
    def go(name: str, *stops: int) -> Any:
        path = tmp_path / name
        for first, last in itertools.pairwise(stops):
            words = [sys.executable, "-c", RESUME, str(first), str(last), str(path)]
            folders = [str(Path(__file__).parent), *sys.path]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
            subprocess.run(words, check=True, env=environment)
        return torch.load(path, weights_only=True)

    (params, state), (resumed, other) = go("whole", 0, 20), go("stopped", 0, 7, 20)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))
    assert same(state["lhopt"]["history"], other["lhopt"]["history"])
    assert len(state["lhopt"]["history"]) == 5


def through_torch(saved_of: LHOPT, model: torch.nn.Module, into: LHOPT, other: Any) -> None:
    into.load_state_dict(saved_of.state_dict())


def through_distributed(saved_of: LHOPT, model: torch.nn.Module, into: LHOPT, other: Any) -> None:
    from torch.distributed.checkpoint import state_dict as distributed

    saved = distributed.get_optimizer_state_dict(model, saved_of)
    assert set(saved) == {"state", "param_groups"}
    distributed.set_optimizer_state_dict(other, into, saved)


@pytest.mark.parametrize("through", [through_torch, through_distributed])
@pytest.mark.parametrize("saved_at", [5, 10, 13])
def test_resumes_through_distributed_checkpoints_too(through: Any, saved_at: int) -> None:
    """Which know parameters by name, and nothing of a state dict but "state" and "param_groups"."""

    def make() -> tuple[torch.nn.Module, LHOPT]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
        groups = [{"params": [layer.weight, layer.bias]} for layer in reversed(model)]
        keywords: dict[str, Any] = {"policy": random_policy(3, True), "sample": True}
        return model, LHOPT(groups, 20, outer_steps=6, restart_registers=3, **keywords)

    model, optimizer = make()
    run(optimizer, list(model.parameters()), 0, saved_at)
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    through(optimizer, model, resumed, other)
    keys = [set(group) for group in optimizer.param_groups]
    assert [set(group) for group in resumed.param_groups] == keys
    run(optimizer, list(model.parameters()), saved_at, 20)
    run(resumed, list(other.parameters()), saved_at, 20)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert same(optimizer.history, resumed.history)


def test_a_checkpoint_of_another_run_is_refused() -> None:
    params = make_params()
    optimizer = LHOPT(params, 8)
    run(optimizer, params, 0, 3)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="policy 'default', here it is policy 'fixed'"):
        LHOPT(make_params(), 8, policy="fixed").load_state_dict(state)
    with pytest.raises(ValueError, match="total_steps 8, here it is 9"):
        LHOPT(make_params(), 9, outer_steps=1).load_state_dict(state)
    with pytest.raises(ValueError, match="has 0 restart registers, the optimizer 1"):
        LHOPT(make_params(), 8, restart_registers=1).load_state_dict(state)
    for foreign in ({}, CIAO(make_params()).state_dict()):
        with pytest.raises(ValueError, match="not saved by LHOPT"):
            LHOPT(make_params(), 8).load_state_dict(foreign)


def test_copies_go_their_own_way() -> None:
    params = make_params()
    optimizer = LHOPT(params, 20, outer_steps=5, policy=random_policy(), sample=True)
    run(optimizer, params, 0, 6)
    copied, own = copy.deepcopy((optimizer, params))
    run(optimizer, params, 6, 20)
    run(copied, own, 6, 20)
    assert all(torch.equal(p, q) for p, q in zip(params, own, strict=True))
    assert same(optimizer.history, copied.history)


# ---------------------------------------------------------------------- history


def test_history_goes_to_callbacks_csv_and_tensorboard(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.seen: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.seen.append((tag, scalar_value, global_step))

    writer, seen = Writer(), []
    write = tensorboard_callback(writer)

    def callback(step: OuterStep) -> None:
        seen.append(step)
        write(step)

    params = make_params()
    optimizer = LHOPT(params, 12, outer_steps=3, callback=callback, eval_fn=lambda: 1.5)
    run(optimizer, params, 0, 12)
    assert same(seen, optimizer.history)
    assert ("lhopt/eval_loss", 1.5, 4) in writer.seen
    write_csv(optimizer.history, tmp_path / "history.csv")
    assert same(read_csv(tmp_path / "history.csv"), optimizer.history)
    with (tmp_path / "other.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a"], ["1"]])
    with pytest.raises(ValueError, match="it has no column 'outer_step'"):
        read_csv(tmp_path / "other.csv")
