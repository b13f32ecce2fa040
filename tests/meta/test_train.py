"""Whole meta-training runs: the same to the bit, however they are run and stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from meta.runs import CHANGES, Inline, outcome, same, small, trained
from meta.worker_jobs import is_running, wait_until

from lhopt_fused import LHOPT
from lhopt_fused.meta.control import control_grid
from lhopt_fused.meta.train import MetaTraining, Update
from lhopt_fused.meta.workers import LocalWorkers
from lhopt_fused.policy import LearnedPolicy, load_policy


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("finished")
    trained(folder, Inline())
    return folder


def test_a_run_repeats_to_the_bit(finished, tmp_path):
    trained(tmp_path, Inline())
    assert same(outcome(tmp_path), outcome(finished))


def test_another_seed_is_another_run(finished, tmp_path):
    trained(tmp_path, Inline(), "seed=1")
    assert not same(outcome(tmp_path)[0]["best"], outcome(finished)[0]["best"])


def test_processes_give_the_same_to_the_bit(finished, tmp_path):
    with LocalWorkers(2) as workers:
        trained(tmp_path, workers)
    assert same(outcome(tmp_path), outcome(finished))


def test_a_run_that_is_killed_goes_on_to_the_bit(finished, tmp_path):
    """Killed after an update that no checkpoint holds, with episodes of the next one on the way."""
    code = f"""
import multiprocessing, os, signal
from pathlib import Path
import torch
from lhopt_fused.meta.config import load_config
from lhopt_fused.meta.control import control_grid
from lhopt_fused.meta.train import MetaTraining
from lhopt_fused.meta.workers import LocalWorkers

def kill(update):
    if update.index == 3:
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    torch.set_num_threads(1)
    workers = LocalWorkers(1)
    config = load_config("tiny", {CHANGES!r})
    MetaTraining(config, Path({str(tmp_path)!r}), workers).run(kill)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["updates"] == 2
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    wait_until(lambda: not any(is_running(int(child)) for child in killed.stdout.split()))
    training = trained(tmp_path, Inline())
    assert training.updates == 5
    assert same(outcome(tmp_path), outcome(finished))


def test_a_run_goes_on_for_longer(finished, tmp_path):
    trained(tmp_path, Inline(), "updates=3")
    assert MetaTraining(small(), tmp_path, Inline()).updates == 3
    trained(tmp_path, Inline())
    rows, expected = outcome(tmp_path)[1], outcome(finished)[1]
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5]
    assert same(rows, expected)


def test_minutes_count_over_all_runs(tmp_path):
    trained(tmp_path, Inline(), "updates=2")
    training = MetaTraining(small("minutes=1e-6"), tmp_path, Inline())
    assert training.seconds > 0
    training.run()
    assert training.updates == 2


def test_what_a_callback_raises_ends_the_run_and_save_keeps_it(finished, tmp_path):
    def stop(update: Update) -> None:
        if update.index == 2:
            raise InterruptedError

    training = MetaTraining(small("checkpoint_minutes=10"), tmp_path, Inline())
    with pytest.raises(InterruptedError):
        training.run(stop)
    training.save()
    trained(tmp_path, Inline(), "checkpoint_minutes=10")
    assert same(outcome(tmp_path)[0]["learner"], outcome(finished)[0]["learner"])


def test_callers_hear_of_updates_and_checkpoints(tmp_path):
    updates: list[Update] = []
    saved: list[int] = []
    training = MetaTraining(small("updates=2"), tmp_path, Inline())
    training.run(updates.append, lambda: saved.append(training.updates))
    assert [update.index for update in updates] == [1, 2]
    assert [update.episodes for update in updates] == [8, 16]
    assert [update.report is None for update in updates] == [True, False]
    assert saved == [0, 1, 2, 2]  # after the search, each update, and at the end


def test_the_policy_file_loads_and_runs(finished):
    policy = load_policy(finished / "tiny.safetensors")
    assert policy.trained_on["episodes"] == 40
    assert policy.trained_on["config"]["tasks"]["longest"] == 16
    control = policy.trained_on["control"]
    assert policy.start_hyperparameters["lr"] == control["lr"]
    assert 0 <= policy.trained_on["validation"]["beats_default"] <= 1
    parameter = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = LHOPT([parameter], total_steps=24, outer_steps=6, policy=policy)
    for _ in range(24):
        loss = parameter.square().sum()
        parameter.grad = 2 * parameter.detach()
        optimizer.observe(loss.item())
        optimizer.step()
    assert parameter.square().sum() < 13
    assert optimizer.param_groups[0]["lr"] != control["lr"]


