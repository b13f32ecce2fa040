"""The maths of PPO against cases worked out by hand, and its gradient against differences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from meta.toys import (
    FEATURE_COUNT,
    HEADS,
    PRIVILEGED_COUNT,
    random_episodes,
    small_learner,
    with_version,
)
from tolerances import PPO_GRADIENT, PPO_HAND, UNROLL, assert_close
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

from lhopt_fused.meta import ppo
from lhopt_fused.meta.critic import Critic, unroll_critic, unroll_policy
from lhopt_fused.meta.learner import Learner
from lhopt_fused.meta.ppo import (
    Episodes,
    PPOConfig,
    approximate_kl,
    clip_fraction,
    clipped_policy_loss,
    entropy,
    explained_variance,
    generalised_advantages,
    kl_divergence,
    log_probability,
    masked_mean,
    normalised,
    ppo_losses,
    value_loss,
)
from lhopt_fused.policy import NetworkShape, PolicyNetwork

ALL = torch.ones(1, 1, dtype=torch.bool)


def row(*numbers: float) -> torch.Tensor:
    """One episode, float64 ``[1, T]``."""
    return torch.tensor([numbers], dtype=torch.float64)


def same(value: torch.Tensor, *numbers: float) -> None:
    expected = torch.tensor(numbers, dtype=torch.float64).view(value.shape)
    assert_close(value, expected, PPO_HAND, expected.abs().clamp_min(1.0))


# ---------------------------------------------------------------------- advantages


def test_advantages_by_hand() -> None:
    """Discount .9 and lambda .5: delta is (.04, .13, .3), the factor between steps .45."""
    advantages = generalised_advantages(
        row(0.0, 0.1, 1.0), row(0.5, 0.6, 0.7), torch.ones(1, 3, dtype=torch.bool), 0.9, 0.5
    )
    same(advantages, 0.04 + 0.45 * (0.13 + 0.45 * 0.3), 0.13 + 0.45 * 0.3, 0.3)


def test_nothing_is_worth_anything_behind_an_end() -> None:
    """Episodes of 1, 2 and 3 steps; rewards and values in the padding are looked at by no one."""
    mask = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    rewards = torch.where(mask, torch.tensor([1.0, 2.0, 4.0]), 99.0).double()
    values = torch.where(mask, 0.5, 99.0).double()
    advantages = generalised_advantages(rewards, values, mask, 1.0, 1.0)
    same(advantages, 0.5, 0, 0, 2.5, 1.5, 0, 6.5, 5.5, 3.5)
    unmasked = generalised_advantages(rewards, values, torch.ones_like(mask), 1.0, 1.0)
    assert not torch.allclose(advantages[:2], unmasked[:2])


def test_lambda_0_looks_one_step_ahead() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages = generalised_advantages(row(1.0, 1.0), row(0.25, 2.0), mask, 1.0, 0.0)
    same(advantages, 2.75, -1.0)


def test_advantages_are_normalised_over_the_steps_that_took_place() -> None:
    mask = torch.tensor([[True, True, True, False]])
    same(normalised(row(1.0, 2.0, 3.0, 1e6), mask), -math.sqrt(1.5), 0.0, math.sqrt(1.5), 0.0)
    same(normalised(row(5.0, 5.0, 5.0, 1.0), mask), 0.0, 0.0, 0.0, 0.0)


# ---------------------------------------------------------------------- distributions


def test_choices_by_hand() -> None:
    """Probabilities (1/2, 1/4, 1/4) and (1/3, 2/3)."""
    logits = torch.tensor([4.0, 2.0, 2.0, 5.0, 10.0]).double().log()
    first = 1.5 * math.log(2)
    second = math.log(3) - 2 / 3 * math.log(2)
    same(log_probability(logits, torch.tensor([0, 1]), HEADS), math.log(1 / 2 * 2 / 3))
    same(log_probability(logits, torch.tensor([2, 0]), HEADS), math.log(1 / 4 * 1 / 3))
    same(entropy(logits, HEADS), first, second)
    uniform = torch.zeros(5, dtype=torch.float64)
    same(kl_divergence(logits, uniform, HEADS), math.log(3) - first, math.log(2) - second)
    same(kl_divergence(logits, logits + 3.0, HEADS), 0.0, 0.0)


def test_choices_against_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    choices = random_episodes(0, 3, 4).choices
    mine = [Categorical(logits=head) for head in logits.split(HEADS, -1)]
    theirs = [Categorical(logits=head) for head in other.split(HEADS, -1)]
    pairs = zip(mine, choices.unbind(-1), strict=True)
    expected = torch.stack([head.log_prob(choice) for head, choice in pairs])
    assert_close(log_probability(logits, choices, HEADS), expected.sum(0), PPO_HAND, 10.0)
    expected = torch.stack([head.entropy() for head in mine], -1)
    assert_close(entropy(logits, HEADS), expected, PPO_HAND, 1.0)
    expected = torch.stack([torch_kl(p, q) for p, q in zip(mine, theirs, strict=True)], -1)
    assert_close(kl_divergence(logits, other, HEADS), expected, PPO_HAND, 10.0)
    assert not torch.allclose(kl_divergence(other, logits, HEADS), expected)


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # far enough
        (0.5, 2.0, -1.0, -1.0),  # the way back is open
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    log_ratio = row(math.log(ratio)).requires_grad_()
    value = clipped_policy_loss(log_ratio, row(advantage), ALL, 0.2)
    value.backward()
    same(value, loss)
    assert log_ratio.grad is not None
    same(log_ratio.grad, gradient)


def test_value_loss_by_hand() -> None:
    mask = torch.tensor([[True, True, False]])
    values, old, returns = row(1.0, 0.0, 50.0), row(0.0, 0.0, 0.0), row(2.0, 1.0, 0.0)
    same(value_loss(values, old, returns, mask), 0.5)
    same(value_loss(values, old, returns, mask, 0.5), (1.5**2 + 1.0) / 4)
    values.requires_grad_()
    value_loss(values, old, returns, mask, 0.5).backward()
    assert values.grad is not None
    same(values.grad, 0.0, -0.5, 0.0)  # the first one has moved far enough


def test_numbers_to_look_at_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False]])
    log_ratio = row(0.0, math.log(2.0), math.log(0.9), 7.0)
    same(approximate_kl(log_ratio, mask), (1 - math.log(2) - 0.1 - math.log(0.9)) / 3)
    same(clip_fraction(log_ratio, mask, 0.2), 1 / 3)
    returns = row(1.0, 2.0, 3.0, 9.0)
    same(explained_variance(returns, returns, mask), 1.0)
    same(explained_variance(returns + 5.0, returns, mask), 1.0)
    same(explained_variance(torch.zeros_like(returns), returns, mask), 0.0)
    same(explained_variance(-returns, returns, mask), -3.0)
    same(explained_variance(returns, torch.ones_like(returns), mask), 0.0)
    same(masked_mean(returns, mask), 2.0)
    same(masked_mean(returns, torch.zeros_like(mask)), 0.0)


def test_the_parts_add_up() -> None:
    config = PPOConfig(value_weight=0.7, kl_to_initial=0.3)
    episodes = random_episodes(0)
    generator = torch.Generator().manual_seed(0)
    logits, initial = torch.randn(2, *episodes.mask.shape, sum(HEADS), generator=generator)
    losses = ppo_losses(logits, episodes.values + 1, episodes, HEADS, config, 0.01, initial)
    m = losses.metrics
    expected = (
        m["policy_loss"] + 0.7 * m["value_loss"] - 0.01 * m["entropy"] + 0.3 * m["kl_to_initial"]
    )
    assert_close(losses.total, expected, UNROLL, 1.0)
    assert all(not metric.requires_grad for metric in m.values())


@pytest.mark.parametrize("extreme", [3e38, 1e4, 100.0])
def test_no_ratio_makes_a_nan(extreme: float) -> None:
    for advantage in (-1.0, 1.0):
        log_ratio = torch.tensor([[extreme, -extreme]], requires_grad=True)
        mask = torch.ones(1, 2, dtype=torch.bool)
        loss = clipped_policy_loss(log_ratio, torch.full((1, 2), advantage), mask, 0.2)
        loss.backward()
        assert log_ratio.grad is not None
        assert bool(loss.isfinite())
        assert bool(log_ratio.grad.isfinite().all())
        assert bool(approximate_kl(log_ratio, mask).isfinite())


def test_no_accepted_episode_makes_a_nan() -> None:
    """Whatever is finite and accepted, at its most extreme, leaves every parameter finite."""
    episodes = random_episodes(0, 32, 6)
    sign = random_episodes(1, 32, 6)
    extreme = replace(
        episodes,
        features=1e6 * sign.features.sign(),
        privileged=3e38 * sign.privileged.sign(),
        log_probs=-3e38 * (sign.rewards > 0).float(),
        values=1e6 * sign.values.sign(),
        rewards=1e6 * sign.rewards.sign(),
    )
    learner = small_learner(PPOConfig(minibatch_episodes=8, kl_to_initial=1.0))
    for update in range(3):
        metrics = learner.update(with_version(extreme, update))
        assert all(map(math.isfinite, metrics.values()))
    for module in (learner.network, learner.critic, learner.average):
        assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


# ---------------------------------------------------------------------- the gradient


def perturbed_loss(learner: Learner, episodes: Episodes, direction: list[torch.Tensor]) -> float:
    """The slope of the objective along a direction, from differences."""
    parameters = [*learner.network.parameters(), *learner.critic.parameters()]
    step, ends = 1e-8, []
    with torch.no_grad():
        for sign in (1.0, -2.0, 1.0):
            for parameter, part in zip(parameters, direction, strict=True):
                parameter.add_(part, alpha=sign * step)
            ends.append(learner.losses(episodes).total.item())
    return (ends[0] - ends[1]) / (2 * step)


def gradient_errors(learner: Learner, weights: PPOConfig) -> list[float]:
    """Relative errors, along random directions, of the gradient under other weights."""
    for module in (learner.network, learner.critic):
        module.double()
    if learner.initial is not None:
        learner.initial.double()
    episodes = random_episodes(0, 100, 7)
    parameters = [*learner.network.parameters(), *learner.critic.parameters()]
    right, learner.config = learner.config, weights
    gradient = torch.autograd.grad(learner.losses(episodes).total, parameters)
    learner.config = right
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(8):
        direction = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters
        ]
        slope = sum((g * d).sum().item() for g, d in zip(gradient, direction, strict=True))
        expected = perturbed_loss(learner, episodes, direction)
        errors.append(abs(slope - expected) / max(abs(expected), 1e-3))
    return errors


GRADIENT_CONFIG = PPOConfig(
    entropy_start=0.3, value_clip=0.5, gae_lambda=0.8, discount=0.97, kl_to_initial=0.5
)


def gradient_learner() -> Learner:
    """Ratios on both sides of the clips, and a policy away from its start."""
    learner = small_learner(GRADIENT_CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*learner.network.parameters(), *learner.critic.parameters()]:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return learner


def test_the_gradient_is_that_of_the_objective() -> None:
    """Over 100 episodes, in float64, with every term of it at work."""
    learner = gradient_learner()
    fraction = learner.losses(random_episodes(0, 100, 7)).metrics["clip_fraction"]
    assert 0.1 < fraction < 0.9
    assert max(gradient_errors(learner, GRADIENT_CONFIG)) < PPO_GRADIENT.relative


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": 0.25},
        {"entropy_start": 0.29},
        {"value_weight": 0.49},
        {"value_clip": None},
        {"gae_lambda": 0.79},
        {"kl_to_initial": 0.49},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_slightly_wrong_gradient_is_seen(wrong: dict[str, Any]) -> None:
    errors = gradient_errors(gradient_learner(), replace(GRADIENT_CONFIG, **wrong))
    assert max(errors) > 10 * PPO_GRADIENT.relative


def test_a_wrong_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the entropy, in the gradient alone."""

    class Flipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return -gradients[0]

    monkeypatch.setattr(ppo, "entropy", lambda *inputs: Flipped.apply(entropy(*inputs)))
    errors = gradient_errors(gradient_learner(), GRADIENT_CONFIG)
    assert max(errors) > 10 * PPO_GRADIENT.relative


