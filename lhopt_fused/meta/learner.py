"""The learner: networks, optimizer, episodes at hand, and one update of PPO after another.

And a supervised start, which a learner may go on from.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from lhopt_fused.meta.critic import Critic, unroll_critic, unroll_policy
from lhopt_fused.meta.ppo import Episodes, Losses, PPOConfig, masked_mean, ppo_losses
from lhopt_fused.policy.network import PolicyNetwork

__all__ = ["EpisodeBuffer", "Learner", "clone_behaviour"]

_STATE_VERSION: Final = 1


@dataclass(frozen=True)
class EpisodeBuffer:
    """Episodes to learn from, oldest first.

    Attributes:
        episodes: the episodes; None while there are none.
        uses: int64 ``[N]``, gradient steps that each took part in.
    """

    episodes: Episodes | None
    uses: torch.Tensor

    @classmethod
    def empty(cls) -> EpisodeBuffer:
        """Nothing to learn from yet."""
        return cls(None, torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.uses)

    def added(self, new: Episodes) -> EpisodeBuffer:
        """With new episodes behind the ones there are."""
        parts = [new] if self.episodes is None else [self.episodes, new]
        uses = torch.cat([self.uses, torch.zeros(len(new), dtype=torch.int64)])
        return EpisodeBuffer(Episodes.concatenate(parts), uses)

    def kept(self, config: PPOConfig, version: int) -> EpisodeBuffer:
        """Without what is too stale at a version or used up, and no more than there is room for."""
        if self.episodes is None:
            return self
        fresh = version - self.episodes.version <= config.staleness
        indices = (fresh & (self.uses < config.reuse)).nonzero()[:, 0][-config.buffer_episodes :]
        if not len(indices):
            return EpisodeBuffer.empty()
        return EpisodeBuffer(self.episodes.select(indices), self.uses[indices])

    def used(self, indices: torch.Tensor) -> EpisodeBuffer:
        """After a gradient step with the episodes at ``indices``."""
        ones = torch.ones_like(indices)
        return EpisodeBuffer(self.episodes, self.uses.index_add(0, indices, ones))

    def minibatches(self, config: PPOConfig, generator: torch.Generator) -> list[torch.Tensor]:
        """Indices of each gradient step's episodes: the least used ones first, else by chance.

        Each episode is in one minibatch at most; all minibatches are about as large.
        """
        shuffled = torch.randperm(len(self), generator=generator)
        order = shuffled[self.uses[shuffled].argsort(stable=True)]
        order = order[: config.minibatches * config.minibatch_episodes]
        order = order[torch.randperm(len(order), generator=generator)]
        return list(order.tensor_split(-(-len(order) // config.minibatch_episodes)))


class Learner:
    """Learns a policy from episodes that others collect.

    Each :meth:`update` takes in new episodes, does a few gradient steps on the episodes at hand and
    then, once, moves the networks' input statistics by the new ones: so the ratios of episodes
    that the current network collected start at 1. It is a pure function of the state, the seed and
    the episodes.

    Attributes:
        network: the policy; collect with this one, in evaluation mode as it is.
        average: its average over gradient steps; evaluate and ship this one.
        initial: the policy that ``kl_to_initial`` holds on to; None where that is 0.
        critic: for :attr:`Episodes.values`.
        version: updates done; for :attr:`Episodes.version`.

    Args:
        network: to be trained in place, on the device where the gradient steps are to run.
        critic: likewise, on the same device.
        config: what an update does.
        seed: of the order of the episodes.

    Raises:
        ValueError: the critic takes other policy features than the network.
    """

    def __init__(
        self, network: PolicyNetwork, critic: Critic, config: PPOConfig, seed: int = 0
    ) -> None:
        if critic.features != network.shape.features:
            raise ValueError(
                f"the critic takes {critic.features} features, "
                f"expected those of the network, {network.shape.features}"
            )
        self.network, self.critic, self.config = network.eval(), critic.eval(), config
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.initial = copy.deepcopy(self.average) if config.kl_to_initial else None
        self.version = 0
        self.buffer = EpisodeBuffer.empty()
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.Adam(
            [*network.parameters(), *critic.parameters()], lr=config.learning_rate
        )

    def start_from_network(self) -> None:
        """Take the network as it is now for the average too, and for what to stay near to.

        For when it was changed from outside, by :func:`clone_behaviour`, before the first update.
        """
        for follower in (self.average, self.initial):
            if follower is not None:
                follower.load_state_dict(self.network.state_dict())

    def update(self, new_episodes: Episodes) -> dict[str, float]:
        """One iteration of PPO.

        Args:
            new_episodes: collected since the last update; ones too stale are left out.

        Returns:
            Means over the gradient steps of the losses and of what they show, and counts.

        Raises:
            ValueError: the episodes do not fit the networks, come from the future, or leave nothing
                to learn from; nothing has been changed then.
            RuntimeError: a gradient is not finite; the parameters are as before that step.
        """
        self._check(new_episodes)
        new_episodes = new_episodes.to("cpu")
        buffer = self.buffer.added(new_episodes).kept(self.config, self.version)
        episodes = buffer.episodes
        if episodes is None:
            raise ValueError(
                f"all episodes are older than {self.config.staleness} updates at update "
                f"{self.version}: nothing to learn from; collect with the current network"
            )
        metrics = []
        for indices in buffer.minibatches(self.config, self._generator):
            minibatch = episodes.select(indices).to(self._device)
            metrics.append(self._gradient_step(minibatch))
            buffer = buffer.used(indices)
        self._take_in(new_episodes)
        counts = self._counts(new_episodes, buffer, len(metrics))
        self.version += 1
        self.buffer = buffer.kept(self.config, self.version)
        means = {name: torch.stack([m[name] for m in metrics]).mean() for name in metrics[0]}
        return {name: value.item() for name, value in means.items()} | counts

    def losses(self, minibatch: Episodes) -> Losses:
        """The objective on some episodes, with the graph of its gradient."""
        features, mask = minibatch.features, minibatch.mask
        initial_logits = None
        if self.initial is not None:
            with torch.no_grad():
                initial_logits = unroll_policy(self.initial, features, mask)
        return ppo_losses(
            unroll_policy(self.network, features, mask),
            unroll_critic(self.critic, features, minibatch.privileged, mask),
            minibatch,
            self.network.shape.heads,
            self.config,
            self.config.entropy_weight(self.version),
            initial_logits,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on; loads under ``weights_only=True``.

        Tensors are shared with the learner: save or copy it before the next update.
        """
        episodes = self.buffer.episodes
        return {
            "state_version": _STATE_VERSION,
            "config": asdict(self.config),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "initial": None if self.initial is None else self.initial.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "version": self.version,
            "episodes": None if episodes is None else episodes.to_tensors(),
            "uses": self.buffer.uses,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the learner that ``state`` was taken of.

        Raises:
            ValueError: ``state`` is of another version of the format or of another config; nothing
                has been changed then.
            RuntimeError: the networks are of another shape.
        """
        if state.get("state_version") != _STATE_VERSION:
            raise ValueError(
                f"state_version is {state.get('state_version')!r}, expected {_STATE_VERSION}: "
                "the state is of another version of this package"
            )
        for name, value in asdict(self.config).items():
            found = state["config"].get(name)
            if found != value:
                raise ValueError(f"{name} was {found} in the state, expected {value} as configured")
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        if self.initial is not None:
            self.initial.load_state_dict(state["initial"])
        self.critic.load_state_dict(state["critic"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.version = state["version"]
        episodes = state["episodes"]
        self.buffer = EpisodeBuffer(
            None if episodes is None else Episodes.from_tensors(episodes).to("cpu"),
            state["uses"].to("cpu"),
        )
        self._generator.set_state(state["generator"].to("cpu"))

    @property
    def _device(self) -> torch.device:
        return self.network.pre.weight.device

    def _check(self, episodes: Episodes) -> None:
        shape = self.network.shape
        widths = {
            "features": shape.features,
            "privileged": self.critic.privileged,
            "choices": len(shape.heads),
        }
        for name, width in widths.items():
            found = getattr(episodes, name).shape[-1]
            if found != width:
                raise ValueError(f"{name} are {found} wide, expected {width}, as the networks are")
        sizes = torch.tensor(shape.heads, device=episodes.choices.device)
        if bool(((episodes.choices < 0) | (episodes.choices >= sizes)).any()):
            raise ValueError(f"choices are out of range, expected below {list(shape.heads)}")
        if len(episodes) and int(episodes.version.max()) > self.version:
            raise ValueError(
                f"episodes were collected at version {int(episodes.version.max())}, "
                f"expected at most the learner's, {self.version}"
            )

    def _gradient_step(self, minibatch: Episodes) -> dict[str, torch.Tensor]:
        losses = self.losses(minibatch)
        self._optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        norms = {
            f"{name}_gradient_norm": torch.nn.utils.clip_grad_norm_(
                module.parameters(), self.config.gradient_norm, error_if_nonfinite=True
            )
            for name, module in (("policy", self.network), ("critic", self.critic))
        }
        self._optimizer.step()
        self._move_average()
        return losses.metrics | norms

    @torch.no_grad()
    def _move_average(self) -> None:
        """Move the average by one step."""
        pairs = zip(self.average.parameters(), self.network.parameters(), strict=True)
        for average, parameter in pairs:
            average.lerp_(parameter, 1.0 - self.config.polyak)

    def _take_in(self, new: Episodes) -> None:
        """Move the input statistics by the steps of new episodes; the average's follow."""
        new = new.to(self._device)
        if not len(new):
            return
        features, privileged = new.features[new.mask], new.privileged[new.mask]
        self.network.normalisation.take_in(features)
        self.critic.normalisation.take_in(self.critic.inputs(features, privileged))
        self.average.normalisation.load_state_dict(self.network.normalisation.state_dict())

    def _counts(self, new: Episodes, buffer: EpisodeBuffer, steps: int) -> dict[str, float]:
        assert buffer.episodes is not None
        age = (self.version - buffer.episodes.version).double()
        returns = (new.rewards * new.mask).sum(1)
        return {
            "return": returns.mean().item() if len(new) else 0.0,
            "episode_length": new.lengths.double().mean().item() if len(new) else 0.0,
            "new_episodes": float(len(new)),
            "buffer_episodes": float(len(buffer)),
            "gradient_steps": float(steps),
            "staleness": age.mean().item(),
            "uses": buffer.uses.double().mean().item(),
            "entropy_weight": self.config.entropy_weight(self.version),
            "version": float(self.version),
        }


def clone_behaviour(
    network: PolicyNetwork,
    features: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    *,
    steps: int = 1000,
    minibatch_episodes: int = 128,
    learning_rate: float = 1e-3,
    exploration: float = 0.02,
    gradient_norm: float = 5.0,
    seed: int = 0,
) -> list[float]:
    """Train a network until it decides as it is shown.

    Minimises the cross-entropy of each head with its target: what the network then decides on
    average is the mean of the targets that it cannot tell apart. First of all the network's input
    statistics take in all the features.

    Args:
        network: trained in place, with Adam; left in evaluation mode.
        features: float32 ``[N, T, F]`` of whole episodes.
        targets: float32 ``[N, T, sum(heads)]``, probabilities of the choices of all heads.
        mask: bool ``[N, T]``, true from the first step of an episode to its last.
        steps: gradient steps, each on ``minibatch_episodes`` episodes drawn anew.
        learning_rate, gradient_norm: of a gradient step.
        exploration: share of the probability that is spread over all choices of a head, for PPO to
            find them.
        seed: of the draws.

    Returns:
        What was minimised at each step.

    Raises:
        ValueError: there are no episodes, shapes do not fit, or a number is not finite.
    """
    _check_demonstrations(network, features, targets, mask)
    device = network.pre.weight.device
    heads = network.shape.heads
    anything = torch.cat([torch.full((size,), 1.0 / size) for size in heads]).to(targets)
    targets = torch.lerp(targets, anything, exploration)
    network.eval().normalisation.take_in(features[mask].to(device))
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for _ in range(steps):
        chosen = torch.randperm(len(mask), generator=generator)[:minibatch_episodes]
        seen, wanted, valid = (x[chosen.to(x.device)].to(device) for x in (features, targets, mask))
        loss = _cross_entropy(network, seen, wanted, valid)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), gradient_norm, error_if_nonfinite=True)
        optimizer.step()
        curve.append(loss.detach())
    return [loss.item() for loss in curve]


def _cross_entropy(
    network: PolicyNetwork, features: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Sum over all heads, mean over steps."""
    logits = torch.split(unroll_policy(network, features, mask), list(network.shape.heads), dim=-1)
    log_probabilities = torch.cat([head.log_softmax(-1) for head in logits], dim=-1)
    return masked_mean(-(targets * log_probabilities).sum(-1), mask)


def _check_demonstrations(
    network: PolicyNetwork, features: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor
) -> None:
    widths = {"features": network.shape.features, "targets": sum(network.shape.heads)}
    for (name, width), x in zip(widths.items(), (features, targets), strict=True):
        if x.shape != (*mask.shape, width):
            raise ValueError(
                f"{name} has shape {list(x.shape)}, expected {[*mask.shape, width]}, as mask has"
            )
        if not x.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite; leave those episodes out")
    if not len(mask):
        raise ValueError("there are no episodes to clone, expected one at least")
