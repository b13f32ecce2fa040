"""Language models on characters: small causal transformers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from lhopt_fused.meta.tasks.base import Split, TaskFamily
from lhopt_fused.meta.tasks.layers import (
    ACTIVATIONS,
    Dropout,
    Parameter,
    embedding,
    layer_norm,
    linear,
    losses,
)
from lhopt_fused.meta.tasks.seeded import (
    architecture_random,
    step_uniforms,
    task_seeds,
    uniform_numbers,
)
from lhopt_fused.meta.tasks.supervised import (
    Network,
    NetworkTasks,
    affordable_batch,
    random_conditions,
)
from lhopt_fused.meta.tasks.text import SYMBOLS, training_text, user_text

__all__ = ["LanguageTasks", "Transformer", "TransformerFamily"]

_HELD_OUT = 16  # windows in each held-out split
_WINDOW_PRODUCTS = 2e5  # in the forward pass over one window, of drawn networks
_SMALL_FAN_IN = 2_500  # for a standard deviation of 0.02


@dataclass(frozen=True)
class Transformer(Network):
    """A causal transformer with learned positions.

    Attributes:
        context: symbols that it sees at most.
        width: of the residual stream, a multiple of ``heads``.
        depth: layers.
        heads: of the attention.
        hidden: width of the middle of the MLP.
        activation: of the MLP, a key of :data:`ACTIVATIONS`.
        norm_first: whether layer norms stand before attention and MLP, or after adding them.
        small_start: whether weights start as GPT-2's do, a standard deviation of 0.02, less where
            layers add up in the residual stream, with one matrix for embeddings and outputs; else
            as their inputs are many.
    """

    context: int
    width: int
    depth: int
    heads: int
    hidden: int
    activation: str
    norm_first: bool
    small_start: bool = False

    @property
    def products(self) -> int:
        """Multiplications of one window."""
        layer = self.width * (4 * self.width + 2 * self.hidden + 2 * self.context)
        return self.context * (self.depth * layer + self.width * SYMBOLS)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Embeddings, then attention, MLP and norms of each layer, then norm and linear layer."""
        width = self.width
        # else a standard deviation of one half for the sum of both
        embedded = _SMALL_FAN_IN if self.small_start else 8
        found = {
            "symbols": Parameter((SYMBOLS, width), fan_in=embedded),
            "positions": Parameter((self.context, width), fan_in=embedded),
        }
        for index in range(self.depth):
            found |= self._linear(f"{index}.attend", width, 3 * width)
            found |= _norm(f"{index}.attend", width)
            found |= self._linear(f"{index}.mix", width, width, adds_up=True)
            found |= self._linear(f"{index}.rise", width, self.hidden)
            found |= _norm(f"{index}.rise", width)
            found |= self._linear(f"{index}.fall", self.hidden, width, adds_up=True)
        found |= _norm("head", width)
        return found if self.small_start else found | self._linear("head", width, SYMBOLS)

    def _linear(
        self, name: str, inputs: int, outputs: int, adds_up: bool = False
    ) -> dict[str, Parameter]:
        fan_in = inputs
        if self.small_start:
            fan_in = _SMALL_FAN_IN * (2 * self.depth if adds_up else 1)
        weight = Parameter((inputs, outputs), fan_in=fan_in)
        return {f"{name}.weight": weight, f"{name}.bias": Parameter((outputs,))}

    def forward(
        self, params: Mapping[str, torch.Tensor], inputs: torch.Tensor, dropout: Dropout | None
    ) -> torch.Tensor:
        """Outputs ``[R, B T, SYMBOLS]`` for symbols ``[R, B, T]``."""
        runs, batch, length = inputs.shape
        stream = embedding(params["symbols"], inputs) + params["positions"][:, None, :length]
        stream = stream.view(runs, batch * length, self.width)
        for index in range(self.depth):
            stream = self._add(params, f"{index}.attend", stream, (batch, length), dropout)
            stream = self._add(params, f"{index}.rise", stream, (batch, length), dropout)
        stream = layer_norm(params, "head", stream)
        if self.small_start:
            return stream @ params["symbols"].transpose(1, 2)
        return linear(params, "head", stream)

    def _add(
        self,
        params: Mapping[str, torch.Tensor],
        name: str,
        stream: torch.Tensor,
        shape: tuple[int, int],
        dropout: Dropout | None,
    ) -> torch.Tensor:
        """The residual stream after one attention or MLP."""
        hidden = layer_norm(params, name, stream) if self.norm_first else stream
        hidden = linear(params, name, hidden)
        index, kind = name.split(".")
        if kind == "attend":
            hidden = linear(params, f"{index}.mix", self._attend(hidden, shape))
        else:
            hidden = linear(params, f"{index}.fall", ACTIVATIONS[self.activation](hidden))
        stream = stream + (hidden if dropout is None else dropout(hidden))
        return stream if self.norm_first else layer_norm(params, name, stream)

    def _attend(self, hidden: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Causal attention of queries, keys and values ``[R, B T, 3 W]``, side by side."""
        runs = hidden.shape[0]
        split = hidden.view(runs * shape[0], shape[1], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)  # [R B, heads, T, W / heads]
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return found.transpose(1, 2).reshape(runs, -1, self.width)

    def numbers(self) -> dict[str, float]:
        """Its sizes."""
        return {
            "layer_norm": 1.0,
            "cross_entropy": 1.0,
            "log_inputs": math.log(SYMBOLS),
            "log_outputs": math.log(SYMBOLS),
            "log_width": math.log(self.width),
            "log_length": math.log(self.context),
            "depth": float(self.depth),
        }


def _norm(name: str, width: int) -> dict[str, Parameter]:
    return {f"{name}.scale": Parameter((width,), start=1.0), f"{name}.shift": Parameter((width,))}


class LanguageTasks(NetworkTasks):
    """Predicting the next symbol: each task has its own stretch of a text, the training part first
    and the two held-out splits behind it.

    Args:
        family, seeds, batch_size, numbers: as in ``NetworkTasks``.
        network: the language model.
        text: uint8 ``[characters]``.
    """

    def __init__(
        self,
        family: str,
        seeds: torch.Tensor,
        network: Transformer,
        text: torch.Tensor,
        batch_size: int,
        numbers: Mapping[str, torch.Tensor],
    ) -> None:
        self.context = network.context
        self.text = text
        window = network.context + 1
        held_out = 2 * _HELD_OUT * window
        smallest, largest = 1000, min(60_000, (text.shape[0] - held_out) // 2)
        drawn = uniform_numbers(seeds, 20, 2)
        sizes = (smallest * (largest / smallest) ** drawn[:, 0]).to(torch.int64)
        first = (drawn[:, 1] * (text.shape[0] - held_out - sizes)).to(torch.int64)
        behind = window * torch.arange(2 * _HELD_OUT, device=seeds.device).view(1, 2, _HELD_OUT)
        table = {
            "first": first,  # [R]: where the training part begins
            "sizes": sizes,  # [R]: its characters
            "held_out": (first + sizes)[:, None, None] + behind,  # [R, 2, _HELD_OUT]: beginnings
        }
        super().__init__(
            family, seeds, table, network=network, batch_size=batch_size, numbers=numbers
        )

    def draw(self, chunk: int) -> torch.Tensor:
        """Where the windows of the minibatches begin, int64 ``[CHUNK, R, B]``."""
        uniform = step_uniforms(self.seeds, chunk, self.batch_size)
        places = (self.table["sizes"] - self.context)[:, None]
        return self.table["first"][:, None] + (uniform * places).to(torch.int64)

    def train_loss(self, params: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        """Cross entropy of the next symbol in minibatch number ``step``, with dropout."""
        return self._losses(params, self.drawn(step), self.dropout(step))

    def eval_loss(self, params: Mapping[str, torch.Tensor], split: Split) -> torch.Tensor:
        """Cross entropy of the next symbol on a held-out split."""
        begins = self.table["held_out"][:, ("eval", "report").index(split)]
        return self._losses(params, begins, None)

    def windows(self, begins: torch.Tensor) -> torch.Tensor:
        """Windows of ``context + 1`` symbols, int64 ``[R, B, context + 1]``."""
        places = begins[..., None] + torch.arange(self.context + 1, device=self.device)
        return self.text[places].long()

    def _losses(
        self, params: Mapping[str, torch.Tensor], begins: torch.Tensor, dropout: Dropout | None
    ) -> torch.Tensor:
        windows = self.windows(begins)
        outputs = self.network.forward(params, windows[..., :-1], dropout)
        return losses(outputs, windows[..., 1:].flatten(1), "cross_entropy")


@lru_cache(maxsize=4)
def _joined(kind: str, device: torch.device) -> torch.Tensor:
    """All of the documentation, or all of the modules."""
    chosen = [
        text
        for name, text in training_text().items()
        if name.startswith("topic ") == (kind == "topics")
    ]
    return torch.cat(chosen).to(device)


def random_transformer(generator: random.Random) -> Transformer:
    """One to three layers, 16 to 64 wide, narrower the deeper; a context of 8 to 48."""
    depth = generator.choice((1, 1, 2, 3))
    width = 8 * generator.randint(2, {1: 8, 2: 5, 3: 4}[depth])
    hidden = width * generator.choice((2, 2, 4))
    heads = generator.choice((1, 1, 2, 4))
    activation = generator.choice(("relu", "gelu", "silu"))
    small_start = generator.random() < 0.5
    norm_first = small_start or generator.random() < 0.75
    # four windows of it stay affordable
    a_symbol = depth * width * (4 * width + 2 * hidden) + width * SYMBOLS
    context = max(8, min(generator.randint(8, 48), int(_WINDOW_PRODUCTS / a_symbol)))
    return Transformer(context, width, depth, heads, hidden, activation, norm_first, small_start)


class TransformerFamily(TaskFamily):
    """Next characters of Python's documentation, of its modules, or of ``data_dir/text/*.txt``,
    with causal transformers.

    A batch shares text, a network of :func:`random_transformer`, dropout or not, and a batch size
    of 4 to 16 windows. Each task has its own stretch of the text (1,000 to 60,000 characters,
    log-uniform, and the held-out windows behind it), dropout rate and gain. About 60 to 250 us a
    step.
    """

    name = "transformer"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> LanguageTasks:
        """Draw text, network and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        network = random_transformer(generator)
        conditions = random_conditions(seeds, generator, dropout=0.15, noise=0.0)
        text = _joined(generator.choice(("topics", "modules")), seeds.device)
        if self.data_dir is not None and (self.data_dir / "text").is_dir():
            own = user_text(self.data_dir / "text", "*.txt").to(seeds.device)
            text = generator.choice((text, own))
        batch_size = affordable_batch(generator, network.products, 4, 16, budget=4e5)
        return LanguageTasks(self.name, seeds, network, text, batch_size, conditions)
