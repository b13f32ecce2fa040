"""Random episodes and small games that the tests of PPO share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from lhopt_fused.actions import DEFAULT_ACTION_SPACE
from lhopt_fused.meta.critic import Critic
from lhopt_fused.meta.learner import Learner
from lhopt_fused.meta.ppo import Episodes, PPOConfig, log_probability
from lhopt_fused.policy import FEATURES, NetworkShape, PolicyNetwork
from lhopt_fused.policy.decision import decide

HEADS = (3, 2)
FEATURE_COUNT, PRIVILEGED_COUNT = 5, 2
CUE_STEPS = 8

Game = Callable[[Learner, int, torch.Generator], Episodes]


def random_mask(episodes: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Lengths from 1 to ``steps``; the first episode is the longest."""
    lengths = torch.randint(1, steps + 1, (episodes,), generator=generator)
    lengths[0] = steps
    return torch.arange(steps) < lengths[:, None]


def random_episodes(seed: int, episodes: int = 6, steps: int = 5, version: int = 0) -> Episodes:
    """Episodes of all lengths, whose padding holds numbers too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(episodes, steps, *shape, generator=generator)

    sizes = torch.tensor(HEADS)
    return Episodes(
        features=normal(FEATURE_COUNT),
        privileged=normal(PRIVILEGED_COUNT),
        choices=(torch.rand(episodes, steps, 2, generator=generator) * sizes).long(),
        log_probs=-math.log(6) + 0.2 * normal(),
        values=normal(),
        rewards=normal(),
        mask=random_mask(episodes, steps, generator),
        version=torch.full((episodes,), version),
    )


def small_learner(
    config: PPOConfig | None = None,
    seed: int = 0,
    shape: NetworkShape | None = None,
    privileged: int = PRIVILEGED_COUNT,
) -> Learner:
    """Networks 16 wide."""
    torch.manual_seed(seed)
    shape = shape or NetworkShape(FEATURE_COUNT, HEADS, 16, 16)
    critic = Critic(shape.features, privileged, shape.hidden)
    return Learner(PolicyNetwork(shape), critic, config or PPOConfig(), seed)


def recall_learner(seed: int = 0) -> Learner:
    """For :func:`recall`."""
    config = PPOConfig(learning_rate=3e-3, entropy_updates=30)
    return small_learner(config, seed, NetworkShape(3, (2,), 16, 16), 1)


@torch.no_grad()
def recall(
    learner: Learner, episodes: int, generator: torch.Generator, memory: bool = True
) -> Episodes:
    """Delayed recall: a sign in the first step is asked for in the last; ±1 is the reward."""
    sign = torch.randint(2, (episodes,), generator=generator)
    features = torch.zeros(episodes, CUE_STEPS, 3)
    features[:, 0, 0] = 2.0 * sign - 1.0
    features[:, :, 1] = torch.linspace(-1, 1, CUE_STEPS)
    features[:, -1, 2] = 1.0
    privileged = torch.zeros(episodes, CUE_STEPS, 1)
    state = learner.network.initial_state((episodes,))
    choices, log_probs = [], []
    for seen in features.unbind(1):
        if not memory:
            state = learner.network.initial_state((episodes,))
        logits, state = learner.network(seen, state)
        choice = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        choices.append(choice)
        log_probs.append(log_probability(logits, choice, (2,)))
    right = 2.0 * (choices[-1][:, 0] == sign) - 1.0
    return _finished(learner, features, privileged, choices, log_probs, right)


def schedule_learner(config: PPOConfig, seed: int = 0) -> Learner:
    """For :func:`schedule`: policy features and heads as in a real policy."""
    shape = NetworkShape(len(FEATURES), DEFAULT_ACTION_SPACE.head_sizes, 32, 16)
    return small_learner(config, seed, shape, 1)


@torch.no_grad()
def schedule(
    learner: Learner, episodes: int, generator: torch.Generator, steps: int = 9
) -> Episodes:
    """A planted schedule: halve lr in each step of the last third, and leave it alone before.

    Only progress tells anything; the reward is minus the mean squared distance of log lr to the
    planted one, which the critic knows.
    """
    progress = torch.arange(steps) / steps
    features = torch.zeros(episodes, steps, len(FEATURES))
    features[:, :, FEATURES.index("progress")] = progress
    planted = torch.where(progress >= 2 / 3, math.log(0.5), 0.0).cumsum(0)
    seeds = torch.randint(2**62, (episodes,), generator=generator)
    state = learner.network.initial_state((episodes,))
    error, log_lr = torch.zeros(episodes), torch.zeros(episodes)
    choices, log_probs, privileged = [], [], []
    for step, seen in enumerate(features.unbind(1)):
        privileged.append(torch.stack([log_lr - planted[step - 1] * (step > 0)], dim=-1))
        logits, state = learner.network(seen, state)
        decision = decide(
            logits, DEFAULT_ACTION_SPACE, "sample", seed=seeds, step=torch.full_like(seeds, step)
        )
        log_lr = log_lr + decision.shifts[:, 0].float()
        error += (log_lr - planted[step]).square() / steps
        choices.append(decision.choices)
        log_probs.append(log_probability(logits, decision.choices, learner.network.shape.heads))
    return _finished(learner, features, torch.stack(privileged, 1), choices, log_probs, -error)


def _finished(
    learner: Learner,
    features: torch.Tensor,
    privileged: torch.Tensor,
    choices: list[torch.Tensor],
    log_probs: list[torch.Tensor],
    final_reward: torch.Tensor,
) -> Episodes:
    """Episodes of one length, with the reward in the last step and the critic's values."""
    episodes, steps = features.shape[:2]
    rewards = torch.zeros(episodes, steps)
    rewards[:, -1] = final_reward
    state = learner.critic.initial_state((episodes,))
    values = []
    for step in range(steps):
        value, state = learner.critic(features[:, step], privileged[:, step], state)
        values.append(value)
    return Episodes(
        features=features,
        privileged=privileged,
        choices=torch.stack(choices, 1),
        log_probs=torch.stack(log_probs, 1),
        values=torch.stack(values, 1),
        rewards=rewards,
        mask=torch.ones(episodes, steps, dtype=torch.bool),
        version=torch.full((episodes,), learner.version),
    )


def train(
    learner: Learner, game: Game, updates: int, episodes: int = 128, seed: int = 0
) -> list[dict[str, float]]:
    """Metrics of each update."""
    generator = torch.Generator().manual_seed(seed)
    return [learner.update(game(learner, episodes, generator)) for _ in range(updates)]


def with_version(episodes: Episodes, version: int) -> Episodes:
    """The same episodes, collected at another time."""
    return replace(episodes, version=torch.full_like(episodes.version, version))
