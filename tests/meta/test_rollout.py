"""What is collected is what PPO will compute again; runs that diverge are worth -3."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from meta.runs import small
from tolerances import REWARD, UNROLL, assert_close

from lhopt_fused.meta import episode
from lhopt_fused.meta.baselines import SCHEDULES, final_losses
from lhopt_fused.meta.config import START_HYPERPARAMETERS
from lhopt_fused.meta.critic import Critic, unroll_critic, unroll_policy
from lhopt_fused.meta.episode import EpisodeBatch, Rival, sample_tasks
from lhopt_fused.meta.jobs import make_critic, make_network
from lhopt_fused.meta.learner import Learner
from lhopt_fused.meta.ppo import Episodes, log_probability
from lhopt_fused.meta.rollout import collect, play
from lhopt_fused.meta.setting import Setting
from lhopt_fused.meta.tasks import TaskBatch
from lhopt_fused.policy import PolicyNetwork

CONFIG = small()
SETTING = Setting("quadratic", 11, tasks=2, repeats=2, total_steps=12, outer_steps=4)


def fresh(setting: Setting = SETTING, **options: object) -> EpisodeBatch:
    keywords = {"noise": CONFIG.noise, "hidden_eval": 0.5, "baseline": "tuned", **options}
    policy = CONFIG.policy
    settings = policy.settings(START_HYPERPARAMETERS)
    return EpisodeBatch(setting, settings, policy.action_space, **keywords)


@pytest.fixture
def networks() -> tuple[PolicyNetwork, Critic]:
    torch.manual_seed(0)
    network, critic = make_network(CONFIG).eval(), make_critic(CONFIG).eval()
    for head in network.heads:  # decided, so that probabilities differ
        torch.nn.init.normal_(head.logits.weight, std=0.5)
    return network, critic


def test_collected_probabilities_are_those_that_ppo_computes(networks):
    network, critic = networks
    episodes = collect(fresh(), network, critic, version=7)
    logits = unroll_policy(network, episodes.features, episodes.mask)
    again = log_probability(logits, episodes.choices, network.shape.heads)
    assert_close(episodes.log_probs, again, UNROLL, again.abs().max())
    shifted = log_probability(logits.roll(1, dims=1), episodes.choices, network.shape.heads)
    with pytest.raises(AssertionError):
        assert_close(episodes.log_probs, shifted, UNROLL, again.abs().max())


def test_values_are_the_critics_and_how_far_it_was_wrong_about_the_other_runs(networks):
    """Of the two runs of a task, each is told the error of the other."""
    discount = 0.9
    episodes = collect(fresh(), *networks, version=7, discount=discount)
    critics = unroll_critic(networks[1], episodes.features, episodes.privileged, episodes.mask)
    worth = episodes.rewards[:, -1:] * discount ** torch.tensor([2, 1, 0])
    errors = worth - critics
    expected = critics + errors[[1, 0, 3, 2]]
    assert_close(episodes.values, expected, UNROLL, expected.abs().max())
    with pytest.raises(AssertionError):
        assert_close(episodes.values, critics + errors, UNROLL, expected.abs().max())


def test_a_run_that_is_alone_with_its_task_has_the_critics_values(networks):
    episodes = collect(fresh(replace(SETTING, tasks=4, repeats=1)), *networks, version=7)
    values = unroll_critic(networks[1], episodes.features, episodes.privileged, episodes.mask)
    assert_close(episodes.values, values, UNROLL, values.abs().max())


def test_episodes_have_a_decision_for_each_outer_step_but_the_last(networks):
    episodes = collect(fresh(), *networks, version=7)
    assert episodes.mask.shape == (4, 3)
    assert episodes.mask.all()
    assert episodes.version.tolist() == [7] * 4
    assert (episodes.rewards[:, :-1] == 0).all()
    assert (episodes.rewards[:, -1] != 0).any()


def test_one_setting_is_one_set_of_episodes(networks):
    def collected(seed: int) -> Episodes:
        return collect(fresh(replace(SETTING, seed=seed)), *networks, version=0)

    first, again, other = (collected(seed).to_tensors() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["choices"], other["choices"])


def test_runs_of_one_task_choose_differently(networks):
    episodes = collect(fresh(), *networks, version=0)
    assert not torch.equal(episodes.choices[0], episodes.choices[1])


def test_some_runs_show_no_eval_loss_and_none_is_without_its_start():
    batch = fresh(replace(SETTING, tasks=8, repeats=8))
    assert 16 < batch.has_eval_loss.sum() < 48
    assert fresh(hidden_eval=0.0).has_eval_loss.all()


def diverging(from_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lose the second task's losses to NaN from a step on."""

    def sampled(setting: Setting, *where: object) -> TaskBatch:
        tasks = sample_tasks(setting, *where)
        bad = tasks.seeds[1].item()
        kind = type(tasks)
        train, held_out = kind.train_loss, kind.eval_loss

        class Diverging(kind):
            step = 0

            def poison(self, losses: torch.Tensor) -> torch.Tensor:
                lost = (self.seeds == bad) & (self.step >= from_step)
                return losses * torch.where(lost, torch.nan, 1.0)

            def train_loss(self, params, step):
                self.step = step + 1
                return self.poison(train(self, params, step))

            def eval_loss(self, params, split):
                return self.poison(held_out(self, params, split))

        tasks.__class__ = Diverging
        return tasks

    monkeypatch.setattr(episode, "sample_tasks", sampled)


