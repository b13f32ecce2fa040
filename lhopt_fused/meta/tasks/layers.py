"""Layers, losses and starting weights of R networks at once, stacked along the first dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F

from lhopt_fused.meta.tasks.seeded import uniform_numbers
from lhopt_fused.policy.decision import uniform

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "Dropout",
    "Loss",
    "Norm",
    "Parameter",
    "batch_norm",
    "draw_parameters",
    "embedding",
    "layer_norm",
    "linear",
    "losses",
    "parameter_count",
]

Params = Mapping[str, torch.Tensor]
Norm = Literal["none", "layer", "batch"]
Loss = Literal["cross_entropy", "squared_error", "hinge"]

NORMS: Final[tuple[Norm, ...]] = get_args(Norm)

ACTIVATIONS: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
}

_FIRST_STREAM: Final = 1000  # of the draws of starting weights
_TINY: Final = 1e-12  # keeps the logarithm of a loss finite


@dataclass(frozen=True)
class Parameter:
    """A tensor of each task.

    Attributes:
        shape: without the task dimension.
        fan_in: inputs behind an output, for weights that start uniform with a standard deviation
            of the task's gain over ``sqrt(fan_in)``; 0 for tensors that start constant.
        start: what a constant starts at.
    """

    shape: tuple[int, ...]
    fan_in: int = 0
    start: float = 0.0


def parameter_count(parameters: Mapping[str, Parameter]) -> int:
    """Elements of one task's tensors."""
    return sum(math.prod(parameter.shape) for parameter in parameters.values())


def draw_parameters(
    parameters: Mapping[str, Parameter], seeds: torch.Tensor, gain: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Starting values of all tasks, float32 ``[R, *shape]``.

    Args:
        parameters: by name.
        seeds: int64 ``[R]``.
        gain: float32 ``[R]``.
    """
    drawn = {}
    for stream, (name, parameter) in enumerate(parameters.items(), _FIRST_STREAM):
        shape = (seeds.shape[0], *parameter.shape)
        if parameter.fan_in == 0:
            drawn[name] = torch.full(shape, parameter.start, device=seeds.device)
            continue
        numbers = uniform_numbers(seeds, stream, math.prod(parameter.shape)).to(torch.float32)
        bound = gain * math.sqrt(3.0 / parameter.fan_in)
        drawn[name] = ((2.0 * numbers - 1.0) * bound[:, None]).view(shape)
    return drawn


def linear(params: Params, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """``inputs`` ``[R, N, I]`` times ``NAME.weight`` ``[R, I, O]`` plus ``NAME.bias``."""
    return torch.baddbmm(params[f"{name}.bias"][:, None], inputs, params[f"{name}.weight"])


def embedding(weight: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
    """Rows of each task's own ``weight`` ``[R, V, O]`` for ``symbols`` int64 ``[R, ...]``."""
    count = weight.shape[1]
    first = torch.arange(0, weight.shape[0] * count, count, device=weight.device)
    index = symbols + first.view(-1, *[1] * (symbols.ndim - 1))
    return F.embedding(index, weight.flatten(0, 1))


def layer_norm(params: Params, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Normalise each row of ``[R, N, C]``, then scale and shift by channel."""
    normal = F.layer_norm(inputs, inputs.shape[-1:])
    return torch.addcmul(params[f"{name}.shift"][:, None], normal, params[f"{name}.scale"][:, None])


def batch_norm(params: Params, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Normalise each channel of ``[R, N, C]`` over its task's batch, then scale and shift."""
    centred = inputs - inputs.mean(dim=1, keepdim=True)
    inverse = (centred.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt()
    scale = inverse * params[f"{name}.scale"][:, None]
    return torch.addcmul(params[f"{name}.shift"][:, None], centred, scale)


class Dropout:
    """Drops activations of one training step; each call draws masks of its own.

    Args:
        seeds: int64 ``[R]``.
        step: number of the minibatch.
        rates: float32 ``[R]``, below 1.
    """

    def __init__(self, seeds: torch.Tensor, step: int, rates: torch.Tensor) -> None:
        self._seeds = ~seeds[:, None]  # minibatches are keyed by the seeds themselves
        self._step = torch.full_like(self._seeds[:1], step)
        self._rates = rates[:, None]
        self._drawn = 0

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """``inputs`` ``[R, ...]`` with a share of the elements dropped, the rest scaled up."""
        count = inputs[0].numel()
        heads = torch.arange(self._drawn, self._drawn + count, device=inputs.device)[None]
        self._drawn += count
        kept = uniform(self._seeds, self._step, heads).to(torch.float32) >= self._rates
        return inputs * (kept / (1.0 - self._rates)).view(inputs.shape)


def losses(outputs: torch.Tensor, targets: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Mean loss of each task, float32 ``[R]``, at least 1e-12.

    Args:
        outputs: ``[R, N, C]``.
        targets: classes, int64 with N of them a task; or numbers ``[R, N, C]``, for
            ``squared_error`` only.
        loss: ``squared_error`` against one-hot vectors where the targets are classes; ``hinge`` is
            the mean margin violation over classes.
    """
    if targets.is_floating_point():
        return (outputs - targets).square().mean(dim=(1, 2)) + _TINY
    rows, classes = outputs.flatten(0, 1), targets.flatten()
    if loss == "cross_entropy":
        each = F.cross_entropy(rows, classes, reduction="none")
    else:
        # comparing, where gather would add up its gradient in any order on a GPU
        right = classes[:, None] == torch.arange(rows.shape[1], device=rows.device)
        each = _hinge(rows, right) if loss == "hinge" else (rows - right.float()).square().sum(1)
    return each.view(outputs.shape[:2]).mean(dim=1) + _TINY


def _hinge(rows: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Mean margin violation of the wrong classes; unlike torch's, NaN where a row is NaN."""
    own = torch.where(right, rows, 0.0).sum(dim=1, keepdim=True)
    return torch.where(right, 0.0, (1.0 + rows - own).relu()).mean(dim=1)
