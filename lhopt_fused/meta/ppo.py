"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) as plain maths.

Policies are recurrent, so data comes in whole episodes; actions are multi-discrete: one categorical
choice per head, independent given the logits. An episode is a whole training run: it always ends by
termination, is never cut short, and nothing is worth anything after its last step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Final

import torch

from lhopt_fused.policy.features import LARGEST_FEATURE

__all__ = [
    "Episodes",
    "Losses",
    "PPOConfig",
    "approximate_kl",
    "clip_fraction",
    "clipped_policy_loss",
    "entropy",
    "explained_variance",
    "generalised_advantages",
    "kl_divergence",
    "log_probability",
    "masked_mean",
    "normalised",
    "ppo_losses",
    "value_loss",
]

_LARGEST_LOG_RATIO: Final = 20.0  # exp of more than 88 overflows float32, and inf * 0 is NaN
_SMALLEST_SPREAD: Final = 1e-8


@dataclass(frozen=True)
class PPOConfig:
    """What an update does.

    Attributes:
        clip: how far a probability ratio may leave 1 before its gradient stops.
        entropy_start: weight of the entropy, the sum over heads, at first.
        entropy_end: its weight at last.
        entropy_updates: updates over which it falls, linearly.
        learning_rate: of Adam.
        value_weight: of half the squared error of the critic.
        value_clip: how far a value may leave the one at collection before its gradient stops; None
            for any distance.
        gae_lambda: decay of the advantage estimate.
        discount: of the rewards, per outer step.
        minibatch_episodes: whole episodes in a gradient step.
        minibatches: gradient steps in an update, at most.
        buffer_episodes: episodes kept, the newest ones.
        reuse: gradient steps that an episode takes part in, at most.
        staleness: updates since an episode was collected, at most.
        gradient_norm: largest norm of a gradient, of the policy and of the critic each.
        polyak: decay of the averaged policy, per gradient step.
        kl_to_initial: weight of KL(policy || policy at the start), the sum over heads.

    Raises:
        ValueError: naming the field that is out of range.
    """

    clip: float = 0.2
    entropy_start: float = 3e-3
    entropy_end: float = 1e-4
    entropy_updates: int = 200
    learning_rate: float = 2e-4
    value_weight: float = 0.5
    value_clip: float | None = None
    gae_lambda: float = 0.95
    discount: float = 1.0
    minibatch_episodes: int = 128
    minibatches: int = 4
    buffer_episodes: int = 768
    reuse: int = 4
    staleness: int = 4
    gradient_norm: float = 5.0
    polyak: float = 0.99
    kl_to_initial: float = 0.0

    def __post_init__(self) -> None:
        for name in ("clip", "learning_rate", "gradient_norm"):
            self._check(name, getattr(self, name) > 0, "a finite number above 0")
        for name in ("entropy_start", "entropy_end", "value_weight", "kl_to_initial"):
            self._check(name, getattr(self, name) >= 0, "a finite number, at least 0")
        for name in ("gae_lambda", "discount"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        self._check("polyak", 0 <= self.polyak < 1, "a number from 0 to below 1")
        if self.value_clip is not None:
            self._check("value_clip", self.value_clip > 0, "a finite number above 0, or None")
        counts = ("entropy_updates", "minibatch_episodes", "minibatches", "buffer_episodes")
        for name in (*counts, "reuse"):
            self._check_count(name, 1)
        self._check_count("staleness", 0)

    def _check(self, name: str, holds: bool, expected: str) -> None:
        value = getattr(self, name)
        if not (holds and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, expected {expected}")

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, expected an integer, at least {least}")

    def entropy_weight(self, update: int) -> float:
        """Weight of the entropy in the given update, counted from 0."""
        share = min(update / self.entropy_updates, 1.0)
        return self.entropy_start + share * (self.entropy_end - self.entropy_start)


@dataclass(frozen=True)
class Episodes:
    """Whole episodes: N of them, padded behind their ends to T outer steps.

    Attributes:
        features: float32 ``[N, T, F]``, what the policy saw.
        privileged: float32 ``[N, T, P]``, what only the critic sees.
        choices: int64 ``[N, T, H]``, the choice of each head.
        log_probs: float32 ``[N, T]``, log-probability of the joint choice when it was drawn.
        values: float32 ``[N, T]``, the critic's, at that time.
        rewards: float32 ``[N, T]``, for the choice of that step.
        mask: bool ``[N, T]``, whether the step took place; true from the first step to the last.
        version: int64 ``[N]``, updates that the learner had done when the episode was collected.

    Raises:
        ValueError: a tensor has another shape or dtype, or holds a number that is not finite, in
            the padding too; features, values or rewards go beyond ±1e6; or a mask has a hole.
    """

    features: torch.Tensor
    privileged: torch.Tensor
    choices: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    mask: torch.Tensor
    version: torch.Tensor

    def __post_init__(self) -> None:
        if self.mask.dim() != 2:
            raise ValueError(f"mask has shape {list(self.mask.shape)}, expected [N, T]")
        for name, (dtype, width) in _LAYOUT.items():
            tensor = getattr(self, name)
            leading = list(self.mask.shape)[: 1 if name == "version" else 2]
            if tensor.dtype != dtype or list(tensor.shape)[: len(leading)] != leading:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{name} is {found}, expected {dtype}, {leading} at first")
            if tensor.dim() != len(leading) + width:
                raise ValueError(f"{name} has {tensor.dim()} dimensions, expected {width} more")
            if dtype == torch.float32:
                _check_finite(name, tensor)
        for name in ("features", "values", "rewards"):
            tensor = getattr(self, name)
            if tensor.numel() and tensor.abs().max() > LARGEST_FEATURE:
                raise ValueError(
                    f"{name} reach {tensor.abs().max():g} in magnitude, expected at most "
                    f"{LARGEST_FEATURE:g}, whose squares add up in float32"
                )
        if not self.mask[:, :1].all() or (self.mask[:, 1:] & ~self.mask[:, :-1]).any():
            raise ValueError("mask has a hole: expected true from the first step to the last")

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def lengths(self) -> torch.Tensor:
        """int64 ``[N]``, outer steps of each episode."""
        return self.mask.sum(1)

    def to(self, device: torch.device | str) -> Episodes:
        """The same on a device."""
        return Episodes(**{name: tensor.to(device) for name, tensor in self.to_tensors().items()})

    def padded(self, steps: int) -> Episodes:
        """With as many steps as given: no fewer than the longest episode has.

        Raises:
            ValueError: an episode is longer.
        """
        longest = int(self.lengths.max()) if len(self) else 0
        if steps < longest:
            raise ValueError(f"steps is {steps}, expected at least the longest episode, {longest}")
        missing = steps - self.mask.shape[1]
        return Episodes(
            **{
                name: tensor if name == "version" else _resized(tensor, missing)
                for name, tensor in self.to_tensors().items()
            }
        )

    def select(self, indices: torch.Tensor) -> Episodes:
        """The episodes at ``indices``, int64 or bool, without padding that none of them needs."""
        chosen = {name: tensor[indices] for name, tensor in self.to_tensors().items()}
        steps = int(chosen["mask"].sum(1).max()) if len(chosen["mask"]) else 0
        return Episodes(
            **{
                name: tensor if name == "version" else tensor[:, :steps]
                for name, tensor in chosen.items()
            }
        )

    @classmethod
    def concatenate(cls, parts: Iterable[Episodes]) -> Episodes:
        """All episodes of the parts, in order, padded to the longest.

        Raises:
            ValueError: there are no parts.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("there are no episodes to concatenate, expected one part at least")
        steps = max(part.mask.shape[1] for part in parts)
        tensors = [part.padded(steps).to_tensors() for part in parts]
        return cls(**{name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, for checkpoints and other processes; shared, not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Episodes:
        """What :meth:`to_tensors` gave.

        Raises:
            ValueError: a name is missing or unknown, or what construction refuses.
        """
        expected = {field.name for field in fields(cls)}
        if set(tensors) != expected:
            odd = ", ".join(sorted(expected ^ set(tensors)))
            raise ValueError(f"episodes hold {sorted(tensors)}: missing or unknown: {odd}")
        return cls(**tensors)


_LAYOUT: Final = {
    "features": (torch.float32, 1),
    "privileged": (torch.float32, 1),
    "choices": (torch.int64, 1),
    "log_probs": (torch.float32, 0),
    "values": (torch.float32, 0),
    "rewards": (torch.float32, 0),
    "mask": (torch.bool, 0),
    "version": (torch.int64, 0),
}
"""Type of each tensor, and its dimensions behind [N, T], or behind [N] for the version."""


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not tensor.isfinite().all():
        place = (~tensor.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{name}{place} is {tensor[tuple(place)].item()}, expected finite numbers; "
            "give a run that diverged a defined reward and zeros behind its end"
        )


def _resized(tensor: torch.Tensor, missing: int) -> torch.Tensor:
    """With ``missing`` more steps of zeros, or fewer if negative."""
    if missing <= 0:
        return tensor[:, : tensor.shape[1] + missing]
    shape = (tensor.shape[0], missing, *tensor.shape[2:])
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=1)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of ``x`` where ``mask`` is true, of one shape; 0 where it nowhere is."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp_min(1)


def normalised(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over the steps that took place, ``[N, T]``; 0 elsewhere."""
    centred = advantages - masked_mean(advantages, mask)
    spread = masked_mean(centred.square(), mask).sqrt()
    return torch.where(mask, centred / (spread + _SMALLEST_SPREAD), 0.0)


def generalised_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    discount: float,
    gae_lambda: float,
) -> torch.Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438).

    ``A_t = delta_t + discount lambda A_{t+1}`` with ``delta_t = r_t + discount V_{t+1} - V_t``;
    after the last step of an episode V and A are 0.

    Args:
        rewards, values, mask: ``[N, T]``.

    Returns:
        ``[N, T]``, 0 behind the ends.
    """
    values = torch.where(mask, values, 0.0)
    after = advantage = torch.zeros_like(values[:, 0])
    advantages = []
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * after - values[:, t]
        advantage = torch.where(mask[:, t], delta + discount * gae_lambda * advantage, 0.0)
        after = values[:, t]
        advantages.append(advantage)
    return torch.stack(advantages[::-1], dim=1)


def _log_probabilities(logits: torch.Tensor, heads: Sequence[int]) -> list[torch.Tensor]:
    return [head.log_softmax(-1) for head in torch.split(logits, list(heads), dim=-1)]


def log_probability(
    logits: torch.Tensor, choices: torch.Tensor, heads: Sequence[int]
) -> torch.Tensor:
    """Log-probability ``[...]`` of joint choices ``[..., H]`` under ``[..., sum(heads)]``."""
    chosen = [
        head.gather(-1, choice[..., None])[..., 0]
        for head, choice in zip(_log_probabilities(logits, heads), choices.unbind(-1), strict=True)
    ]
    return torch.stack(chosen, dim=-1).sum(-1)


def entropy(logits: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """Entropy of each head, ``[..., H]``; that of the joint choice is their sum."""
    return torch.stack([-(p.exp() * p).sum(-1) for p in _log_probabilities(logits, heads)], -1)


def kl_divergence(logits: torch.Tensor, other: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """KL(logits || other) of each head, ``[..., H]``; that of the joint choice is their sum."""
    pairs = zip(_log_probabilities(logits, heads), _log_probabilities(other, heads), strict=True)
    return torch.stack([(p.exp() * (p - q)).sum(-1) for p, q in pairs], dim=-1)


def clipped_policy_loss(
    log_ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, clip: float
) -> torch.Tensor:
    """Mean of ``-min(r A, clamp(r, 1 - clip, 1 + clip) A)`` with ``r = exp(log_ratio)``.

    Args:
        log_ratio: ``[N, T]``, log-probability now minus that at collection; its gradient stops at
            ±20, before the exponential overflows.
        advantages, mask: ``[N, T]``.
    """
    ratio = log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return masked_mean(-torch.minimum(ratio * advantages, clipped * advantages), mask)


def value_loss(
    values: torch.Tensor,
    old: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip: float | None = None,
) -> torch.Tensor:
    """Mean of half the squared error of the values, ``[N, T]`` each.

    With ``clip``, the larger one of that and of the error of ``old + clamp(values - old, ±clip)``.
    """
    errors = (values - returns).square()
    if clip is not None:
        near = old + (values - old).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - returns).square())
    return 0.5 * masked_mean(errors, mask)


def approximate_kl(log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of ``r - 1 - log r``: an estimate of KL(old || new) that is never negative."""
    bounded = log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return masked_mean(bounded.expm1() - bounded, mask)


