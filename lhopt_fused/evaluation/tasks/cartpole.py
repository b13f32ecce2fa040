"""Reinforcement learning, which nobody tuned for: a small PPO agent balances a pole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from lhopt_fused.evaluation.task import Batch, Scores, Size, Split, Task, find_package
from lhopt_fused.meta.ppo import (
    clipped_policy_loss,
    generalised_advantages,
    normalised,
    value_loss,
)

__all__ = ["CartPole"]

_ENVIRONMENT: Final = "CartPole-v1"
_LONGEST: Final = 500  # steps of an episode, each worth 1
_REWARD: Final = 0.1  # of a step, in training: values stay about 10
_DISCOUNT: Final = 0.99
_LAMBDA: Final = 0.95
_CLIP: Final = 0.2
_ENTROPY: Final = 0.01
_EPISODES: Final = 16  # collected at once
_REUSE: Final = 8  # minibatches of what was collected


class _ActorCritic(nn.Module):
    """Two networks: logits of the two actions, and what a state is worth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.actor, self.critic = (
            nn.ModuleDict({"body": _body(width), "head": nn.Linear(width, outputs)})
            for outputs in (2, 1)
        )
        for part, gain in ((self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(part["head"].get_parameter("weight"), gain)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ``[B, 4]``: logits ``[B, 2]`` and values ``[B]``."""
        logits, values = (part["head"](part["body"](states)) for part in (self.actor, self.critic))
        return logits, values[:, 0]


def _body(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())


class _Episodes(NamedTuple):
    """N whole episodes, padded behind their ends to T steps.

    Attributes:
        states: float32 ``[N, T, 4]``.
        actions: int64 ``[N, T]``.
        log_probs: of these, float32 ``[N, T]``.
        values: float32 ``[N, T]``.
        mask: whether the step took place, bool ``[N, T]``.
        beyond: what the state after the last step is worth, ``[N]``; 0 where the pole fell.
    """

    states: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    beyond: torch.Tensor


class CartPole(Task):
    """CartPole-v1 of gymnasium, by PPO (Schulman et al. 2017).

    Examples are seeds of episodes; a batch is steps of episodes that the model has just played:
    states, actions, their log-probabilities, advantages and returns. Held-out episodes are played
    with the likelier action; the loss is what is missing to the longest episode, as a share.
    """

    name = "cartpole"
    metric = "mean_return"
    eval_batch_size = 64

    def __init__(self, size: Size, data_dir: Path | None = None) -> None:
        self.gymnasium = find_package("gymnasium", "the task cartpole needs")
        small = size == "small"
        seeds = torch.arange(100_000)
        held_out: dict[Split, Batch] = {"policy_eval": (seeds[:16],), "report": (seeds[16:80],)}
        steps, batch_size = (160, 256) if small else (4_000, 1_024)
        super().__init__((seeds[80:],), held_out, steps=steps, batch_size=batch_size)
        self.width = 32 if small else 256
        self.environments: list[Any] = []

    @cached_property
    def digest(self) -> str:
        """As of every task, with the version of gymnasium, which decides what a seed means."""
        made_of = f"{super().digest} {self.gymnasium.__version__}"
        return hashlib.sha256(made_of.encode()).hexdigest()

    def make_model(self) -> nn.Module:
        return _ActorCritic(self.width)

    def stream(self, model: nn.Module, generator: torch.Generator) -> Iterator[Batch]:
        """Steps of episodes that the model plays, from seeds drawn anew each time."""
        while True:
            picked = torch.randint(len(self.training[0]), (_EPISODES,), generator=generator)
            with torch.no_grad():
                played = self._play(model, self.training[0][picked].tolist(), generator)
            steps = _learned_from(played)
            for _ in range(_REUSE):
                rows = torch.randperm(len(steps[0]), generator=generator)[: self.batch_size]
                yield tuple(tensor[rows] for tensor in steps)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        states, actions, old, advantages, returns = batch
        logits, values = model(states)
        log_probs = logits.log_softmax(-1)
        mask = torch.ones_like(old, dtype=torch.bool)
        ratio = log_probs.gather(1, actions[:, None])[:, 0] - old
        policy = clipped_policy_loss(ratio, normalised(advantages, mask), mask, _CLIP)
        critic = value_loss(values, values, returns, mask)
        entropy: torch.Tensor = -(log_probs.exp() * log_probs).sum(-1).mean()
        return policy + critic - _ENTROPY * entropy

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        returns = self._play(model, batch[0].tolist(), None).mask.sum(1).double()
        mean = returns.mean().item()
        return Scores(1.0 - mean / _LONGEST, {"mean_return": mean})

    def _play(
        self, model: nn.Module, seeds: Sequence[int], generator: torch.Generator | None
    ) -> _Episodes:
        """Whole episodes, side by side; without a generator the likelier action is taken."""
        device = next(model.parameters()).device
        while len(self.environments) < len(seeds):
            self.environments.append(self.gymnasium.make(_ENVIRONMENT, disable_env_checker=True))
        games = self.environments[: len(seeds)]
        starts = [game.reset(seed=seed)[0] for game, seed in zip(games, seeds, strict=True)]
        now = torch.stack([torch.from_numpy(state) for state in starts])
        going = torch.ones(len(seeds), dtype=torch.bool)
        fell = torch.zeros(len(seeds), dtype=torch.bool)
        steps: list[tuple[torch.Tensor, ...]] = []
        while going.any():
            logits, values = (output.cpu() for output in model(now.to(device)))
            actions = _chosen(logits, generator)
            taken = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
            steps.append((now, actions, taken, values, going))
            now, going = now.clone(), going.clone()
            for row in going.nonzero()[:, 0].tolist():
                state, _, fallen, over, _ = games[row].step(int(actions[row]))
                now[row] = torch.from_numpy(state)
                fell[row], going[row] = fallen, not (fallen or over)
        beyond = torch.where(fell, 0.0, model(now.to(device))[1].cpu())
        parts = [torch.stack(part, 1) for part in zip(*steps, strict=True)]
        return _Episodes._make([*parts, beyond])


def _chosen(logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    if generator is None:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _learned_from(played: _Episodes) -> Batch:
    """Every step that took place: state, action, log-probability, advantage and return.

    An episode that was ended by its length goes on in what its last state is worth.
    """
    rewards = torch.where(played.mask, _REWARD, 0.0)
    last = played.mask.sum(1, keepdim=True) - 1
    rewards.scatter_add_(1, last, _DISCOUNT * played.beyond[:, None])
    advantages = generalised_advantages(rewards, played.values, played.mask, _DISCOUNT, _LAMBDA)
    found = (played.states, played.actions, played.log_probs, advantages)
    return tuple(tensor[played.mask] for tensor in (*found, advantages + played.values))
