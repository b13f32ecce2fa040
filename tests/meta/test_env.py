"""The environment as gymnasium wants it, and its two forms against one another."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode
from meta.runs import small

from lhopt_fused.meta.env import LHOPTEnv, LHOPTVectorEnv
from lhopt_fused.meta.episode import PRIVILEGED_INPUTS
from lhopt_fused.policy import FEATURES
from lhopt_fused.types import HYPERPARAMETERS

CONFIG = small()
RUNS = CONFIG.tasks.tasks * CONFIG.tasks.repeats


def random_actions(seed: int, runs: int = RUNS) -> Iterator[np.ndarray]:
    """One choice per head and run; the same for the same seed."""
    rng = np.random.default_rng(seed)
    sizes = np.array(CONFIG.policy.action_space.head_sizes)
    while True:
        yield rng.integers(0, sizes, (runs, len(sizes)))


def episode(env: LHOPTVectorEnv, seed: int) -> list[tuple[np.ndarray, ...]]:
    """Observation, privileged, rewards and ends of each outer step under random actions."""
    seen, infos = env.reset(seed=seed)
    steps = [(seen, infos["privileged"])]
    for actions in random_actions(1):
        seen, rewards, done, truncated, infos = env.step(actions)
        assert not truncated.any()
        steps.append((seen, infos["privileged"], rewards, done))
        if done.all():
            return steps
    raise AssertionError("unreachable")


def same(one: list[tuple[np.ndarray, ...]], other: list[tuple[np.ndarray, ...]]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(x, y)
        for row, twin in zip(one, other, strict=True)
        for x, y in zip(row, twin, strict=True)
    )


def test_gymnasium_approves():
    check_env(LHOPTEnv(CONFIG), skip_render_check=True)


def test_the_same_seed_is_the_same_episode():
    env = LHOPTVectorEnv(CONFIG)
    first = episode(env, 5)
    assert same(first, episode(env, 5))
    assert same(first, episode(LHOPTVectorEnv(CONFIG), 5))
    assert not same(first, episode(env, 6))


def test_an_episode_is_rewarded_at_its_end_only():
    env = LHOPTVectorEnv(CONFIG)
    steps = episode(env, 5)
    assert len(steps) == env.batch.setting.outer_steps
    for seen, privileged, *_ in steps:
        assert env.observation_space.contains(seen)
        assert privileged.shape == (RUNS, PRIVILEGED_INPUTS)
        assert np.isfinite(privileged).all()
    for _, _, rewards, done in steps[1:-1]:
        assert not rewards.any()
        assert not done.any()
    rewards = steps[-1][2]
    assert (rewards != 0).any()
    assert (np.abs(rewards) <= 3).all()
    assert np.array_equal(rewards, env.batch.rewards().numpy())


def test_the_step_after_the_end_begins_the_next_episode():
    assert LHOPTVectorEnv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    env = LHOPTVectorEnv(CONFIG)
    episode(env, 5)
    over = env.batch
    actions = next(random_actions(2))
    seen, rewards, done, _, infos = env.step(actions)
    assert env.batch is not over
    assert env.batch.outer_step == 1
    assert env.observation_space.contains(seen)
    assert not rewards.any()
    assert not done.any()
    assert "report_loss" not in infos
    assert env.batch.setting != over.setting


def test_the_report_loss_comes_at_the_end():
    env = LHOPTVectorEnv(CONFIG)
    episode(env, 5)
    _, infos = env.reset(seed=5)
    assert "report_loss" not in infos
    for actions in random_actions(1):
        *_, done, _, infos = env.step(actions)
        if done.all():
            break
    assert np.array_equal(infos["report_loss"], env.batch.inner.loss("report").numpy())


def test_choices_move_hyperparameters():
    env = LHOPTVectorEnv(small("noise.clean=1"))
    env.reset(seed=5)
    before = env.batch.inner.hyperparameters.clone()
    space = CONFIG.policy.action_space
    keep = [action.shifts.index(0.0) for action in space.actions]
    choices = np.tile(keep, (RUNS, 1))
    lr = HYPERPARAMETERS.index("lr")
    choices[1, lr] = len(space.actions[lr].choices) - 1
    env.step(choices)
    ratio = (env.batch.inner.hyperparameters / before).numpy()
    assert ratio[1, lr] == pytest.approx(2.0)
    ratio[1, lr] = 1.0
    assert ratio == pytest.approx(np.ones_like(ratio))


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((RUNS, 3), np.int64), np.full((RUNS, len(HYPERPARAMETERS)), 99), np.zeros(RUNS)],
    ids=["too few heads", "no such choice", "one per run"],
)
def test_bad_actions_are_refused_and_change_nothing(wrong):
    env = LHOPTVectorEnv(CONFIG)
    env.reset(seed=5)
    with pytest.raises(ValueError, match="no choices of 4 runs in MultiDiscrete"):
        env.step(wrong)
    assert env.batch.outer_step == 1


def test_nothing_comes_before_reset():
    for env in (LHOPTEnv(CONFIG), LHOPTVectorEnv(CONFIG)):
        with pytest.raises(RuntimeError, match="call reset"):
            env.step(next(random_actions(0, 1))[0])


def test_a_run_that_is_over_is_not_stepped():
    env = LHOPTEnv(CONFIG)
    env.reset(seed=0)
    over = False
    while not over:
        *_, over, _, _ = env.step(env.action_space.sample())
    with pytest.raises(RuntimeError, match="the run is over"):
        env.step(env.action_space.sample())


def test_runs_of_an_episode_share_one_seed():
    with pytest.raises(ValueError, match="pass one int"):
        LHOPTVectorEnv(CONFIG).reset(seed=[1, 2, 3, 4])


def test_one_run_is_a_batch_of_one():
    single = LHOPTEnv(CONFIG)
    assert isinstance(single, gymnasium.Env)
    assert single.observation_space.shape == (len(FEATURES),)
    first, infos = single.reset(seed=3)
    batch = LHOPTVectorEnv(small("tasks.tasks=1", "tasks.repeats=1"))
    inner_seed = int(np_random(3)[0].integers(2**31))
    seen, batch_infos = batch.reset(seed=inner_seed)
    assert np.array_equal(first, seen[0])
    assert np.array_equal(infos["privileged"], batch_infos["privileged"][0])
    for actions in random_actions(4, 1):
        first, reward, over, _, _ = single.step(actions[0])
        seen, rewards, done, _, _ = batch.step(actions)
        assert np.array_equal(first, seen[0])
        assert (reward, over) == (rewards[0], done[0])
        if over:
            break
