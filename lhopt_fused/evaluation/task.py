"""What a task is to the evaluation: data in three splits, a model, a loss, and scores."""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Final, Literal

import torch
from torch import nn

__all__ = [
    "SIZES",
    "SPLITS",
    "Batch",
    "DataError",
    "Scores",
    "Size",
    "Split",
    "Task",
    "epochs",
    "find_data",
    "find_package",
]

Size = Literal["small", "full"]
SIZES: Final[tuple[Size, ...]] = ("small", "full")
"""``small`` is for CPUs, a run in less than a minute; ``full`` is for a GPU."""

Split = Literal["policy_eval", "report"]
SPLITS: Final[tuple[Split, ...]] = ("policy_eval", "report")
"""What is not trained on: ``policy_eval`` is shown to policies, and configurations are chosen by
it; ``report`` is only ever reported. No example is in two of them, or in one and in training."""

Batch = tuple[torch.Tensor, ...]
"""Tensors with the examples along their first dimension."""


class DataError(Exception):
    """Data that is missing or damaged; says which, what was expected and where to get it."""


def find_package(name: str, who_needs: str) -> ModuleType:
    """A package that one task alone takes; ``who_needs`` begins the sentence that it is missing.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{who_needs} the package {name} ({error}); run: pip install 'lhopt-fused[eval]'"
        ) from error


@dataclass(frozen=True)
class Scores:
    """How a model does on some data.

    Attributes:
        loss: mean over the examples.
        metrics: by name, means too.
    """

    loss: float
    metrics: Mapping[str, float]


class Task(ABC):
    """A task with its data, at one size; each kind is made of a size and a folder with data.

    Args:
        training: what batches are made of.
        held_out: the two other splits.
        steps: optimizer steps of a run at budget 1.
        batch_size: examples in a batch.

    Attributes:
        name: on the command line and in the store.
        metric: the one among the metrics of :meth:`scores` that is reported.
        higher_is_better: whether of that metric more is better.
        eval_batch_size: examples that are scored at once.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    eval_batch_size: ClassVar[int] = 256

    def __init__(
        self, training: Batch, held_out: Mapping[Split, Batch], *, steps: int, batch_size: int
    ) -> None:
        self.training = training
        self.held_out = dict(held_out)
        self.steps = steps
        self.batch_size = batch_size

    @abstractmethod
    def make_model(self) -> nn.Module:
        """A fresh model, on the CPU; random numbers are torch's global ones.

        A module called ``head`` gives the output, for optimizers that treat it otherwise.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean loss over a batch, 0-dim."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        """How a model, in evaluation mode and without gradients, does on held-out examples."""

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """Batches of the training split without end; random numbers are the generator's."""
        for picked in epochs(len(self.training[0]), self.batch_size, generator):
            yield tuple(tensor[picked] for tensor in self.training)

    def stream(self, model: nn.Module, generator: torch.Generator) -> Iterator[Batch]:
        """Batches for a run without end; only where they are what the model does, it matters.

        Args:
            model: in training mode, on any device; batches are on the CPU.
            generator: as for :meth:`batches`.
        """
        return self.batches(generator)

    def evaluate(self, model: nn.Module, split: Split, at_most: int | None = None) -> Scores:
        """How a model does on a split; leaves its mode as it was.

        Args:
            model: in any mode, on any device.
            split: what it is tried on.
            at_most: only so many examples, always the same, spread over the split.
        """
        data = self.held_out[split]
        count = len(data[0])
        if at_most is not None and at_most < count:
            rows = torch.linspace(0, count - 1, at_most).long()
            data = tuple(tensor[rows] for tensor in data)
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        parts = []
        try:
            with torch.no_grad():
                for chunk in zip(
                    *(torch.split(t, self.eval_batch_size) for t in data), strict=True
                ):
                    found = self.scores(model, tuple(tensor.to(device) for tensor in chunk))
                    parts.append((len(chunk[0]), found))
        finally:
            model.train(was_training)
        return _mean(parts)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of all that runs are made of: tensors, batch size and steps."""
        digest = hashlib.sha256(repr((self.name, self.steps, self.batch_size)).encode())
        for part in (self.training, *(self.held_out[split] for split in SPLITS)):
            for tensor in part:
                digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def find_data(what: str, places: Sequence[Path], source: str) -> Path:
    """The first of ``places`` that exists.

    Raises:
        DataError: none does.
    """
    for place in places:
        if place.exists():
            return place
    where = f"expected {' or '.join(map(str, places))}" if places else "give --data-dir"
    raise DataError(f"{what} not found: {where}; get it from {source}")


def epochs(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices of batches, int64 ``[size]``, without end: every example once before any again.

    What is left over at the end of a permutation is left out.

    Raises:
        DataError: there are fewer examples than a batch has.
    """
    if count < size:
        raise DataError(f"there are {count} training examples, expected at least a batch, {size}")
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].view(-1, size)


def _mean(parts: Sequence[tuple[int, Scores]]) -> Scores:
    """Means over parts, each with its number of examples."""
    total = sum(count for count, _ in parts)
    names = parts[0][1].metrics
    return Scores(
        sum(count * part.loss for count, part in parts) / total,
        {name: sum(n * part.metrics[name] for n, part in parts) / total for name in names},
    )
