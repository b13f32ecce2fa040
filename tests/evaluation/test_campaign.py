"""Plans and campaigns: what is run, in which order, and only once."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation.toys import Toy

from lhopt_fused.evaluation import campaign as campaign_module
from lhopt_fused.evaluation.campaign import Campaign, WorkerDiedError
from lhopt_fused.evaluation.optimizers import CONTENDERS, Configuration, policy_configuration
from lhopt_fused.evaluation.plan import BUDGETS, Plan, by_configuration, ranked
from lhopt_fused.evaluation.rows import Circumstances, Row
from lhopt_fused.evaluation.run import RunResult, RunSpec
from lhopt_fused.evaluation.store import Store
from lhopt_fused.stopping import StopRequest

HERE = Circumstances("data", "{}", "cpu")
RESULT = RunResult(1, 1.0, {}, 1.0, [], 1.0, 1.0, [], 1)


def plan(optimizers: Sequence[str] = ("adamw", "lhopt"), **changes: object) -> Plan:
    made = Plan(["toy"], "small", optimizers, [policy_configuration("cosine")], seeds=3)
    return replace(made, **changes)  # type: ignore[arg-type]


def row(configuration: Configuration, seed: int, loss: float, budget: float = 1.0) -> Row:
    spec = RunSpec("toy", "small", "adamw", configuration, seed, budget)
    return Row(0, spec, HERE, replace(RESULT, eval_loss=loss))


def test_the_first_stage_is_every_configuration_and_seed() -> None:
    specs = plan().first_stage()
    assert len(specs) == 36 * 3
    assert {spec.budget for spec in specs} == {1.0}
    assert len({(spec.hyperparameters, spec.seed) for spec in specs}) == len(specs)


def test_the_second_stage_is_the_best_five_and_the_default_at_all_other_budgets() -> None:
    grid = CONTENDERS["adamw"].grid
    rows = [row(c, seed, loss=index) for index, c in enumerate(grid) for seed in range(3)]
    specs = plan().second_stage(rows)
    assert {spec.budget for spec in specs} == set(BUDGETS) - {1.0}
    chosen = {spec.hyperparameters for spec in specs}
    wanted = [*grid[:5], CONTENDERS["adamw"].default]
    assert chosen == {RunSpec("toy", "small", "adamw", c or {}, 0).hyperparameters for c in wanted}
    assert len(specs) == 6 * 6 * 3


def test_the_best_are_chosen_at_budget_one_and_by_all_seeds() -> None:
    one, other, short = ({"lr": lr, "schedule": "linear"} for lr in (1e-3, 1e-2, 3e-3))
    rows = [row(one, 0, 1.0), row(one, 1, 2.0), row(other, 0, 0.0), row(other, 1, math.inf)]
    rows += [row(other, 0, 0.0, budget=2.0), row(short, 0, -9.0)]
    tried = by_configuration(r for r in rows if r.spec.budget == 1)
    order = [tried[name][0].spec.configuration for name in ranked(tried)]
    assert order == [one, other, short]


def test_without_the_baseline_there_is_no_second_stage() -> None:
    assert plan(optimizers=["lhopt"]).second_stage([]) == []


def test_a_quick_plan_is_a_small_part_of_the_whole() -> None:
    names = [name for name in CONTENDERS if name != "lhopt"]
    whole, quick = (plan(names, quick=flag).first_stage() for flag in (False, True))
    assert len(quick) < len(whole) / 3
    assert {spec.optimizer for spec in quick} == set(names)
    for name in names:
        kept = {spec.hyperparameters for spec in quick if spec.optimizer == name}
        all_of = {spec.hyperparameters for spec in whole if spec.optimizer == name}
        default = RunSpec("toy", "small", name, CONTENDERS[name].default or {}, 0).hyperparameters
        assert default in kept <= all_of


def specs(count: int) -> list[RunSpec]:
    given = {"lr": 1e-3, "schedule": "linear"}
    return [RunSpec("toy", "small", "adamw", given, seed) for seed in range(count)]


@pytest.mark.usefixtures("toy")
def test_nothing_is_run_twice(tmp_path: Path) -> None:
    work = Campaign(Store(tmp_path / "runs"), None, "cpu", workers=1)
    told: list[RunSpec] = []
    assert work.run(specs(2), told.append)
    assert work.missing(specs(4)) in (specs(4)[2:], specs(4)[:1:-1])
    assert work.run(specs(4), told.append)
    assert told == [*specs(2), *specs(4)]
    assert [row.spec.seed for row in work.store.rows()] == [0, 1, 2, 3]


@pytest.mark.usefixtures("toy")
def test_other_data_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Campaign(Store(tmp_path / "runs"), None, "cpu", workers=1)
    work.run(specs(1), lambda spec: None)
    small = plan(seeds=1)
    assert len(work.known(small)) == 1
    monkeypatch.setattr(campaign_module, "_digest", lambda *task: "other")
    assert work.missing(specs(1)) == specs(1)
    assert work.known(small) == []


@pytest.mark.usefixtures("toy")
def test_a_request_to_stop_is_heard_between_runs(tmp_path: Path) -> None:
    stop = StopRequest()
    work = Campaign(Store(tmp_path / "runs"), None, "cpu", 1, stop)

    def once(spec: RunSpec) -> None:
        stop.is_set = True

    assert not work.run(specs(3), once)
    assert len(work.store.rows()) == 1
    stop.is_set = False
    assert work.run(specs(3), lambda spec: None)
    assert len(work.store.rows()) == 3


def quadratic(budget: float) -> RunSpec:
    given = {"lr": 1e-3, "schedule": "linear"}
    return RunSpec("noisy_quadratic", "small", "adamw", given, 0, budget)


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    both = [quadratic(budget) for budget in (0.01, 0.02)]
    found = []
    for workers in (1, 2):
        store = Store(tmp_path / str(workers))
        assert Campaign(store, None, "cpu", workers).run(both, lambda spec: None)
        found.append(sorted((r.spec.budget, r.result.report_loss) for r in store.rows()))
    assert found[0] == found[1]


def die(*_: object) -> RunResult:
    os._exit(9)


def test_a_killed_process_loses_no_more_than_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "runs")
    work = Campaign(store, None, "cpu", 2)
    assert Campaign(store, None, "cpu", 1).run([quadratic(0.01)], lambda spec: None)
    with monkeypatch.context() as patch:
        patch.setattr(campaign_module, "run", die)
        with pytest.raises(WorkerDiedError, match="the same command goes on from here"):
            work.run([quadratic(0.02)], lambda spec: None)
    assert [r.spec.budget for r in store.rows()] == [0.01]
    assert Campaign(store, None, "cpu", 1).run([quadratic(0.02)], lambda spec: None)
    assert len(store.rows()) == 2


def test_versions_are_part_of_what_was_run(tmp_path: Path, toy: Toy) -> None:
    work = Campaign(Store(tmp_path / "runs"), None, "cpu", 1)
    found = work.circumstances(specs(1)[0])
    assert found.data == toy.digest
    assert found.device == "cpu"
    assert '"torch": "' in found.versions
    free = work.circumstances(replace(specs(1)[0], optimizer="schedule_free"))
    assert '"schedulefree": "' in free.versions
