"""Multilayer perceptrons, stacked."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from lhopt_fused.meta.tasks.layers import (
    ACTIVATIONS,
    NORMS,
    Dropout,
    Norm,
    Parameter,
    batch_norm,
    layer_norm,
    linear,
)
from lhopt_fused.meta.tasks.seeded import log_uniform
from lhopt_fused.meta.tasks.supervised import Network

__all__ = ["MLP", "random_mlp"]


@dataclass(frozen=True)
class MLP(Network):
    """Linear layers with an activation, and maybe a normalisation before it, between them.

    Attributes:
        inputs: numbers in an example, however they are arranged.
        widths: of the hidden layers.
        outputs: classes or numbers to predict.
        activation: a key of :data:`ACTIVATIONS`.
        norm: what normalises a hidden layer.
    """

    inputs: int
    widths: tuple[int, ...]
    outputs: int
    activation: str
    norm: Norm

    @property
    def products(self) -> int:
        """Multiplications of one example."""
        sizes = (self.inputs, *self.widths, self.outputs)
        return sum(i * o for i, o in pairwise(sizes))

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Weights ``[I, O]``, biases, and scales and shifts of the normalisations."""
        sizes = (self.inputs, *self.widths, self.outputs)
        found = {}
        for index, (i, o) in enumerate(pairwise(sizes)):
            found[f"{index}.weight"] = Parameter((i, o), fan_in=i)
            found[f"{index}.bias"] = Parameter((o,))
            if self.norm != "none" and index < len(self.widths):
                found[f"{index}.scale"] = Parameter((o,), start=1.0)
                found[f"{index}.shift"] = Parameter((o,))
        return found

    def forward(
        self, params: Mapping[str, torch.Tensor], inputs: torch.Tensor, dropout: Dropout | None
    ) -> torch.Tensor:
        """Outputs ``[R, B, C]`` for examples ``[R, B, ...]``."""
        hidden = inputs.flatten(2)
        normalise = {"layer": layer_norm, "batch": batch_norm}.get(self.norm)
        for index in range(len(self.widths)):
            hidden = linear(params, str(index), hidden)
            if normalise is not None:
                hidden = normalise(params, str(index), hidden)
            hidden = ACTIVATIONS[self.activation](hidden)
            if dropout is not None:
                hidden = dropout(hidden)
        return linear(params, str(len(self.widths)), hidden)

    def numbers(self) -> dict[str, float]:
        """Sizes and the kind of normalisation."""
        kind = {f"{self.norm}_norm": 1.0} if self.norm != "none" else {}
        return kind | {
            "log_inputs": math.log(self.inputs),
            "log_outputs": math.log(self.outputs),
            "log_width": math.log(max(self.widths, default=1)),
            "depth": float(len(self.widths)),
        }


def random_mlp(generator: random.Random, inputs: int, outputs: int) -> MLP:
    """One to four hidden layers, 8 to 64 wide and narrower the deeper, any activation and norm."""
    depth = generator.choice((1, 1, 2, 2, 3, 4))
    width = round(log_uniform(generator, 8, 64 / math.sqrt(depth)))
    activation = generator.choice(sorted(ACTIVATIONS))
    return MLP(inputs, (width,) * depth, outputs, activation, generator.choice(NORMS))
