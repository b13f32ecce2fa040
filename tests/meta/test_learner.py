"""The learner: what it learns from, that it repeats to the bit, and what it finds."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from meta.toys import (
    HEADS,
    random_episodes,
    random_mask,
    recall,
    recall_learner,
    schedule,
    schedule_learner,
    small_learner,
    train,
)
from tolerances import CLONED_SHIFT, FIRST_RATIO, GRADIENT_NORM, assert_close

from lhopt_fused.actions import ACTIONS, DEFAULT_ACTION_SPACE, REGISTER_CHOICES, ActionSpace
from lhopt_fused.meta.critic import unroll_policy
from lhopt_fused.meta.demonstrations import nearest_choices
from lhopt_fused.meta.learner import EpisodeBuffer, Learner, clone_behaviour
from lhopt_fused.meta.ppo import Episodes, PPOConfig
from lhopt_fused.policy import NetworkShape, PolicyNetwork
from lhopt_fused.policy.decision import decide
from lhopt_fused.policy.network import InputNormalisation

SMALL = PPOConfig(minibatch_episodes=4, minibatches=3, buffer_episodes=16, staleness=2, reuse=2)


def equal(one: Any, other: Any) -> bool:
    """To the bit, all the way down."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def mean_shifts(network: PolicyNetwork, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean decisions ``[N, T, 8]``."""
    zeros = torch.zeros_like(mask, dtype=torch.int64)
    logits = unroll_policy(network, features, mask)
    return decide(logits, DEFAULT_ACTION_SPACE, "mean", seed=zeros, step=zeros).shifts.detach()


# ---------------------------------------------------------------------- the episodes at hand


def filled(uses: list[int], versions: list[int] | None = None) -> EpisodeBuffer:
    """A buffer whose episodes know their place by their first reward."""
    episodes = random_episodes(0, len(uses))
    episodes.rewards[:, 0] = torch.arange(float(len(uses)))
    version = torch.tensor(versions or [0] * len(uses))
    return EpisodeBuffer(replace(episodes, version=version), torch.tensor(uses))


def places(buffer: EpisodeBuffer) -> list[int]:
    assert buffer.episodes is not None
    return buffer.episodes.rewards[:, 0].long().tolist()


def test_stale_and_used_up_episodes_leave() -> None:
    buffer = filled([0, 2, 1, 0, 3], [3, 3, 4, 2, 5])
    assert places(buffer.kept(SMALL, 5)) == [0, 2]
    assert len(buffer.kept(SMALL, 9)) == 0


def test_the_oldest_make_room() -> None:
    buffer = filled([0] * 20)
    assert places(buffer.kept(SMALL, 0)) == list(range(4, 20))
    assert len(EpisodeBuffer.empty().added(random_episodes(0)).added(random_episodes(1))) == 12


@pytest.mark.parametrize(
    ("count", "sizes"), [(3, [3]), (4, [4]), (5, [3, 2]), (9, [3, 3, 3]), (16, [4, 4, 4])]
)
def test_minibatches_hold_whole_episodes_once(count: int, sizes: list[int]) -> None:
    minibatches = filled([0] * count).minibatches(SMALL, torch.Generator().manual_seed(0))
    assert [len(indices) for indices in minibatches] == sizes
    drawn = torch.cat(minibatches).tolist()
    assert len(set(drawn)) == len(drawn)


def test_the_least_used_come_first_and_else_chance() -> None:
    buffer = filled([1, 0] * 8)
    draws = [
        torch.cat(buffer.minibatches(SMALL, torch.Generator().manual_seed(seed)))
        for seed in range(20)
    ]
    assert all(set(range(1, 16, 2)) <= set(draw.tolist()) for draw in draws)
    assert len({tuple(draw.tolist()) for draw in draws}) == 20
    assert {place for draw in draws for place in draw.tolist()} == set(range(16))


def test_no_episode_is_used_more_often_or_later_than_allowed() -> None:
    learner = small_learner(SMALL)
    for update in range(8):
        metrics = learner.update(random_episodes(update, 5, version=update))
        buffer = learner.buffer
        assert buffer.episodes is not None
        assert int(buffer.uses.max()) < SMALL.reuse
        assert int((learner.version - buffer.episodes.version).max()) <= SMALL.staleness
        assert metrics["gradient_steps"] <= 3
        assert metrics["version"] == update


