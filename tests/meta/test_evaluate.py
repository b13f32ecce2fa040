"""Meta-validation of policy files, and ablations."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from meta.runs import CHANGES, Inline, small
from typer.testing import CliRunner

from lhopt_fused.cli import app
from lhopt_fused.meta import judge_command
from lhopt_fused.meta.ablate import ABLATIONS, Ablation, ablate
from lhopt_fused.meta.config import START_HYPERPARAMETERS
from lhopt_fused.meta.control import HandControl
from lhopt_fused.meta.evaluate import (
    OPPONENTS,
    YARDSTICKS,
    Result,
    evaluate,
    heldout_settings,
    new_settings,
    shares,
    trained_config,
    write_results,
)
from lhopt_fused.meta.figure import draw_ablations
from lhopt_fused.meta.jobs import Play, make_network
from lhopt_fused.meta.setting import Setting
from lhopt_fused.meta.tasks import HELDOUT
from lhopt_fused.policy import LearnedPolicy, StartOptions, save_policy

CONFIG = small()
CONTROL = HandControl(0.03, "linear")


def policy(**trained_on: object) -> LearnedPolicy:
    torch.manual_seed(0)
    about = {"config": CONFIG.to_plain(), "control": CONTROL.to_plain(), **trained_on}
    return LearnedPolicy.from_network(
        make_network(CONFIG),
        name="small",
        action_space=CONFIG.policy.action_space,
        start_hyperparameters={**START_HYPERPARAMETERS, "lr": 0.03},
        trained_on=about,
    )


def result(won: list[float], reward: float = 0.0) -> Result:
    table = {name: np.array(won) for name in OPPONENTS}
    setting = Setting("clusters", 0, len(won), 1, 20, 4)
    return Result(setting, np.full(len(won), reward), table)


def test_shares_are_over_tasks_and_their_intervals_over_settings():
    certain = shares([result([1.0, 1.0]), result([1.0])])
    assert all((s.value, s.low, s.high, s.tasks) == (1, 1, 1, 3) for s in certain.values())
    mixed = shares([result([1.0, 0.5]), result([0.0])] * 20)["tuned"]
    assert mixed.value == pytest.approx(0.5)
    assert 0.2 < mixed.low < 0.5 < mixed.high < 0.8
    few = shares([result([1.0, 0.5]), result([0.0])] * 2)["tuned"]
    assert few.high - few.low > mixed.high - mixed.low  # fewer settings say less
    assert str(certain["default"]) == "100% [100%, 100%]"


def test_new_settings_are_longer_than_what_was_trained_on():
    settings = new_settings(CONFIG, 200, 3)
    assert {setting.runs for setting in settings} == {3}
    longest = max(setting.outer_steps for setting in settings)
    assert CONFIG.tasks.outer_steps[1] < longest <= 2 * CONFIG.tasks.outer_steps[1]
    assert len({setting.seed for setting in settings}) == 200
    assert settings[:5] == new_settings(CONFIG, 5, 3)


def test_held_out_families_come_at_three_lengths():
    settings = heldout_settings(2)
    for family in HELDOUT:
        assert len({s.total_steps for s in settings if s.family == family}) == 3


def test_a_policy_is_compared_with_what_it_was_trained_with(tmp_path):
    workers = Inline()
    settings = new_settings(CONFIG, 2, 3)
    results = evaluate(policy(), settings, workers, tmp_path)
    assert [r.setting for r in results] == settings
    assert all(r.won[name].shape == r.reward.shape == (3,) for r in results for name in OPPONENTS)
    assert all(
        (r.won["hindsight"] <= r.won[name]).all()
        for r in results
        for name in ("default", "tuned", "median")
    )
    for name in YARDSTICKS:
        placed = [r.yardsticks[name].won for r in results]
        assert all((won[name] == 0.5).all() for won in placed)  # level with itself
        assert all((p["hindsight"] <= p["tuned"]).all() for p in placed)
    assert workers.counts["FindReferences"] == 2
    evaluate(policy(), settings, workers, tmp_path, trust="delayed")
    assert workers.counts["FindReferences"] == 4  # its hand control is another one
    write_results(results, tmp_path / "results.json", {"policy": "small"})
    plain = json.loads((tmp_path / "results.json").read_text())
    assert plain["policy"] == "small"
    row = plain["settings"][1]
    assert row["beats_control"] == results[1].won["control"].tolist()
    assert row["yardsticks"]["linear"]["beats_linear"] == [0.5] * 3


class Watching(Inline):
    """Keeps the jobs that play."""

    def __init__(self) -> None:
        super().__init__()
        self.played: list[Play] = []

    def start(self, jobs):
        listed = list(jobs)
        self.played += [job for job in listed if isinstance(job, Play)]
        return super().start(listed)


@pytest.mark.parametrize("share", [None, 0.0, 1.0])
def test_the_eval_loss_may_be_shown_or_hidden(tmp_path, share):
    workers = Watching()
    evaluate(policy(), new_settings(CONFIG, 4, 8), workers, tmp_path, hidden_eval=share)
    shown = [job.batch(START_HYPERPARAMETERS).has_eval_loss for job in workers.played]
    found = torch.cat(shown).float().mean()
    assert found == 1 - share if share is not None else 0 < found < 1


def test_a_policy_is_played_as_its_file_says(tmp_path):
    options = StartOptions("delayed", lamb_ignore_vectors=False, lr_steps=7)
    for trust in (None, "exact"):
        workers = Watching()
        changed = replace(policy(), start_options=options)
        evaluate(changed, new_settings(CONFIG, 1, 2), workers, tmp_path, trust=trust)
        expected = replace(options, trust=trust or "delayed")
        assert [job.config.policy.start_options for job in workers.played] == [expected]


def test_a_policy_that_does_not_say_what_it_was_trained_on_is_refused():
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        trained_config(policy(config=None))


def test_the_command_prints_a_table_and_writes_results(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_command, "_pool", lambda count: nullcontext(Inline()))
    file = tmp_path / "small.safetensors"
    save_policy(policy(), file)
    options = ["--settings", "2", "--tasks", "2", "--heldout", "0", "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(app, ["meta-validate", str(file), *options])
    assert run.exit_code == 0, run.output
    assert all(row in run.output for row in ("all ", "(tuned)", "(control)", "(linear)"))
    assert (tmp_path / "out" / "small-new-tasks.json").is_file()
    refused = CliRunner().invoke(app, ["meta-validate", "cosine"])
    assert refused.exit_code == 2
    assert "only learned policies" in refused.output


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_ablation_changes_one_thing(name: str):
    config = small("policy.moves=['lr']")
    changed = ABLATIONS[name](config)
    fields = [f for f in config.to_plain() if changed.to_plain()[f] != config.to_plain()[f]]
    assert len(fields) == (0 if name == "everything" else 1)


def test_ablations_are_trained_and_judged_alike(tmp_path):
    config = replace(CONFIG, updates=1)
    names = ["everything", "progress only", "no memory"]
    done = list(ablate(config, names, tmp_path, Inline(), settings=2, tasks=2))
    assert [ablation.name for ablation in done] == names
    assert all(len(ablation.results) == 2 for ablation in done)
    assert len(list((tmp_path / "kept").glob("controls-*"))) == 1  # searched once for all
    rewards = {a.name: a.reward() for a in done}
    draw_ablations(
        tmp_path / "ablations.png", {"all": rewards, "some": dict([*rewards.items()][1:])}
    )
    assert (tmp_path / "ablations.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="there is no ablation 'no luck'"):
        next(ablate(config, ["no luck"], tmp_path, Inline()))


def ablation(*rewards: float) -> Ablation:
    return Ablation("x", [result([1.0], reward) for reward in rewards], 0, Path())


def test_the_interval_of_a_reward_holds_its_mean():
    mean, low, high = ablation(0, 1, 2).reward()
    assert mean == 1.0
    assert 0 <= low < mean < high <= 2


def test_changes_are_counted_task_by_task():
    """Tasks differ more than policies do: a change is surer than the rewards are."""
    whole = ablation(0, 1, 2)
    change = ablation(-0.5, 0.5, 1.5).change(whole)
    assert change == (-0.5, -0.5, -0.5)
    assert str(change) == "-0.50 [-0.50, -0.50]"
    assert whole.change(whole) == (0, 0, 0)


def test_the_command_for_ablations_writes_a_picture_and_results(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_command, "_pool", lambda count: nullcontext(Inline()))
    changes = [part for change in (*CHANGES, "updates=1") for part in ("--set", change)]
    sizes = ["--settings", "2", "--tasks", "2", "--out", str(tmp_path)]
    chosen = ["--only", "everything", "--only", "no memory"]
    run = CliRunner().invoke(app, ["meta-ablate", "tiny", *chosen, *sizes, *changes])
    assert run.exit_code == 0, run.output
    assert "no" in run.output
    assert (tmp_path / "ablations.png").stat().st_size > 1000
    plain = json.loads((tmp_path / "no-memory" / "results.json").read_text())
    assert plain["ablation"] == "no memory"
    assert len(plain["settings"]) == 2
