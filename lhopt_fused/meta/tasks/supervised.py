"""Supervised tasks: a stacked network, and for each task its own examples out of a common pool."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lhopt_fused.meta.tasks.base import Split
from lhopt_fused.meta.tasks.layers import (
    Dropout,
    Loss,
    Parameter,
    draw_parameters,
    losses,
    parameter_count,
)
from lhopt_fused.meta.tasks.seeded import (
    SeededTasks,
    log_uniform,
    random_orders,
    step_uniforms,
    uniform_numbers,
)

__all__ = [
    "Examples",
    "Network",
    "NetworkTasks",
    "SupervisedTasks",
    "affordable_batch",
    "choose_examples",
    "noisy_targets",
    "random_conditions",
    "random_loss",
]


class Network(ABC):
    """An architecture, as a function of stacked parameters."""

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, Parameter]:
        """The tensors of one task, by name."""

    @abstractmethod
    def forward(
        self, params: Mapping[str, torch.Tensor], inputs: torch.Tensor, dropout: Dropout | None
    ) -> torch.Tensor:
        """Outputs ``[R, N, C]`` for the examples ``[R, B, ...]``; no dropout if None."""

    def numbers(self) -> dict[str, float]:
        """Its entries of ``TaskBatch.describe``."""
        return {}


@dataclass(frozen=True)
class Examples:
    """Which examples of a pool are whose.

    Attributes:
        pool: inputs ``[P, ...]`` that the tasks share.
        rows: ``train``, ``eval`` and ``report`` to rows of the pool, int64 ``[R, n]``; within a
            task the three are disjoint.
        targets: by the same names, classes int64 ``[R, n]`` or ``[R, n, T]``, or numbers float32
            ``[R, n, C]``.
        sizes: int64 ``[R]``: how many of its training examples each task uses.
    """

    pool: torch.Tensor
    rows: Mapping[str, torch.Tensor]
    targets: Mapping[str, torch.Tensor]
    sizes: torch.Tensor


def choose_examples(
    seeds: torch.Tensor,
    pool: torch.Tensor,
    targets: torch.Tensor,
    *,
    held_out: int,
    smallest: int,
    noise: torch.Tensor,
    classes: int,
) -> Examples:
    """Deal a common pool to each task at random: held-out splits, and a training set of any size.

    Args:
        seeds: int64 ``[R]``.
        pool: ``[P, ...]``.
        targets: of the pool, classes int64 ``[P]`` or ``[P, T]``, or numbers float32 ``[P, C]``.
        held_out: examples in each of the two held-out splits.
        smallest: the smallest training set; sizes are log-uniform up to what is left.
        noise: ``[R]``: share of the training labels that are replaced by random classes; for
            numbers, the standard deviation of the noise on them.
        classes: number of classes; without meaning for numbers.
    """
    order = random_orders(seeds, 10, pool.shape[0])
    largest = pool.shape[0] - 2 * held_out
    rows = {
        "eval": order[:, :held_out],
        "report": order[:, held_out : 2 * held_out],
        "train": order[:, 2 * held_out :],
    }
    chosen = {name: targets[index] for name, index in rows.items()}
    share = uniform_numbers(seeds, 11, 1)[:, 0]
    sizes = (smallest * (largest / smallest) ** share).round().to(torch.int64)
    chosen["train"] = noisy_targets(seeds, chosen["train"], noise, classes)
    return Examples(pool, rows, chosen, sizes)


def noisy_targets(
    seeds: torch.Tensor, targets: torch.Tensor, noise: torch.Tensor, classes: int
) -> torch.Tensor:
    """Targets ``[R, n]``, ``[R, n, T]`` or ``[R, n, C]`` with each task's noise, as it is described
    in :func:`choose_examples`."""
    count = math.prod(targets.shape[1:])
    if targets.is_floating_point():
        centred = 2.0 * uniform_numbers(seeds, 12, count).to(torch.float32) - 1.0
        scale = math.sqrt(3.0) * noise.to(torch.float32).view(-1, 1, 1)
        return targets + scale * centred.view(targets.shape)
    replaced = (uniform_numbers(seeds, 12, count) < noise[:, None]).view(targets.shape)
    other = (uniform_numbers(seeds, 13, count) * classes).to(torch.int64)
    return torch.where(replaced, other.view(targets.shape), targets)


def random_loss(generator: random.Random) -> Loss:
    """A loss for classes: cross entropy for three batches in five."""
    return generator.choice(("cross_entropy",) * 3 + ("squared_error", "hinge"))


def random_conditions(
    seeds: torch.Tensor, generator: random.Random, *, dropout: float = 0.3, noise: float = 0.4
) -> dict[str, torch.Tensor]:
    """What differs from task to task, float ``[R]`` by the names of ``TaskBatch.describe``.

    The gain of the starting weights is log-uniform in 0.6 to 1.6; half of the tasks have noise on
    their labels.

    Args:
        seeds: int64 ``[R]``.
        generator: of the architecture.
        dropout: how likely the batch drops activations; rates are 0.05 to 0.5.
        noise: the most noise, see :func:`choose_examples`.
    """
    drawn = uniform_numbers(seeds, 14, 3)
    conditions = {
        "log_initial_scale": (2.0 * drawn[:, 0] - 1.0) * math.log(1.6),
        "label_noise": noise * (2.0 * drawn[:, 1] - 1.0).clamp_min(0.0),
    }
    if generator.random() < dropout:
        conditions["dropout"] = 0.05 + 0.45 * drawn[:, 2]
    return conditions


def affordable_batch(
    generator: random.Random, products: float, low: int, high: int, budget: float = 2.5e5
) -> int:
    """A batch size, log-uniform, whose step stays within a budget.

    Args:
        generator: of the architecture.
        products: multiplications of one example in the forward pass.
        low, high: the range; the budget may go below ``low``, not below 4.
        budget: multiplications of a forward pass over the batch.
    """
    return max(4, min(round(log_uniform(generator, low, high)), int(budget / products)))


class NetworkTasks(SeededTasks):
    """Tasks that train a stacked network on examples.

    Args:
        family: name of the family.
        seeds: int64 ``[R]``.
        table: as in ``SeededTasks``; ``sizes``, int64 ``[R]``, is how much data each task has.
        network: what to train.
        batch_size: examples in a minibatch.
        numbers: float ``[R]`` by their names in ``TaskBatch.describe``; ``log_initial_scale`` is
            the gain of the starting weights, ``dropout`` the rate (no dropout if it is not there).
    """

    def __init__(
        self,
        family: str,
        seeds: torch.Tensor,
        table: Mapping[str, torch.Tensor],
        *,
        network: Network,
        batch_size: int,
        numbers: Mapping[str, torch.Tensor],
    ) -> None:
        own = {f"numbers/{name}": value.to(torch.float32) for name, value in numbers.items()}
        super().__init__(family, seeds, {**table, **own})
        self.network = network
        self.batch_size = batch_size

    def init(self) -> dict[str, torch.Tensor]:
        """Uniform weights with each task's gain, biases 0, scales of normalisations 1."""
        gain = self.table["numbers/log_initial_scale"].exp()
        return draw_parameters(self.network.parameters, self.seeds, gain)

    def dropout(self, step: int) -> Dropout | None:
        """What drops activations in training step number ``step``, if anything."""
        rates = self.table.get("numbers/dropout")
        return None if rates is None else Dropout(self.seeds, step, rates)

    def numbers(self) -> dict[str, float | torch.Tensor]:
        """Sizes, noise, and what the network says of itself."""
        numbers: dict[str, float | torch.Tensor] = {
            "log_parameters": math.log(parameter_count(self.network.parameters)),
            "log_batch_size": math.log(self.batch_size),
            "log_examples": self.table["sizes"].log(),
        }
        own = {
            name.removeprefix("numbers/"): value
            for name, value in self.table.items()
            if name.startswith("numbers/")
        }
        return numbers | self.network.numbers() | own