# ---------------------------------------------------------------------- whole episodes at once


def stepped(
    network: PolicyNetwork, critic: Critic, episodes: Episodes, forget: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and values, one outer step after another."""
    count = len(episodes)
    state, memory = network.initial_state((count,)), critic.initial_state((count,))
    logits, values = [], []
    for features, privileged in zip(
        episodes.features.unbind(1), episodes.privileged.unbind(1), strict=True
    ):
        if forget:
            state, memory = network.initial_state((count,)), critic.initial_state((count,))
        logit, state = network(features, state)
        value, memory = critic(features, privileged, memory)
        logits.append(logit)
        values.append(value)
    return torch.stack(logits, 1), torch.stack(values, 1)


def lively_learner() -> Learner:
    """Weights and input statistics that are not the initial ones."""
    learner = small_learner()
    for update in range(2):
        learner.update(random_episodes(update, 20, version=update))
    torch.manual_seed(0)
    for module in (learner.network, learner.critic):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return learner


def test_unrolling_is_stepping() -> None:
    learner, episodes = lively_learner(), random_episodes(5, 9, 7)
    mask = episodes.mask
    logits = unroll_policy(learner.network, episodes.features, mask)
    values = unroll_critic(learner.critic, episodes.features, episodes.privileged, mask)
    assert not logits[~mask].any()
    assert not values[~mask].any()
    expected_logits, expected_values = stepped(learner.network, learner.critic, episodes)
    scale = expected_logits.abs().max()
    assert_close(logits[mask], expected_logits[mask], UNROLL, scale)
    assert_close(values[mask], expected_values[mask], UNROLL, expected_values.abs().max())
    forgetful, _ = stepped(learner.network, learner.critic, episodes, forget=True)
    assert (forgetful[mask] - logits[mask]).abs().max() > 0.01 * scale


def test_padding_changes_nothing() -> None:
    learner, episodes = lively_learner(), random_episodes(5, 9, 7)
    other = replace(
        episodes, features=torch.where(episodes.mask[..., None], episodes.features, -9.0)
    ).padded(11)
    losses, padded = learner.losses(episodes), learner.losses(other)
    assert torch.equal(losses.total, padded.total)


def test_unrolling_leaves_the_statistics_alone() -> None:
    learner, episodes = lively_learner(), random_episodes(5)
    before = learner.network.normalisation.mean.clone()
    unroll_policy(learner.network.train(), episodes.features, episodes.mask)
    assert torch.equal(learner.network.normalisation.mean, before)
    learner.network(episodes.features[:, 0], learner.network.initial_state((6,)))
    assert not torch.equal(learner.network.normalisation.mean, before)


def test_the_critic_sees_what_the_policy_does_not() -> None:
    learner, episodes = lively_learner(), random_episodes(5)
    other = replace(episodes, privileged=-episodes.privileged)

    def values(of: Episodes) -> torch.Tensor:
        return unroll_critic(learner.critic, of.features, of.privileged, of.mask)

    assert not torch.allclose(values(episodes), values(other))
    fresh = Critic(FEATURE_COUNT, PRIVILEGED_COUNT, 16)
    value, _ = fresh(episodes.features[:, 0], episodes.privileged[:, 0], fresh.initial_state((6,)))
    assert not value.any()


def test_critic_and_policy_share_nothing() -> None:
    learner = small_learner()
    policy = {p.data_ptr() for p in learner.network.parameters()}
    assert not policy & {p.data_ptr() for p in learner.critic.parameters()}
    with pytest.raises(ValueError, match="the critic takes 4 features"):
        Learner(PolicyNetwork(NetworkShape(5, HEADS, 16, 16)), Critic(4, 1, 16), PPOConfig())


# ---------------------------------------------------------------------- episodes and config


def test_concatenating_pads_and_selecting_trims() -> None:
    short, long = random_episodes(0, 3, 2), random_episodes(1, 4, 6)
    both = Episodes.concatenate([short, long])
    assert both.mask.shape == (7, 6)
    assert not both.features[:3, 2:].any()
    for indices, part in ((torch.arange(3), short), (torch.arange(3, 7), long)):
        again = both.select(indices).to_tensors()
        assert all(torch.equal(again[name], x) for name, x in part.to_tensors().items())
    assert torch.equal(both.lengths, torch.cat([short.lengths, long.lengths]))
    assert len(both.select(torch.zeros(0, dtype=torch.int64))) == 0


def test_episodes_travel_as_tensors() -> None:
    tensors = random_episodes(0).to_tensors()
    again = Episodes.from_tensors(tensors).to("cpu").to_tensors()
    assert all(torch.equal(again[name], x) for name, x in tensors.items())
    tensors["masks"] = tensors.pop("mask")
    with pytest.raises(ValueError, match="missing or unknown: mask, masks"):
        Episodes.from_tensors(tensors)


def poisoned(tensor: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("features", (1, 2, 3)),
        ("privileged", (1, 2, 0)),
        ("log_probs", (1, 2)),
        ("values", (1, 2)),
        ("rewards", (1, 2)),
    ],
)
def test_numbers_that_are_not_finite_are_refused(
    name: str, place: tuple[int, ...], value: float
) -> None:
    episodes = random_episodes(0)
    found = poisoned(getattr(episodes, name), place, value)
    message = rf"{name}\[{', '.join(map(str, place))}\] is {value}, expected finite"
    with pytest.raises(ValueError, match=message):
        replace(episodes, **{name: found})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": torch.full((6, 5, 5), 2e6)}, "features reach 2e"),
        ({"rewards": torch.full((6, 5), -2e6)}, "rewards reach 2e"),
        ({"features": torch.zeros(6, 4, 5)}, r"features is torch.float32 \[6, 4, 5\], expected"),
        ({"rewards": torch.zeros(6, 5).double()}, "rewards is torch.float64"),
        ({"choices": torch.zeros(6, 5, dtype=torch.int64)}, "choices has 2 dimensions"),
        ({"version": torch.zeros(5, dtype=torch.int64)}, "version is torch.int64"),
        ({"mask": torch.ones(6, dtype=torch.bool)}, r"mask has shape \[6\], expected \[N, T\]"),
        ({"mask": torch.eye(6, 5, dtype=torch.bool)}, "mask has a hole"),
        ({"mask": torch.zeros(6, 5, dtype=torch.bool)}, "mask has a hole"),
    ],
)
def test_malformed_episodes_are_refused(fields: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(random_episodes(0), **fields)


def test_episodes_are_not_cut_and_not_made_of_nothing() -> None:
    with pytest.raises(ValueError, match="steps is 4, expected at least the longest episode, 5"):
        random_episodes(0).padded(4)
    with pytest.raises(ValueError, match="there are no episodes to concatenate"):
        Episodes.concatenate([])


def test_the_entropy_weight_falls_linearly() -> None:
    config = PPOConfig(entropy_start=3.0, entropy_end=1.0, entropy_updates=4)
    assert [config.entropy_weight(update) for update in (0, 1, 2, 4, 9)] == [3, 2.5, 2, 1, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip": 0.0}, "clip is 0.0, expected a finite number above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"gradient_norm": math.inf}, "gradient_norm is inf"),
        ({"entropy_end": -1e-4}, "entropy_end is -0.0001, expected a finite number, at least 0"),
        ({"kl_to_initial": -1.0}, "kl_to_initial is -1.0"),
        ({"gae_lambda": 1.5}, "gae_lambda is 1.5, expected a number from 0 to 1"),
        ({"polyak": 1.0}, "polyak is 1.0, expected a number from 0 to below 1"),
        ({"value_clip": 0.0}, "value_clip is 0.0, expected a finite number above 0, or None"),
        ({"reuse": 0}, "reuse is 0, expected an integer, at least 1"),
        ({"minibatches": 2.0}, "minibatches is 2.0, expected an integer"),
        ({"staleness": -1}, "staleness is -1, expected an integer, at least 0"),
        ({"buffer_episodes": True}, "buffer_episodes is True"),
    ],
)
def test_configs_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**fields)
