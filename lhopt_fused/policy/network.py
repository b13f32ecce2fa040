"""The policy network: what meta-training trains, and what the extension's runner repeats in C++."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import nn

from lhopt_fused.actions import LARGEST_HEAD

__all__ = [
    "NORM_BETA",
    "NORM_CLIP",
    "NORM_EPSILON",
    "InputNormalisation",
    "LSTMState",
    "LayerNormLSTMCell",
    "NetworkShape",
    "PolicyNetwork",
    "ResidualHead",
]

NORM_BETA: Final = 0.999
NORM_EPSILON: Final = 1e-5
NORM_CLIP: Final = 2.0

_LAYER_NORM_EPSILON: Final = 1e-5
_WIDTH_STEP: Final = 16
_LARGEST_WIDTH: Final = 2048
_LARGEST_FEATURE_COUNT: Final = 4096
_MOST_HEADS: Final = 64


@dataclass(frozen=True)
class NetworkShape:
    """Sizes of a policy network.

    Attributes:
        features: length of the input.
        heads: logits per head.
        hidden: width of every layer; a multiple of 16, the floats in the widest vector register.
        head_hidden: width inside a head's residual block; a multiple of 16. All heads together
            then read less memory than the LSTM, which bounds the time of a decision.

    Raises:
        ValueError: naming the field that is out of range.
    """

    features: int
    heads: tuple[int, ...]
    hidden: int = 256
    head_hidden: int = 32

    def __post_init__(self) -> None:
        _check_range("features", self.features, _LARGEST_FEATURE_COUNT)
        for name in ("hidden", "head_hidden"):
            width = getattr(self, name)
            _check_range(name, width, _LARGEST_WIDTH)
            if width % _WIDTH_STEP:
                raise ValueError(f"{name} is {width}, expected a multiple of {_WIDTH_STEP}")
        if not 1 <= len(self.heads) <= _MOST_HEADS:
            raise ValueError(f"heads has {len(self.heads)} entries, expected 1 to {_MOST_HEADS}")
        for index, size in enumerate(self.heads):
            _check_range(f"heads[{index}]", size, LARGEST_HEAD)


def _check_range(name: str, value: int, largest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise ValueError(f"{name} is {value!r}, expected an integer from 1 to {largest}")


class LSTMState(NamedTuple):
    """Memory of the network; float32 ``[..., hidden]`` each."""

    h: torch.Tensor
    c: torch.Tensor


class InputNormalisation(nn.Module):
    """Normalises inputs by exponentially weighted statistics, clipped at 2 standard deviations.

    ``x <- clamp((x - mean) / sqrt(var + 1e-5), -2, 2)``. Each call in training mode first takes in
    the mean m and the variance s of its batch: ``r = (1 - beta) / (1 - beta^t); d = m - mean;
    mean += r d; var = (1 - r) (var + r d^2) + r s``, which is the bias-corrected average with
    decay beta, free of the cancellation of ``E[x^2] - E[x]^2``. In evaluation mode the statistics
    stay as they are.
    """

    mean: torch.Tensor  # [features]
    var: torch.Tensor  # [features]
    total_weight: torch.Tensor  # [], 1 - beta^t

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))
        self.register_buffer("total_weight", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., features]`` to the same shape."""
        if self.training:
            self.take_in(x)
        return self.normalise(x)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """By the statistics as they are, in either mode; ``[..., features]`` to the same shape."""
        scaled = (x - self.mean) * (self.var + NORM_EPSILON).rsqrt()
        return scaled.clamp(-NORM_CLIP, NORM_CLIP)

    @torch.no_grad()
    def take_in(self, batch: torch.Tensor) -> None:
        """Move the statistics by one batch, ``[..., features]``, in either mode."""
        batch = batch.flatten(0, -2)
        self.total_weight.mul_(NORM_BETA).add_(1.0 - NORM_BETA)
        rate = (1.0 - NORM_BETA) / self.total_weight
        var, mean = torch.var_mean(batch, dim=0, correction=0)
        delta = mean - self.mean
        self.mean.add_(rate * delta)
        self.var.copy_((1.0 - rate) * (self.var + rate * delta * delta) + rate * var)


