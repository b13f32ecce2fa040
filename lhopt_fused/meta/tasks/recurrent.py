"""Recurrent networks on sequences of symbols, stacked."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from lhopt_fused.meta.tasks.layers import Dropout, Parameter, embedding, linear
from lhopt_fused.meta.tasks.seeded import log_uniform
from lhopt_fused.meta.tasks.supervised import Network

__all__ = ["Cell", "Recurrent", "random_recurrent"]

Cell = Literal["rnn", "gru", "lstm"]

_GATES: Final[Mapping[Cell, int]] = {"rnn": 1, "gru": 3, "lstm": 4}


@dataclass(frozen=True)
class Recurrent(Network):
    """One layer of RNN (tanh), GRU or LSTM cells, then a linear layer.

    Attributes:
        cell: its kind.
        symbols: how many there are.
        length: of a sequence.
        width: of the hidden state.
        outputs: classes.
        every_step: whether there is an output for each symbol, not only for the last.
    """

    cell: Cell
    symbols: int
    length: int
    width: int
    outputs: int
    every_step: bool

    @property
    def products(self) -> int:
        """Multiplications of one sequence."""
        heads = self.length if self.every_step else 1
        own = self.length * self.width * _GATES[self.cell] * self.width
        return own + heads * self.width * self.outputs

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What a symbol adds to the gates, biases, recurrent weights, and the last layer."""
        gates = _GATES[self.cell] * self.width
        return {
            "symbols.weight": Parameter((self.symbols, gates), fan_in=1),
            "symbols.bias": Parameter((gates,)),
            "recurrent.weight": Parameter((self.width, gates), fan_in=self.width),
            "head.weight": Parameter((self.width, self.outputs), fan_in=self.width),
            "head.bias": Parameter((self.outputs,)),
        }

    def forward(
        self, params: Mapping[str, torch.Tensor], inputs: torch.Tensor, dropout: Dropout | None
    ) -> torch.Tensor:
        """Outputs ``[R, B, classes]`` for symbols ``[R, B, T]``, or ``[R, B T, classes]`` in the
        order of the symbols."""
        runs, batch, length = inputs.shape
        added = embedding(params["symbols.weight"], inputs.transpose(1, 2))  # [R, T, B, gates]
        steps = (added + params["symbols.bias"][:, None, None]).unbind(1)
        states = self._states(params["recurrent.weight"], steps)
        if self.every_step:
            hidden = torch.stack(states, dim=2).view(runs, batch * length, self.width)
        else:
            hidden = states[-1]
        return linear(params, "head", hidden if dropout is None else dropout(hidden))

    def _states(self, weight: torch.Tensor, steps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Hidden states ``[R, B, H]`` after each of ``steps``, ``[R, B, gates]``."""
        advance = {"rnn": _rnn, "gru": _gru, "lstm": _lstm}[self.cell]
        zero = steps[0].new_zeros(*steps[0].shape[:2], self.width)
        hidden, memory, states = zero, zero, []
        for added in steps:
            hidden, memory = advance(added, weight, hidden, memory)
            states.append(hidden)
        return states

    def numbers(self) -> dict[str, float]:
        """Sizes and the kind of cell."""
        return {
            self.cell: 1.0,
            "log_inputs": math.log(self.symbols),
            "log_outputs": math.log(self.outputs),
            "log_width": math.log(self.width),
            "log_length": math.log(self.length),
            "depth": 1.0,
        }


State = tuple[torch.Tensor, torch.Tensor]


def _rnn(
    added: torch.Tensor, weight: torch.Tensor, hidden: torch.Tensor, memory: torch.Tensor
) -> State:
    return torch.baddbmm(added, hidden, weight).tanh(), memory


def _gru(
    added: torch.Tensor, weight: torch.Tensor, hidden: torch.Tensor, memory: torch.Tensor
) -> State:
    width = hidden.shape[2]
    product = torch.bmm(hidden, weight)
    gates = (added[..., : 2 * width] + product[..., : 2 * width]).sigmoid()
    reset, keep = gates.chunk(2, dim=2)
    new = torch.addcmul(added[..., 2 * width :], reset, product[..., 2 * width :]).tanh()
    return torch.lerp(new, hidden, keep), memory


def _lstm(
    added: torch.Tensor, weight: torch.Tensor, hidden: torch.Tensor, memory: torch.Tensor
) -> State:
    width = hidden.shape[2]
    product = torch.baddbmm(added, hidden, weight)
    write, keep, show = product[..., : 3 * width].sigmoid().chunk(3, dim=2)
    memory = torch.addcmul(keep * memory, write, product[..., 3 * width :].tanh())
    return show * memory.tanh(), memory


def random_recurrent(
    generator: random.Random, *, symbols: int, length: int, outputs: int, every_step: bool
) -> Recurrent:
    """Any cell, 8 to 32 wide, narrower the more gates it has."""
    cell = generator.choice(get_args(Cell))
    width = round(log_uniform(generator, 8, 40 / math.sqrt(_GATES[cell])))
    return Recurrent(cell, symbols, length, width, outputs, every_step)
