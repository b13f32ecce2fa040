"""Teachers: on each training task, the schedule that promises most to whoever sees what a policy
sees.

The best schedule of a task in hindsight owes much to chance, which nobody can learn. A teacher goes
by what can be expected instead: networks predict what every schedule is worth from the policy
features after the first outer step, each task's by networks that never saw its batch. Its worth is
its reward, and something for ending below the hand control: the mean of rewards says little about
how often one does.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final

import torch
import torch.nn.functional as F

__all__ = ["expected_worth", "teacher_weights"]

_FOLDS: Final = 10
_MEMBERS: Final = 3
_HIDDEN: Final = 64
_DROPOUT: Final = 0.2
_EPOCHS: Final = 40
_MINIBATCH: Final = 64
_LEARNING_RATE: Final = 2e-3
_WEIGHT_DECAY: Final = 0.1
_LARGEST_INPUT: Final = 5.0  # standard deviations


def expected_worth(
    features: torch.Tensor, worth: torch.Tensor, batches: torch.Tensor, seed: int = 0
) -> torch.Tensor:
    """What each schedule promises on each task, by networks that learn from the other tasks.

    Ten times, a tenth of the batches is left out; the mean of three networks with two hidden layers
    that learned from the rest predicts what was left out.

    Args:
        features: ``[T, F]``, what a policy sees of each task.
        worth: ``[C, T]``, of each schedule.
        batches: int64 ``[T]``, which batch of tasks a task is of; tasks of one are alike.
        seed: of the networks.

    Returns:
        float64 ``[C, T]``.

    Raises:
        ValueError: there are fewer than two batches.
    """
    names, place = torch.unique(batches, return_inverse=True)
    folds = min(_FOLDS, len(names))
    if folds < 2:
        raise ValueError("tasks of one batch only: expected two at least, to leave one out")
    left_out = place[None] % folds == torch.arange(folds)[:, None]  # [K, T]
    inputs, targets = _standardised(features), worth.T.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = _Networks(folds * _MEMBERS, inputs.shape[1], len(worth))
        _train(networks, inputs, targets, (~left_out).repeat(_MEMBERS, 1).float())
    with torch.no_grad():
        found = networks(inputs).double().view(_MEMBERS, folds, *targets.shape).mean(0)
    return torch.einsum("ktc,kt->ct", found, left_out.double())


def teacher_weights(expected: torch.Tensor, temperature: float) -> torch.Tensor:
    """How much the teacher of each task makes of each schedule: the softmax of what it promises.

    Args:
        expected: ``[C, T]``, as of :func:`expected_worth`.
        temperature: difference in worth by which a weight falls to 1/e.

    Returns:
        float64 ``[T, C]``, each row of sum 1.
    """
    return (expected.double() / temperature).softmax(0).T


def _standardised(features: torch.Tensor) -> torch.Tensor:
    features = features.double()
    spread = features.std(0, correction=0)
    scaled = (features - features.mean(0)) / torch.where(spread > 0, spread, 1.0)
    return scaled.clamp(-_LARGEST_INPUT, _LARGEST_INPUT).float()


class _Networks(torch.nn.Module):
    """Several networks side by side: ``[T, F]`` to ``[N, T, C]``.

    Attributes:
        mean: ``[N, 1, C]``, what each network adds to what it computes.
    """

    def __init__(self, count: int, width: int, outputs: int) -> None:
        super().__init__()
        sizes = (width, _HIDDEN, _HIDDEN, outputs)
        self.layers = torch.nn.ParameterList(
            torch.empty(count, before + 1, after).uniform_(-1, 1) / math.sqrt(before)
            for before, after in pairwise(sizes)
        )
        self.mean = torch.zeros(count, 1, outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs.expand(len(self.layers[0]), -1, -1)
        for index, layer in enumerate(self.layers):
            hidden = torch.baddbmm(layer[:, -1:], hidden, layer[:, :-1])
            if index + 1 < len(self.layers):
                hidden = F.gelu(hidden)
            if index == 0:
                hidden = F.dropout(hidden, _DROPOUT, self.training)
        return hidden + self.mean


def _train(
    networks: _Networks, inputs: torch.Tensor, targets: torch.Tensor, learn_from: torch.Tensor
) -> None:
    """Squared errors down, each network on the tasks that it learns from, ``[N, T]`` of 0 and 1."""
    networks.mean = (learn_from @ targets / learn_from.sum(1, keepdim=True))[:, None]
    optimizer = torch.optim.AdamW(
        networks.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
    )
    for _ in range(_EPOCHS):
        for chosen in torch.split(torch.randperm(len(inputs)), _MINIBATCH):
            errors = (networks(inputs[chosen]) - targets[chosen]).square().mean(-1)
            loss = (errors * learn_from[:, chosen]).mean(1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    networks.eval()