def clip_fraction(log_ratio: torch.Tensor, mask: torch.Tensor, clip: float) -> torch.Tensor:
    """Share of the steps whose ratio is farther than ``clip`` from 1."""
    return masked_mean((log_ratio.expm1().abs() > clip).to(log_ratio.dtype), mask)


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """``1 - var(returns - values) / var(returns)``; 0 where the returns do not vary."""
    error, spread = returns - values, returns - masked_mean(returns, mask)
    unexplained = masked_mean((error - masked_mean(error, mask)).square(), mask)
    variance = masked_mean(spread.square(), mask)
    return torch.where(variance > 0, 1.0 - unexplained / variance, 0.0)


@dataclass(frozen=True)
class Losses:
    """What a gradient step minimises, and numbers to look at.

    Attributes:
        total: scalar with a gradient.
        metrics: detached scalars by name.
    """

    total: torch.Tensor
    metrics: dict[str, torch.Tensor]


def ppo_losses(
    logits: torch.Tensor,
    values: torch.Tensor,
    episodes: Episodes,
    heads: Sequence[int],
    config: PPOConfig,
    entropy_weight: float,
    initial_logits: torch.Tensor | None = None,
) -> Losses:
    """The PPO objective over a minibatch of whole episodes.

    Args:
        logits: ``[N, T, sum(heads)]``, of the policy as it is now.
        values: ``[N, T]``, of the critic as it is now.
        episodes: what was collected.
        heads: choices of each head.
        config: clips and weights.
        entropy_weight: weight of the entropy now.
        initial_logits: ``[N, T, sum(heads)]`` of the policy that ``config.kl_to_initial`` holds on
            to; not needed where that is 0.
    """
    mask = episodes.mask
    old_values, rewards = episodes.values.to(values), episodes.rewards.to(values)
    advantages = generalised_advantages(
        rewards, old_values, mask, config.discount, config.gae_lambda
    )
    returns = advantages + old_values
    log_ratio = log_probability(logits, episodes.choices, heads) - episodes.log_probs.to(logits)
    policy = clipped_policy_loss(log_ratio, normalised(advantages, mask), mask, config.clip)
    value = value_loss(values, old_values, returns, mask, config.value_clip)
    joint_entropy = masked_mean(entropy(logits, heads).sum(-1), mask)
    total = policy + config.value_weight * value - entropy_weight * joint_entropy
    metrics = {
        "policy_loss": policy,
        "value_loss": value,
        "entropy": joint_entropy,
        "approximate_kl": approximate_kl(log_ratio, mask),
        "clip_fraction": clip_fraction(log_ratio, mask, config.clip),
        "explained_variance": explained_variance(values, returns, mask),
    }
    if initial_logits is not None:
        kl = masked_mean(kl_divergence(logits, initial_logits, heads).sum(-1), mask)
        total = total + config.kl_to_initial * kl
        metrics["kl_to_initial"] = kl
    return Losses(total, {name: metric.detach() for name, metric in metrics.items()})