@pytest.mark.parametrize("from_step", [0, 1, 5])
def test_diverged_runs_are_worth_minus_three_and_nothing_is_nan(networks, monkeypatch, from_step):
    """Also where the baseline diverges with them."""
    diverging(from_step, monkeypatch)
    network, critic = networks
    batch = fresh()
    episodes = collect(batch, network, critic, version=0)
    assert batch.inner.loss("report").isnan().tolist() == [False, False, True, True]
    assert episodes.rewards[2:, -1].tolist() == [-3.0, -3.0]
    assert (episodes.rewards[:2, -1] != -3).any()
    for name, tensor in episodes.to_tensors().items():
        assert tensor.double().isfinite().all(), name
    metrics = Learner(network, critic, CONFIG.ppo).update(episodes)
    assert all(torch.tensor(value).isfinite() for value in metrics.values())
    for module in (network, critic):
        assert all(value.isfinite().all() for value in module.state_dict().values())


def test_played_hyperparameters_follow_each_decision(networks):
    batch = fresh(noise=None, baseline=None)
    outcome = play(batch, networks[0])
    assert outcome.hyperparameters.shape == (4, 3, 8)
    assert torch.equal(outcome.hyperparameters[:, -1], batch.inner.hyperparameters)
    assert torch.equal(outcome.losses, batch.inner.loss("report"))
    start = torch.tensor(list(START_HYPERPARAMETERS.values()), dtype=torch.float64)
    assert not torch.equal(outcome.hyperparameters[:, 0], start.expand(4, 8))


@pytest.mark.parametrize("lr", [1e-6, 3e-3, 0.5])
def test_ending_below_a_rival_is_worth_something(networks, lr):
    network, critic = networks
    plain = collect(batch := fresh(), network, critic, version=0)
    losses = batch.inner.loss("report")
    settings = CONFIG.policy.settings({**START_HYPERPARAMETERS, "lr": lr})
    rival = Rival(settings, SCHEDULES["linear"], worth=2.0)
    won = collect(fresh(rival=rival), network, critic, version=0)
    tasks = sample_tasks(SETTING, "cpu", None)
    others = final_losses(tasks, [settings], [rival.schedule], SETTING.total_steps)[0]
    below = losses < others[SETTING.task_of_run]
    assert bool(below.all()) == (lr == 1e-6)  # which is hardly a rival
    before, after = plain.rewards[:, -1], won.rewards[:, -1]
    assert_close(after, before + 2.0 * below, REWARD, 3.0)
    with pytest.raises(AssertionError):
        assert_close(after, before + 2.0 * ~below, REWARD, 3.0)
    assert (won.rewards[:, :-1] == 0).all()


def test_rewards_need_episodes_that_are_over():
    with pytest.raises(RuntimeError, match="episodes that are over"):
        fresh().rewards()