class SupervisedTasks(NetworkTasks):
    """Minibatches with replacement out of each task's training examples.

    Args:
        family, seeds, network, batch_size, numbers: as in :class:`NetworkTasks`.
        examples: what to train and to be judged on.
        loss: what is minimised, on held-out data too.
        input_scale: float ``[R]``, what the inputs are multiplied by, if anything.
    """

    def __init__(
        self,
        family: str,
        seeds: torch.Tensor,
        network: Network,
        examples: Examples,
        *,
        loss: Loss,
        batch_size: int,
        numbers: Mapping[str, torch.Tensor],
        input_scale: torch.Tensor | None = None,
    ) -> None:
        table = {f"rows/{name}": rows for name, rows in examples.rows.items()}
        table |= {f"targets/{name}": targets for name, targets in examples.targets.items()}
        table["sizes"] = examples.sizes
        if input_scale is not None:
            table["input_scale"] = input_scale.to(torch.float32)
        super().__init__(
            family, seeds, table, network=network, batch_size=batch_size, numbers=numbers
        )
        self.pool = examples.pool
        self.loss = loss

    def draw(self, chunk: int) -> torch.Tensor:
        """Which training examples the minibatches hold, int64 ``[CHUNK, R, B]``."""
        uniform = step_uniforms(self.seeds, chunk, self.batch_size)
        return (uniform * self.table["sizes"][:, None]).to(torch.int64)

    def train_loss(self, params: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        """The loss on minibatch number ``step``, with dropout."""
        index = self.drawn(step)
        rows = self.table["rows/train"].gather(1, index)
        targets = self.table["targets/train"]
        if targets.ndim == 3:
            targets = targets.gather(1, index[..., None].expand(-1, -1, targets.shape[2]))
        else:
            targets = targets.gather(1, index)
        outputs = self.network.forward(params, self._inputs(rows), self.dropout(step))
        return losses(outputs, targets, self.loss)

    def eval_loss(self, params: Mapping[str, torch.Tensor], split: Split) -> torch.Tensor:
        """The loss on a held-out split."""
        inputs = self._inputs(self.table[f"rows/{split}"])
        outputs = self.network.forward(params, inputs, None)
        return losses(outputs, self.table[f"targets/{split}"], self.loss)

    def _inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the pool, ``[R, B, ...]``."""
        inputs = self.pool.index_select(0, rows.flatten()).view(*rows.shape, *self.pool.shape[1:])
        scale = self.table.get("input_scale")
        return inputs if scale is None else inputs * scale.view(-1, *[1] * (inputs.ndim - 1))

    def numbers(self) -> dict[str, float | torch.Tensor]:
        """As :class:`NetworkTasks`, and the kind of loss."""
        return {**super().numbers(), self.loss: 1.0}
