"""Recurrent networks that are to find the rule behind sequences: XOR and binary addition."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, Final

import torch
from torch import nn

from lhopt_fused.evaluation.task import Size
from lhopt_fused.evaluation.tasks.supervised import Classification, hold_out
from lhopt_fused.meta.tasks.sequences import digits

__all__ = ["AdditionRNN", "XorRNN"]

_HELD_OUT: Final = (256, 1_024)  # sequences for policies and for the report


class _Recurrent(nn.Module):
    """One bit after every symbol."""

    def __init__(self, symbols: int, width: int, kind: type[nn.RNN | nn.GRU]) -> None:
        super().__init__()
        self.symbol = nn.Embedding(symbols, width)
        self.recurrent = kind(width, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(
        self, symbols: torch.Tensor
    ) -> torch.Tensor:  # [batch, length] -> [batch, 2, length]
        logits: torch.Tensor = self.head(self.recurrent(self.symbol(symbols))[0])
        return logits.transpose(1, 2)


class _Rule(Classification):
    """All sequences of a length, dealt to the three splits."""

    symbols: ClassVar[int]
    kind: ClassVar[type[nn.RNN | nn.GRU]]
    lengths: ClassVar[dict[Size, int]]

    def __init__(self, size: Size, data_dir: Path | None = None) -> None:
        sequences = digits(self.symbols, self.lengths[size])
        shuffled = sequences[_order(len(sequences))]
        targets = self.targets(shuffled)
        policy_eval, report = _HELD_OUT
        training, held_out = hold_out(
            (shuffled[report:], targets[report:]),
            (shuffled[:report], targets[:report]),
            train=len(shuffled),
            policy_eval=policy_eval,
            at_most=report,
        )
        small = size == "small"
        super().__init__(training, held_out, steps=400 if small else 4_000, batch_size=64)
        self.width = 32 if small else 256

    @abstractmethod
    def targets(self, sequences: torch.Tensor) -> torch.Tensor:
        """A bit for each symbol, int64 ``[N, T]`` both."""

    def make_model(self) -> nn.Module:
        return _Recurrent(self.symbols, self.width, self.kind)


class XorRNN(_Rule):
    """The parity of all bits so far, with a gated recurrent network; longer than in training."""

    name = "xor_rnn"
    symbols, kind = 2, nn.GRU
    lengths: ClassVar[dict[Size, int]] = {"small": 12, "full": 18}

    def targets(self, sequences: torch.Tensor) -> torch.Tensor:
        return sequences.cumsum(1) % 2


class AdditionRNN(_Rule):
    """Digits of the sum of two binary numbers, smallest first, with a plain recurrent network.

    A symbol is a pair of digits; the last carry is left out.
    """

    name = "addition_rnn"
    symbols, kind = 4, nn.RNN
    lengths: ClassVar[dict[Size, int]] = {"small": 6, "full": 9}

    def targets(self, sequences: torch.Tensor) -> torch.Tensor:
        place = 2 ** torch.arange(sequences.shape[1])
        total = ((sequences % 2 + sequences // 2) * place).sum(1, keepdim=True)
        return total // place % 2


def _order(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))