class LayerNormLSTMCell(nn.Module):
    """An LSTM cell with layer normalisation (Ba, Kiros, Hinton 2016, arXiv 1607.06450, eq. 20-22).

    With LN the normalisation over the last dimension (biased variance, epsilon 1e-5)::

        (i, f, g, o) = LN(W_x x) * a_x + LN(W_h h) * a_h + b        4 hidden wide, normalised whole
        c <- sigmoid(f) * c + sigmoid(i) * tanh(g)
        h <- sigmoid(o) * tanh(LN(c) * a_c + b_c)

    The forget gate's part of b starts at 1, so that a fresh cell remembers.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(hidden, 4 * hidden, bias=False)
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)
        self.input_norm = nn.LayerNorm(4 * hidden, _LAYER_NORM_EPSILON)
        self.recurrent_norm = nn.LayerNorm(4 * hidden, _LAYER_NORM_EPSILON, bias=False)
        self.cell_norm = nn.LayerNorm(hidden, _LAYER_NORM_EPSILON)
        with torch.no_grad():
            self.input_norm.bias[hidden : 2 * hidden] = 1.0

    def forward(self, x: torch.Tensor, state: LSTMState) -> LSTMState:
        """``x`` is ``[..., hidden]``; the output is the new state's ``h``."""
        return self.recur(self.read(x), state)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The input's share of the gates, ``[..., 4 hidden]``: what needs no memory."""
        gates: torch.Tensor = self.input_norm(self.input(x))
        return gates

    def recur(self, read: torch.Tensor, state: LSTMState) -> LSTMState:
        """The new state from the input's share of the gates."""
        gates = read + self.recurrent_norm(self.recurrent(state.h))
        i, f, g, o = gates.chunk(4, dim=-1)
        c = f.sigmoid() * state.c + i.sigmoid() * g.tanh()
        return LSTMState(o.sigmoid() * self.cell_norm(c).tanh(), c)


class ResidualHead(nn.Module):
    """Logits of one action: ``V (y + W_2 relu(W_1 y + b_1) + b_2) + b``, W_1 a bottleneck."""

    def __init__(self, hidden: int, head_hidden: int, choices: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, head_hidden)
        self.up = nn.Linear(head_hidden, hidden)
        self.logits = nn.Linear(hidden, choices)
        nn.init.orthogonal_(self.logits.weight, 0.01)  # starts out nearly uniform
        nn.init.zeros_(self.logits.bias)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]`` to ``[..., choices]``."""
        logits: torch.Tensor = self.logits(y + self.up(self.down(y).relu()))
        return logits


class PolicyNetwork(nn.Module):
    """Policy features of one outer step, and memory, to logits of every head.

    Normalised input -> Linear + ReLU -> layer-norm LSTM -> Linear + ReLU -> one residual head per
    action; float32, over any leading batch dimensions.
    """

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        self.normalisation = InputNormalisation(shape.features)
        self.pre = nn.Linear(shape.features, shape.hidden)
        self.lstm = LayerNormLSTMCell(shape.hidden)
        self.post = nn.Linear(shape.hidden, shape.hidden)
        self.heads = nn.ModuleList(
            ResidualHead(shape.hidden, shape.head_hidden, choices) for choices in shape.heads
        )

    def initial_state(
        self, batch: Sequence[int] = (), device: torch.device | str = "cpu"
    ) -> LSTMState:
        """The memory at the start of a run: zeros."""
        zeros = torch.zeros(*batch, self.shape.hidden, device=device)
        return LSTMState(zeros, zeros.clone())

    def hidden(self, features: torch.Tensor, state: LSTMState) -> tuple[torch.Tensor, LSTMState]:
        """What the heads read, ``[..., hidden]``, and the new memory."""
        x = self.pre(self.normalisation(features)).relu()
        state = self.lstm(x, state)
        return self.post(state.h).relu(), state

    def forward(self, features: torch.Tensor, state: LSTMState) -> tuple[torch.Tensor, LSTMState]:
        """One outer step.

        Args:
            features: float32 ``[..., features]``.
            state: memory after the outer step before.

        Returns:
            Logits of all heads side by side, ``[..., sum(heads)]``, and the new memory.
        """
        y, state = self.hidden(features, state)
        return torch.cat([head(y) for head in self.heads], dim=-1), state