def test_unfit_episodes_are_refused_and_nothing_changes() -> None:
    learner = small_learner(SMALL)
    learner.update(random_episodes(0))
    before = copied(learner)
    good = random_episodes(1, version=1)
    for bad, message in (
        (replace(good, features=good.features[..., 1:]), "features are 4 wide, expected 5"),
        (replace(good, privileged=good.privileged[..., 1:]), "privileged are 1 wide"),
        (replace(good, choices=good.choices[..., 1:]), "choices are 1 wide, expected 2"),
        (replace(good, choices=good.choices + 2), r"choices are out of range.*\[3, 2\]"),
        (replace(good, choices=good.choices - 1), "choices are out of range"),
        (replace(good, version=good.version + 1), "collected at version 2, expected at most"),
    ):
        with pytest.raises(ValueError, match=message):
            learner.update(bad)
    learner.version, learner.buffer = 9, EpisodeBuffer.empty()
    with pytest.raises(ValueError, match="older than 2 updates at update 9: nothing to learn"):
        learner.update(good)
    assert equal(learner.network.state_dict(), before["network"])
    assert equal(learner.state_dict()["generator"], before["generator"])


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    learner = small_learner(SMALL)
    with torch.no_grad():
        learner.network.post.bias[0] = torch.nan
    before = learner.network.pre.weight.clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        learner.update(random_episodes(0))
    assert torch.equal(learner.network.pre.weight, before)


# ---------------------------------------------------------------------- one update


def test_ratios_start_at_1_in_every_update() -> None:
    """Though the input statistics move between them."""
    learner, generator = recall_learner(), torch.Generator().manual_seed(0)
    for _ in range(4):
        fresh = recall(learner, 64, generator)
        assert learner.losses(fresh).metrics["approximate_kl"] <= FIRST_RATIO.absolute
        learner.update(fresh)
    moved = recall(learner, 64, generator)
    learner.network.normalisation.take_in(3.0 * moved.features)
    assert learner.losses(moved).metrics["approximate_kl"] > 100 * FIRST_RATIO.absolute


def test_statistics_take_in_new_episodes_once_and_no_padding() -> None:
    learner = small_learner(SMALL)
    policy, critic = InputNormalisation(5), InputNormalisation(7)
    for update in range(3):
        new = random_episodes(update, version=update)
        learner.update(new)
        policy.take_in(new.features[new.mask])
        critic.take_in(torch.cat([new.features, new.privileged], -1)[new.mask])
    assert equal(learner.network.normalisation.state_dict(), policy.state_dict())
    assert equal(learner.average.normalisation.state_dict(), policy.state_dict())
    assert equal(learner.critic.normalisation.state_dict(), critic.state_dict())


def test_the_average_follows_each_gradient_step() -> None:
    learner = small_learner(replace(SMALL, minibatches=1, polyak=0.75))
    start = learner.network.pre.weight.detach().clone()
    learner.update(random_episodes(0))
    expected = torch.lerp(start, learner.network.pre.weight.detach(), 0.25)
    assert torch.equal(learner.average.pre.weight, expected)
    assert not torch.equal(learner.average.pre.weight, start)
    assert not any(p.requires_grad for p in learner.average.parameters())


def test_the_gradient_of_each_network_is_clipped_and_its_norm_told() -> None:
    for limit in (1e-3, 100.0):
        learner = small_learner(replace(SMALL, gradient_norm=limit, minibatches=1))
        metrics = learner.update(random_episodes(0))
        for name, module in (("policy", learner.network), ("critic", learner.critic)):
            told = metrics[f"{name}_gradient_norm"]
            left = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]).item()
            assert told > 1e-3
            assert left == pytest.approx(min(told, limit), rel=GRADIENT_NORM.relative)


def test_a_policy_may_be_held_near_to_its_start() -> None:
    distances = []
    for weight in (1e-6, 10.0):
        learner = recall_learner()
        config = replace(learner.config, kl_to_initial=weight)
        learner = Learner(learner.network, learner.critic, config)
        metrics = train(learner, recall, 15)
        assert metrics[0]["kl_to_initial"] <= FIRST_RATIO.absolute
        distances.append(metrics[-1]["kl_to_initial"])
    assert distances[1] < 0.1 * distances[0]


def test_a_changed_network_is_taken_for_the_start() -> None:
    learner = small_learner(replace(SMALL, kl_to_initial=1.0))
    with torch.no_grad():
        learner.network.post.bias.add_(1.0)
    learner.start_from_network()
    assert learner.initial is not None
    for follower in (learner.average, learner.initial):
        assert equal(follower.state_dict(), learner.network.state_dict())


# ---------------------------------------------------------------------- to the bit


def copied(learner: Learner) -> dict[str, Any]:
    """The state, as a file gives it back."""
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def updated(learner: Learner, updates: range) -> list[dict[str, float]]:
    return [learner.update(random_episodes(i, 9, 4, version=i)) for i in updates]


