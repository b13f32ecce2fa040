"""A policy at work on a batch of episodes: sampled, to learn from, or as it will be used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lhopt_fused.meta.critic import Critic
from lhopt_fused.meta.episode import EpisodeBatch, Seen
from lhopt_fused.meta.ppo import Episodes
from lhopt_fused.policy import Decision, DecisionMode, PolicyNetwork
from lhopt_fused.policy.decision import decide

__all__ = ["Outcome", "collect", "play"]


def _decisions(
    batch: EpisodeBatch, network: PolicyNetwork, mode: DecisionMode
) -> Iterator[tuple[Seen, Decision]]:
    """Run a fresh batch to its end: what each outer step showed, and what was decided then."""
    runs, device = batch.setting.runs, batch.inner.scalars.device
    state = network.initial_state((runs,), device)
    seed = batch.setting.seed // 2 + torch.arange(runs, device=device)
    seen = batch.advance()
    while not batch.done:
        logits, state = network(seen.features, state)
        step = torch.full_like(seed, batch.outer_step)
        decision = decide(logits, batch.space, mode, seed=seed, step=step)
        batch.act(decision.shifts, decision.register)
        yield seen, decision
        seen = batch.advance()


@torch.no_grad()
def collect(
    batch: EpisodeBatch,
    network: PolicyNetwork,
    critic: Critic,
    version: int,
    discount: float = 1.0,
) -> Episodes:
    """Run the episodes with sampled decisions.

    Args:
        batch: fresh, with a baseline.
        network: the policy, in evaluation mode.
        critic: says what each outer step is worth; likewise.
        version: updates that the learner has done.
        discount: of the reward, per outer step.

    Returns:
        R episodes of one length; the reward comes with the last decision. Values are the critic's,
        moved by how far it was wrong about the other runs of the same task: a baseline that is
        independent of the run's own choices, and knows how hard the task is.
    """
    memory = critic.initial_state((batch.setting.runs,))
    steps: list[dict[str, torch.Tensor]] = []
    for seen, decision in _decisions(batch, network, "sample"):
        value, memory = critic(seen.features, seen.privileged, memory)
        steps.append(
            {
                "features": seen.features,
                "privileged": seen.privileged,
                "choices": decision.choices,
                "log_probs": _joint_log_probability(decision, batch.space.head_sizes),
                "values": value,
            }
        )
    stacked = {name: torch.stack([step[name] for step in steps], dim=1) for name in steps[0]}
    rewards = torch.zeros_like(stacked["values"])
    rewards[:, -1] = batch.rewards().float()
    left = torch.arange(rewards.shape[1] - 1, -1, -1, device=rewards.device)
    errors = rewards[:, -1:] * discount**left - stacked["values"]
    stacked["values"] += _means_of_others(errors, batch.setting.repeats)
    return Episodes(
        **stacked,
        rewards=rewards,
        mask=torch.ones_like(rewards, dtype=torch.bool),
        version=torch.full((len(rewards),), version, device=rewards.device),
    )


def _means_of_others(errors: torch.Tensor, repeats: int) -> torch.Tensor:
    """For each run, ``[R, D]``, the mean over the other runs of its task; 0 if it is alone."""
    of_tasks = errors.view(-1, repeats, errors.shape[-1])
    others = of_tasks.sum(1, keepdim=True) - of_tasks
    return (others / max(repeats - 1, 1)).view_as(errors)


def _joint_log_probability(decision: Decision, head_sizes: tuple[int, ...]) -> torch.Tensor:
    """Of the choices of all heads together, float32 ``[R]``."""
    chosen = [
        head.gather(-1, choice[:, None])
        for head, choice in zip(
            torch.split(decision.probabilities, list(head_sizes), dim=-1),
            decision.choices.unbind(-1),
            strict=True,
        )
    ]
    return torch.cat(chosen, dim=-1).log().sum(-1).float()


class Outcome(NamedTuple):
    """How R runs went under a policy that decided D times.

    Attributes:
        losses: report loss at the end, float64 ``[R]``.
        hyperparameters: after each decision, float64 ``[R, D, 8]``.
    """

    losses: torch.Tensor
    hyperparameters: torch.Tensor


@torch.no_grad()
def play(batch: EpisodeBatch, network: PolicyNetwork, mode: DecisionMode = "mean") -> Outcome:
    """Run the episodes as a trained policy, in evaluation mode, would be used."""
    hyperparameters = [
        batch.inner.hyperparameters.clone() for _ in _decisions(batch, network, mode)
    ]
    return Outcome(batch.inner.loss("report"), torch.stack(hyperparameters, dim=1))
