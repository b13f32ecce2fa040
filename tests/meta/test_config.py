"""Configurations: the shipped ones, changes, and every way to get one wrong."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from meta.runs import small

from lhopt_fused.meta.config import MetaConfig, config_from_plain, load_config, shipped_configs
from lhopt_fused.meta.setting import TaskDistribution


def test_the_shipped_ones_load():
    assert {"tiny", "cpu", "gpu", "cluster", "ablation"} <= shipped_configs().keys()
    for name, path in shipped_configs().items():
        assert load_config(name) == load_config(path)


def test_the_one_for_a_gpu_is_for_a_gpu():
    config = load_config("gpu")
    assert (config.device, config.workers, config.minutes) == ("cuda", 1, 30)
    assert load_config("cpu").device == "cpu"


@pytest.mark.parametrize("name", ["tiny", "cpu", "gpu", "cluster", "ablation"])
def test_plain_values_through_json_give_the_same(name):
    config = load_config(name)
    assert config_from_plain(json.loads(json.dumps(config.to_plain()))) == config


def test_a_config_cannot_be_changed():
    config: object = load_config("tiny")
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[attr-defined]


def test_overrides_replace_values_of_the_file():
    config = load_config(
        "tiny", ["tasks.longest=40", "noise.lr = 3", 'baseline="adamw"', "tasks.families.xor=2"]
    )
    assert config.tasks.longest == 40
    assert config.noise.lr == 3.0
    assert config.baseline == "adamw"
    assert config.tasks.families == {"quadratic": 1.0, "clusters": 1.0, "xor": 2.0}
    assert replace(config.tasks, longest=48, families=load_config("tiny").tasks.families) == (
        load_config("tiny").tasks
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tasks.longset=4", "there is no key tasks.longset; did you mean tasks.longest"),
        ("validations.every=4", "there is no key validations; did you mean validation"),
        ("tasks.x.y=4", "there is no key tasks.x, only families"),
        ("tasks.longest='many'", "tasks.longest is 'many', expected int"),
        ("tasks.longest=1.5", "tasks.longest is 1.5, expected int"),
        ("tasks.longest=true", "tasks.longest is true, expected a value of another type"),
        ("policy.registers=1", "policy.registers is 1, expected bool"),
        ("tasks=3", "tasks is 3, expected TaskDistribution"),
        ("tasks.outer_steps=[2, 3, 4]", "tasks.outer_steps is (2, 3, 4)"),
        ("tasks.families.xor='a'", "tasks.families is"),
        ("policy.trust='half'", "policy.trust is 'half', expected one of exact, delayed"),
        ("baseline='sgd'", "baseline is 'sgd', expected one of adamw, tuned"),
        ("tasks.families.juggling=1", "tasks.families has 'juggling'"),
        ("tasks.families={xor=0}", "tasks.families gives no family a weight above 0"),
        ("tasks.repeats=0", "tasks.repeats is 0"),
        ("tasks.outer_steps=[8, 4]", "tasks.outer_steps is [8, 4]"),
        ("tasks.hidden_eval=2", "tasks.hidden_eval is 2"),
        ("tasks.longest=3", "tasks.longest is 3, but the shortest run has 2 x 4"),
        ("validation.longest=3", "validation.longest is 3, but the shortest run has 2 x 4"),
        ("validation.tasks=0", "validation.tasks is 0"),
        ("validation.every=0", "validation.every is 0"),
        ("cloning.steps=0", "cloning.steps is 0"),
        ("cloning.exploration=1", "cloning.exploration is 1"),
        ("cloning.temperature=0", "cloning.temperature is 0"),
        ("cloning.batches=1", "cloning.batches is 1, expected 0, or 2 at least"),
        ("cloning.batches=9", "cloning.batches is 9, expected at most settings, 4"),
        ("policy.start_lr=0", "policy.start_lr is 0"),
        ("policy.moves=['learning_rate']", "policy.moves has 'learning_rate'"),
        ("policy.lr_choices=[-1.0]", "policy.lr_choices has -1.0, expected factors"),
        ("cloning.learning_rate=0", "cloning.learning_rate is 0"),
        ("noise.clean=-1", "noise.clean is -1"),
        ("policy.hidden=30", "policy.hidden is 30, expected a multiple of 16"),
        ("policy.hide=['nothing like it']", "policy.hide has 'nothing like it'"),
        ("ppo.clip=0", "ppo.clip is 0"),
        ("batches=100", "ppo.buffer_episodes is 768, fewer than the 1600 episodes"),
        ("updates=0", "updates is 0"),
        ("minutes=0", "minutes is 0"),
        ("minutes=nan", "minutes is nan"),
        ("seed=-1", "seed is -1"),
        ("device='tpu'", "device is 'tpu', expected cpu, cuda, or cuda:N"),
        ("name='../up'", "name is '../up'"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(override, words):
    with pytest.raises(ValueError, match=r"tiny\.toml") as caught:
        load_config("tiny", [override])
    assert f": {words}" in str(caught.value)


def test_a_key_that_is_missing_is_named(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("seed = 1\n")
    with pytest.raises(ValueError, match=r"mine\.toml: name is missing"):
        load_config(file)


def test_a_file_that_is_not_toml_is_named(tmp_path):
    file = tmp_path / "mine.toml"
    for content in (b"name = ", b"name = '\xff'"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"mine\.toml is not TOML"):
            load_config(file)


@pytest.mark.parametrize("override", ["tasks.longest", "longest", "tasks.longest=many", "name.x=1"])
def test_an_override_that_is_none_is_named(override):
    with pytest.raises(ValueError, match=override):
        load_config("tiny", [override])


def test_a_config_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="'huge': the shipped ones are ablation, cluster"):
        load_config("huge")


def test_validation_draws_from_the_families_of_training():
    config = small("tasks.families.xor=3", "validation.tasks=5")
    distribution = config.validation_tasks
    assert distribution.families == config.tasks.families
    assert (distribution.tasks, distribution.repeats, distribution.longest) == (5, 1, 24)


def test_episodes_counts_those_of_an_update():
    config = MetaConfig("x", batches=3, tasks=TaskDistribution(tasks=4, repeats=5))
    assert config.episodes == 60


def test_what_a_policy_may_not_move_has_the_one_choice_to_stay():
    space = load_config("tiny", ["policy.moves=['lr']", "policy.keep=false"]).policy.action_space
    assert space.head_sizes == (7, 1, 1, 1, 1, 1, 1, 1)
    assert {action.shifts for action in space.actions[1:]} == {(0.0,)}


def test_the_learning_rate_may_have_other_factors():
    space = load_config("tiny", ["policy.lr_choices=[0.1, 10]"]).policy.action_space
    assert space.actions[0].choices == (0.1, 1.0, 10.0)
    assert space.actions[1].choices == (0.5, 1.0, 2.0)