def test_a_seed_gives_one_result_and_another_seed_another() -> None:
    learners = [small_learner(SMALL) for _ in range(3)]
    learners[2] = Learner(learners[2].network, learners[2].critic, SMALL, seed=1)
    metrics = [updated(learner, range(4)) for learner in learners]
    assert metrics[0] == metrics[1]
    assert equal(learners[0].state_dict(), learners[1].state_dict())
    assert metrics[0] != metrics[2]


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_stopping_and_going_on_is_never_having_stopped(stop: int) -> None:
    config = replace(SMALL, kl_to_initial=0.1)
    whole, first, second = (small_learner(config, seed) for seed in (0, 0, 1))
    expected = updated(whole, range(5))
    updated(first, range(stop))
    second.load_state_dict(copied(first))
    assert updated(second, range(stop, 5)) == expected[stop:]
    assert equal(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", ["optimizer", "episodes", "average", "generator", "critic"])
def test_every_part_of_the_state_counts(name: str) -> None:
    whole, broken = small_learner(SMALL), small_learner(SMALL)
    updated(whole, range(3))
    state, fresh = copied(whole), copied(broken)
    state[name] = fresh[name]
    if name == "episodes":
        state["uses"] = fresh["uses"]
    broken.load_state_dict(state)
    updated(whole, range(3, 4))
    updated(broken, range(3, 4))
    assert not equal(broken.state_dict(), whole.state_dict())


def test_a_loaded_state_is_not_shared() -> None:
    one, other = small_learner(SMALL), small_learner(SMALL, seed=1)
    updated(one, range(2))
    other.load_state_dict(one.state_dict())
    before = copied(one)
    updated(other, range(2, 4))
    assert equal(one.state_dict(), before)


def test_states_of_other_configs_and_formats_are_refused() -> None:
    learner = small_learner(SMALL)
    state = copied(learner)
    other = small_learner(replace(SMALL, clip=0.3))
    with pytest.raises(ValueError, match=r"clip was 0\.2 in the state, expected 0\.3"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="state_version is 0, expected 1"):
        learner.load_state_dict({**state, "state_version": 0})
    wider = small_learner(SMALL, shape=NetworkShape(5, HEADS, 32, 16))
    with pytest.raises(RuntimeError, match="size mismatch"):
        wider.load_state_dict(state)


# ---------------------------------------------------------------------- what it finds


def test_delayed_recall_is_learned() -> None:
    learner = recall_learner()
    train(learner, recall, 40)
    test = recall(learner, 1000, torch.Generator().manual_seed(1))
    assert (test.rewards.sum(1) > 0).float().mean() >= 0.95


def test_delayed_recall_needs_memory() -> None:
    """The twin: the same policy, trained and tried with its memory erased before each step."""

    def forgetful(learner: Learner, episodes: int, generator: torch.Generator) -> Episodes:
        return recall(learner, episodes, generator, memory=False)

    learner = recall_learner()
    train(learner, forgetful, 40)
    test = forgetful(learner, 1000, torch.Generator().manual_seed(1))
    assert (test.rewards.sum(1) > 0).float().mean() < 0.6


def test_a_planted_schedule_is_found() -> None:
    """Mean decisions of the averaged policy: lr is halved in the last third, and left before."""
    config = PPOConfig(learning_rate=3e-3, entropy_updates=60, minibatch_episodes=64)
    learner = schedule_learner(config)
    generator = torch.Generator().manual_seed(1)
    before = schedule(learner, 1, generator)
    fresh = mean_shifts(learner.network, before.features, before.mask)[0, :, 0]
    assert (fresh[6:] > math.log(0.75)).all()
    metrics = train(learner, schedule, 65, episodes=64)
    shifts = mean_shifts(learner.average, before.features, before.mask)[0, :, 0]
    assert (shifts[6:] < math.log(0.75)).all()
    assert (shifts[:6].abs() < 0.15).all()
    assert metrics[-1]["return"] > -0.05 > metrics[0]["return"]


# ---------------------------------------------------------------------- the supervised start


def demonstrations() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, target shifts and mask: a sign in the first step says where lr is to go."""
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(48, 6, generator)
    sign = 2.0 * torch.randint(2, (48, 1), generator=generator) - 1.0
    features = torch.zeros(48, 6, 3)
    features[:, 0, 0] = sign[:, 0]
    features[:, :, 1] = torch.arange(6) / 6
    targets = torch.full((48, 6, 8), 5.0)  # in the padding
    targets[mask] = 0.0
    targets[:, :, 0] = torch.where(mask, 0.4 * sign, 5.0)
    targets[:, :, 5] = torch.where(mask, features[:, :, 1] - 0.5, 5.0)
    return features, targets, mask


def shown(
    features: torch.Tensor, shifts: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Demonstrations of shifts as :func:`clone_behaviour` takes them."""
    return features, nearest_choices(shifts.double(), DEFAULT_ACTION_SPACE).float(), mask


def cloned(**options: Any) -> tuple[PolicyNetwork, list[float]]:
    torch.manual_seed(0)
    network = PolicyNetwork(NetworkShape(3, DEFAULT_ACTION_SPACE.head_sizes, 16, 16))
    options = {"steps": 200, "minibatch_episodes": 32, "learning_rate": 5e-3, **options}
    return network, clone_behaviour(network, *shown(*demonstrations()), **options)


def test_clones_decide_as_they_were_shown() -> None:
    features, targets, mask = demonstrations()
    network, losses = cloned()
    assert losses[-1] < 0.6 * losses[0]  # what is left is the entropy of the targets
    shifts = mean_shifts(network, features, mask)
    assert_close(shifts[mask], targets[mask], CLONED_SHIFT, 1.0)
    start, _ = cloned(steps=1)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(mean_shifts(start, features, mask)[mask], targets[mask], CLONED_SHIFT, 1.0)


def test_clones_of_teachers_that_disagree_decide_their_mean() -> None:
    features, targets, mask = demonstrations()
    doubled = [torch.cat([features] * 2), torch.cat([targets + 0.2, targets - 0.2])]
    doubled.append(torch.cat([mask] * 2))
    network, _ = cloned(steps=1)
    options = {"steps": 300, "minibatch_episodes": 96, "learning_rate": 5e-3}
    clone_behaviour(network, *shown(*doubled), **options)
    head = mean_shifts(network, features, mask)[mask][:, 0]
    assert_close(head, targets[mask][:, 0], CLONED_SHIFT, 1.0)


def test_clones_still_explore() -> None:
    """Even where they were shown the largest steps; the twin, told to copy those, does not."""
    features, targets, mask = demonstrations()
    targets[..., 0] = math.log(0.5)
    rarest = []
    for exploration in (0.05, 0.0):
        network, _ = cloned(steps=1)
        clone_behaviour(
            network,
            *shown(features, targets, mask),
            steps=300,
            learning_rate=5e-3,
            exploration=exploration,
        )
        choices = DEFAULT_ACTION_SPACE.head_sizes[0]
        head = unroll_policy(network, features, mask)[mask][:, :choices].softmax(-1)
        rarest.append(choices * head.mean(0).min().item())
    assert 0.025 < rarest[0] < 0.1
    assert rarest[1] < 0.01


def test_cloning_repeats_to_the_bit() -> None:
    (one, losses), (other, again) = cloned(steps=5), cloned(steps=5)
    assert losses == again
    assert equal(one.state_dict(), other.state_dict())
    assert cloned(steps=5, seed=1)[1] != losses


def test_a_register_head_is_cloned_too() -> None:
    space = ActionSpace(ACTIONS, registers=True)
    torch.manual_seed(0)
    network = PolicyNetwork(NetworkShape(3, space.head_sizes, 16, 16))
    features, targets, mask = shown(*demonstrations())
    saves = (features[..., :1] > 0).float() @ torch.eye(len(REGISTER_CHOICES))[[4]]
    keeps = (features[..., :1] <= 0).float() @ torch.eye(len(REGISTER_CHOICES))[[0]]
    targets = torch.cat([targets, saves + keeps], dim=-1)
    clone_behaviour(network, features, targets, mask, steps=200, learning_rate=5e-3)
    head = unroll_policy(network, features, mask)[mask][:, -len(REGISTER_CHOICES) :]
    right = (head.argmax(-1) == targets[mask][:, -len(REGISTER_CHOICES) :].argmax(-1)).float()
    assert right.mean() > 0.95


def test_bad_demonstrations_are_refused() -> None:
    torch.manual_seed(0)
    network = PolicyNetwork(NetworkShape(3, DEFAULT_ACTION_SPACE.head_sizes, 16, 16))
    features, targets, mask = shown(*demonstrations())
    width = sum(DEFAULT_ACTION_SPACE.head_sizes)
    odd = PolicyNetwork(NetworkShape(3, HEADS, 16, 16))
    for learns, seen, wanted, message in (
        (odd, features, targets, rf"targets has shape \[48, 6, {width}\], expected \[48, 6, 5\]"),
        (network, features[..., 1:], targets, r"features has shape \[48, 6, 2\], expected"),
        (network, features, targets[:, 1:], rf"targets has shape \[48, 5, {width}\]"),
        (network, features, targets / 0, "targets holds numbers that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            clone_behaviour(learns, seen, wanted, mask)
    with pytest.raises(ValueError, match="there are no episodes to clone"):
        clone_behaviour(network, features[:0], targets[:0], mask[:0])