def test_the_start_may_be_elsewhere_than_the_hand_controls(tmp_path):
    training = trained(tmp_path, Inline(), "updates=1", "policy.start_lr=0.007")
    assert training.policy().start_hyperparameters["lr"] == 0.007


def test_all_hand_controls_are_written_and_the_best_is_taken(finished):
    table = json.loads((finished / "controls.json").read_text())
    best = max(table, key=lambda row: row["reward"])
    control = outcome(finished)[0]["control"]
    assert {"lr": best["lr"], "schedule": best["schedule"]} == control
    assert len(table) == len(control_grid())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed=1", "was written with seed = 0, the configuration has 1"),
        ("ppo.clip=0.1", "was written with ppo = "),
        ("tasks.longest=15", "was written with tasks = "),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(finished, change, words):
    with pytest.raises(ValueError, match=r"checkpoint\.pt " + words):
        MetaTraining(small(change), finished, Inline())


def damaged(finished: Path, folder: Path, **changes: object) -> None:
    """Copy the checkpoint with other entries; None takes one out."""
    state = torch.load(finished / "checkpoint.pt", weights_only=True) | changes
    state = {name: value for name, value in state.items() if name == "best" or value is not None}
    torch.save(state, folder / "checkpoint.pt")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": "0" * 64}, "was written for other policy features"),
        ({"learner": None}, "is no checkpoint of meta-training of this version: .* in learner"),
        ({"step": 3}, "is no checkpoint of meta-training of this version: .* in step"),
        (
            {"config": {"name": "tiny", "colour": 1}},
            "was written by a version with other configurations: there is no key colour",
        ),
        ({"learner": {"state_version": 99}}, "state_version is 99, expected"),
    ],
)
def test_a_checkpoint_of_another_schema_is_refused(finished, tmp_path, changes, words):
    damaged(finished, tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"checkpoint\.pt:? ?{words}"):
        MetaTraining(small(), tmp_path, Inline())


def test_a_checkpoint_that_was_cut_short_is_refused(finished, tmp_path):
    content = (finished / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read as a checkpoint"):
        MetaTraining(small(), tmp_path, Inline())


# ---------------------------------------------------------------------- from another policy


@pytest.fixture(scope="module")
def small_policy(finished) -> str:
    return str(finished / "tiny.safetensors")


def test_a_training_goes_on_from_a_policy(finished, small_policy, tmp_path):
    """Its weights and its hand control: nothing is searched and nothing imitated."""
    workers = Inline()
    initial = f"initial={json.dumps(small_policy)}"
    training = MetaTraining(small(initial, "updates=1"), tmp_path, workers)
    training.run()
    before = load_policy(small_policy)
    assert isinstance(before, LearnedPolicy)
    assert training.control.to_plain() == before.trained_on["control"]
    assert workers.counts.keys() == {"Collect", "FindReferences", "Play"}
    change = training.policy().weights["pre.weight"] - before.weights["pre.weight"]
    assert 0 < abs(change).max() < 0.01


def test_a_training_learns_the_use_of_registers_from_a_policy_without(small_policy, tmp_path):
    workers = Inline()
    changes = (f"initial={json.dumps(small_policy)}", "policy.registers=true", "updates=1")
    training = MetaTraining(small(*changes), tmp_path, workers)
    training.run()
    assert workers.counts["Demonstrate"] == 2
    assert "ScoreControls" not in workers.counts
    policy = training.policy()
    assert policy.action_space.registers
    parameter = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    LHOPT([parameter], total_steps=24, outer_steps=6, policy=policy, restart_registers=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("initial='cosine'",), "initial is 'cosine', a rule; expected a learned policy"),
        (("initial='nobody'",), "there is no policy 'nobody'"),
        (("initial='default'",), "initial is 'default', whose network or choices differ"),
    ],
)
def test_an_initial_policy_that_does_not_fit_is_refused(changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MetaTraining(small(*changes), tmp_path / "run", Inline())
    assert not (tmp_path / "run").exists()
