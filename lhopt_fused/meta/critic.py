"""The critic, which sees more than the policy, and both networks over whole episodes at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from lhopt_fused.policy.features import LARGEST_FEATURE
from lhopt_fused.policy.network import (
    InputNormalisation,
    LayerNormLSTMCell,
    LSTMState,
    PolicyNetwork,
)

__all__ = ["Critic", "unroll_critic", "unroll_policy"]


class Critic(nn.Module):
    """Value of an outer step, from the policy features and from privileged inputs.

    Normalised input -> Linear + ReLU -> layer-norm LSTM -> Linear + ReLU -> Linear; a policy
    network's body with parameters and input statistics of its own. A fresh critic says 0.

    Args:
        features: length of the policy features.
        privileged: length of the privileged inputs; they are clamped to 1e6 in magnitude.
        hidden: width of every layer.
    """

    def __init__(self, features: int, privileged: int, hidden: int = 256) -> None:
        super().__init__()
        self.features, self.privileged = features, privileged
        self.normalisation = InputNormalisation(features + privileged)
        self.pre = nn.Linear(features + privileged, hidden)
        self.lstm = LayerNormLSTMCell(hidden)
        self.post = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def initial_state(self, batch: tuple[int, ...] = ()) -> LSTMState:
        """The memory at the start of an episode: zeros."""
        zeros = self.pre.weight.new_zeros(*batch, self.post.in_features)
        return LSTMState(zeros, zeros.clone())

    def inputs(self, features: torch.Tensor, privileged: torch.Tensor) -> torch.Tensor:
        """What the normalisation takes: both side by side, ``[..., features + privileged]``."""
        bounded = privileged.clamp(-LARGEST_FEATURE, LARGEST_FEATURE)
        return torch.cat([features, bounded], dim=-1)

    def forward(
        self, features: torch.Tensor, privileged: torch.Tensor, state: LSTMState
    ) -> tuple[torch.Tensor, LSTMState]:
        """One outer step: the value, ``[...]``, and the new memory."""
        x = self.pre(self.normalisation(self.inputs(features, privileged))).relu()
        state = self.lstm(x, state)
        return self.value(self.post(state.h).relu())[..., 0], state


def unroll_policy(
    network: PolicyNetwork, features: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The policy over whole episodes: the same function as one outer step after another.

    Args:
        network: in either mode; its input statistics stay as they are.
        features: ``[N, T, F]``.
        mask: bool ``[N, T]``, true from the first step of an episode to its last.

    Returns:
        Logits ``[N, T, sum(heads)]``, 0 where the mask is false.
    """
    steps = _Steps.of(mask)
    x = network.normalisation.normalise(steps.pack(features.to(network.pre.weight)))
    y = network.post(_remember(network.lstm, network.pre(x).relu(), steps)).relu()
    return steps.unpack(torch.cat([head(y) for head in network.heads], dim=-1))


def unroll_critic(
    critic: Critic, features: torch.Tensor, privileged: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The critic over whole episodes, like :func:`unroll_policy`: values ``[N, T]``."""
    steps = _Steps.of(mask)
    inputs = critic.inputs(*(x.to(critic.pre.weight) for x in (features, privileged)))
    x = critic.normalisation.normalise(steps.pack(inputs))
    y = critic.post(_remember(critic.lstm, critic.pre(x).relu(), steps)).relu()
    return steps.unpack(critic.value(y))[..., 0]


class _Steps(NamedTuple):
    """The steps that took place, packed: step by step, the longest episodes first.

    So that one step's rows are a prefix of the rows of the step before, and nothing is computed
    where an episode has ended.

    Attributes:
        episode, step: int64 ``[rows]``, where each row belongs.
        rows: rows of each step, falling.
        shape: N and T.
    """

    episode: torch.Tensor
    step: torch.Tensor
    rows: list[int]
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: torch.Tensor) -> _Steps:
        order = mask.sum(1).argsort(descending=True, stable=True)
        step, place = mask[order].T.nonzero(as_tuple=True)
        return cls(order[place], step, mask.sum(0).tolist(), (mask.shape[0], mask.shape[1]))

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, T, ...]`` to ``[rows, ...]``."""
        return x[self.episode, self.step]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, ...]`` to ``[N, T, ...]``, 0 where no step took place."""
        out = x.new_zeros(*self.shape, *x.shape[1:])
        return out.index_put((self.episode, self.step), x)


def _remember(cell: LayerNormLSTMCell, x: torch.Tensor, steps: _Steps) -> torch.Tensor:
    """Outputs of the cell for packed inputs, ``[rows, hidden]`` each; only this is a loop."""
    gates = torch.split(cell.read(x), [rows for rows in steps.rows if rows])
    zeros = x.new_zeros(steps.shape[0], x.shape[-1])
    state = LSTMState(zeros, zeros)
    outputs = []
    for gate in gates:
        rows = gate.shape[0]
        state = cell.recur(gate, LSTMState(state.h[:rows], state.c[:rows]))
        outputs.append(state.h)
    return torch.cat(outputs)
