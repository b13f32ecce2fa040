"""Runs: the same for the same, fair to every optimizer, and judged on data of their own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation.toys import Toy
from policy.samples import random_policy
from tolerances import SPREAD_PART
from torch import nn

from lhopt_fused.evaluation.optimizers import (
    CONTENDERS,
    Configuration,
    ContenderError,
    build,
    contender_version,
    default_policy,
    policy_configuration,
)
from lhopt_fused.evaluation.run import RunResult, RunSpec, run, run_task
from lhopt_fused.evaluation.task import DataError, Scores, epochs
from lhopt_fused.policy import StartOptions, builtin_policies, save_policy
from lhopt_fused.schedules import GRID, SCHEDULES

ADAMW: Configuration = {"lr": 1e-2, "schedule": "linear"}


def spec(optimizer: str = "adamw", configuration: Configuration | None = None) -> RunSpec:
    return RunSpec("toy", "small", optimizer, configuration or ADAMW, seed=3)


def timeless(result: RunResult) -> str:
    """All but the times; as text, since NaN is not itself."""
    curve = [point._replace(seconds=0.0) for point in result.curve]
    return repr(replace(result, seconds=0.0, optimizer_seconds=0.0, curve=curve))


def configurations() -> list[tuple[str, Configuration]]:
    """Each contender with where its authors start."""
    found = [(name, c.default) for name, c in CONTENDERS.items() if c.default is not None]
    return [*found, ("lhopt", policy_configuration("cosine"))]


@pytest.mark.parametrize(("optimizer", "configuration"), configurations())
def test_every_optimizer_learns_the_same_thing_twice(
    optimizer: str, configuration: Configuration
) -> None:
    task = Toy(steps=400)
    first, again = (run_task(task, spec(optimizer, configuration)) for _ in range(2))
    assert timeless(first) == timeless(again)
    assert first.eval_loss < first.curve[0].eval_loss
    assert 0 < first.optimizer_seconds < first.seconds
    assert (first.trajectory != []) == (optimizer == "lhopt")


def test_all_optimizers_start_from_the_same_weights_and_batches() -> None:
    starts = {
        (result.curve[0].eval_loss, result.curve[1].train_loss)
        for name, configuration in configurations()
        for result in [run_task(Toy(steps=12), spec(name, configuration))]
    }
    assert len(starts) == 1


def test_another_seed_is_another_run() -> None:
    results = [run_task(Toy(), replace(spec(), seed=seed)) for seed in (0, 1)]
    assert results[0].curve[0].eval_loss != results[1].curve[0].eval_loss


@pytest.mark.parametrize(("budget", "steps"), [(0.5, 6), (1.0, 12), (1.41, 17), (1e-6, 1)])
def test_the_budget_is_a_share_of_the_steps(budget: float, steps: int) -> None:
    result = run_task(Toy(), replace(spec(), budget=budget))
    points = list(range(steps + 1)) if budget == 1 else [0, steps]
    assert result.steps == steps
    assert [point.step for point in result.curve] == points


def test_a_curve_has_few_points() -> None:
    curve = run_task(Toy(steps=100), spec()).curve
    assert [curve[0].step, curve[-1].step, len(curve)] == [0, 100, 13]
    assert math.isnan(curve[0].train_loss)


def test_the_report_split_is_only_looked_at_once() -> None:
    seen = []

    class Watched(Toy):
        def scores(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> Scores:
            assert not model.training
            assert not torch.is_grad_enabled()
            seen.append(len(batch[0]))
            return super().scores(model, batch)

    cosine = policy_configuration("cosine", eval_loss=True)
    run_task(Watched(steps=32), spec("lhopt", cosine))
    assert seen[-2:] == [256, 44]  # 300 examples, in chunks
    assert seen[:-2].count(40) == 13  # the curve
    assert seen[:-2].count(32) == 2  # four batches at each of the policy's decisions
    seen.clear()
    run_task(Watched(steps=32), spec("lhopt", policy_configuration("cosine")))
    assert seen.count(32) == 0  # it is not shown eval losses unless asked for


def test_scores_are_means_over_examples() -> None:
    task = Toy()
    model = task.make_model()
    scores = task.evaluate(model, "report")
    inputs, classes = task.held_out["report"]
    with torch.no_grad():
        logits = model.eval()(inputs)
    expected = (logits.argmax(-1) == classes).double().mean().item()
    assert scores.metrics["accuracy"] == pytest.approx(expected, rel=1e-12)


def test_a_part_of_a_split_is_spread_over_it() -> None:
    task = Toy()
    inputs, classes = task.held_out["report"]
    order = classes.argsort()
    task.held_out["report"] = (inputs[order], classes[order])
    model = task.make_model()
    model.get_submodule("head").get_parameter("bias").data.copy_(torch.tensor([4.0, -4.0]))
    part = task.evaluate(model, "report", 150)
    assert part == task.evaluate(model, "report", 150)
    whole = task.evaluate(model, "report")
    assert part.loss == pytest.approx(whole.loss, rel=SPREAD_PART.relative)
    task.held_out["report"] = (inputs[order][:150], classes[order][:150])
    assert task.evaluate(model, "report").loss != pytest.approx(
        whole.loss, rel=SPREAD_PART.relative
    )


def test_a_run_that_diverges_says_so() -> None:
    class Broken(Toy):
        def loss(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return super().loss(model, batch) * math.nan

    result = run_task(Broken(steps=48), spec())
    assert result.report_loss == result.eval_loss == math.inf
    assert result.steps == 4  # the first point of the curve


def test_schedules_are_followed() -> None:
    model = nn.Linear(2, 1)
    stepper = build("adamw", model, {"lr": 1e-2, "schedule": "cosine"}, 4, lambda: 0.0)
    rates = []
    for _ in range(4):
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        stepper.step(loss)
        rates.append(stepper.optimizer.param_groups[0]["lr"])
    assert rates == [1e-2 * SCHEDULES["cosine"](step / 4) for step in range(4)]


def test_the_grid_of_adamw_is_the_papers() -> None:
    grid = CONTENDERS["adamw"].grid
    assert len(grid) == 35
    assert {(c["lr"], c["schedule"]) for c in grid} == {(lr, s) for lr in GRID for s in SCHEDULES}
    assert all(c.default in c.grid for c in CONTENDERS.values() if c.default is not None)


def test_muon_takes_hidden_matrices_and_filters() -> None:
    model = nn.ModuleDict(
        {
            "token": nn.Embedding(5, 4),
            "conv": nn.Conv2d(2, 3, 3),
            "norm": nn.LayerNorm(4),
            "head": nn.Linear(4, 2),
        }
    )
    stepper = build("muon", model, CONTENDERS["muon"].default or {}, 10, lambda: 0.0)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    stepper.step(torch.tensor(0.0))
    assert [view.shape for view, _ in stepper.views] == [torch.Size([3, 18])]
    assert stepper.optimizer.param_groups[0]["lr"] == 2e-2
    for name, param in model.named_parameters():
        assert not torch.equal(param, before[name]), name


def test_averaged_weights_are_judged_with_their_own_statistics() -> None:
    task = Toy()
    model = task.make_model().train()
    stepper = build("schedule_free", model, {"lr": 0.1}, 8, lambda: 0.0)
    batches = task.batches(torch.Generator().manual_seed(0))
    for batch, _ in zip(batches, range(8), strict=False):
        loss = task.loss(model, batch)
        loss.backward()
        stepper.step(loss)
    weight = model.get_submodule("hidden").get_parameter("weight")
    trained = weight.detach().clone()
    passed = []
    with stepper.judged(model, lambda: passed.append(True)):
        assert not torch.equal(weight, trained)
    assert passed == [True]
    torch.testing.assert_close(weight, trained)


def test_a_policy_is_known_by_what_it_does() -> None:
    cosine, fixed = map(policy_configuration, ("cosine", "fixed"))
    assert cosine["fingerprint"] != fixed["fingerprint"]
    moved = {**cosine, "policy": "/elsewhere/cosine.json"}
    one, other = spec("lhopt", cosine), spec("lhopt", moved)
    shown = spec("lhopt", policy_configuration("cosine", eval_loss=True))
    assert one.hyperparameters == other.hyperparameters != spec("lhopt", fixed).hyperparameters
    assert one.hyperparameters != shown.hyperparameters
    assert default_policy() in builtin_policies()


def test_versions_come_from_packages() -> None:
    assert contender_version("adamw") == ""
    assert contender_version("prodigy").count(".") >= 1


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ContenderError, match="no optimizer 'sgd'; the optimizers are adamw"):
        run_task(Toy(), spec("sgd"))
    with pytest.raises(ValueError, match="no task 'chess'; the tasks are"):
        run(replace(spec(), task="chess"))
    with pytest.raises(ValueError, match="budget must be a number > 0, got 0"):
        replace(spec(), budget=0)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ContenderError, match=r"pip install 'torch>=2\.9'"):
        run_task(Toy(), spec("muon", CONTENDERS["muon"].default))
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    with pytest.raises(ContenderError, match=r"pip install 'lhopt-fused\[eval\]'"):
        contender_version("prodigy")


def test_epochs_see_every_example_once() -> None:
    batches = epochs(10, 3, torch.Generator().manual_seed(0))
    for _ in range(3):
        seen = torch.cat([next(batches) for _ in range(3)])
        assert len(seen.unique()) == 9
    with pytest.raises(DataError, match="2 training examples, expected at least a batch, 3"):
        next(epochs(2, 3, torch.Generator()))


def test_a_policy_that_starts_elsewhere_is_another_one(tmp_path: Path) -> None:
    policy = random_policy(0, registers=False)
    variants = [
        policy,
        replace(policy, start_hyperparameters={**policy.start_hyperparameters, "lr": 0.5}),
        replace(policy, start_options=StartOptions(lamb_ignore_vectors=False)),
    ]
    found = set()
    for variant in variants:
        save_policy(variant, tmp_path / "policy.safetensors")
        found.add(policy_configuration(str(tmp_path / "policy.safetensors"))["fingerprint"])
    assert len(found) == len(variants)
