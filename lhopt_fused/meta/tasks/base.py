"""What an inner task of meta-training is: R tasks of one architecture, run as one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import torch

__all__ = ["PRIVILEGED", "PRIVILEGED_NAMES", "Split", "TaskBatch", "TaskFamily"]

Split = Literal["eval", "report"]
"""The held-out data: ``eval`` may be shown to a policy, ``report`` is what results are taken on."""

_NUMBERS: Final = (
    "log_parameters",
    "log_batch_size",
    "log_examples",
    "log_inputs",
    "log_outputs",
    "log_width",
    "log_length",
    "depth",
    "log_initial_scale",
    "log_curvature",
    "gradient_noise",
    "label_noise",
    "dropout",
    "cross_entropy",
    "squared_error",
    "hinge",
    "layer_norm",
    "batch_norm",
    "rnn",
    "gru",
    "lstm",
)
_FAMILIES: Final = (
    "quadratic",
    "xor",
    "addition",
    "image_mlp",
    "image_cnn",
    "text_rnn",
    "transformer",
    "teacher",
    "clusters",
    "tabular",
)

PRIVILEGED_NAMES: Final = (*_NUMBERS, *(f"family_{name}" for name in _FAMILIES))
"""The columns of :meth:`TaskBatch.describe`; logarithms are natural, what does not apply is 0."""

PRIVILEGED: Final = len(PRIVILEGED_NAMES)


class TaskBatch(ABC):
    """R tasks of one architecture; every tensor of data or parameters has the task as its first
    dimension.

    A task is a pure function of its own seed: its data, start, minibatches and losses do not depend
    on its neighbours or its position, up to rounding, and a NaN in one task stays there.

    Attributes:
        family: name of the family that it was drawn from.
        runs: R.
        device: where its tensors are.
    """

    family: str
    runs: int
    device: torch.device

    @abstractmethod
    def init(self) -> dict[str, torch.Tensor]:
        """Fresh parameters, float32 ``[R, *shape]``, a pure function of each task's seed."""

    @abstractmethod
    def train_loss(self, params: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        """Loss of each task on its minibatch number ``step``, without a device synchronisation.

        Args:
            params: tensors as :meth:`init` gives them.
            step: at least 0; with the task's seed it decides the minibatch and the dropout.

        Returns:
            float32 ``[R]``, positive unless it diverged, differentiable in ``params``. The gradient
            of its sum is the gradient of each task's own loss.
        """

    @abstractmethod
    def eval_loss(self, params: Mapping[str, torch.Tensor], split: Split) -> torch.Tensor:
        """Loss of each task on the whole of one of its two disjoint held-out splits, float32
        ``[R]``, without dropout or any other randomness."""

    @abstractmethod
    def select(self, index: torch.Tensor) -> TaskBatch:
        """Tasks by index, int64 ``[S]``, which may repeat: for several settings on one task."""

    @abstractmethod
    def again(self, number: int) -> TaskBatch:
        """The same tasks, data and all, begun anew: with other minibatches, dropout and random
        weights.

        Args:
            number: 1 or more; each begins in another way.
        """

    def describe(self) -> torch.Tensor:
        """Numbers that only a critic sees, float32 ``[R, PRIVILEGED]``, see
        :data:`PRIVILEGED_NAMES`."""
        table = torch.zeros(self.runs, PRIVILEGED, device=self.device)
        numbers: dict[str, float | torch.Tensor] = dict(self.numbers())
        if self.family in _FAMILIES:
            numbers[f"family_{self.family}"] = 1.0
        for name, value in numbers.items():
            table[:, PRIVILEGED_NAMES.index(name)] = value
        return table

    def numbers(self) -> Mapping[str, float | torch.Tensor]:
        """Entries of :meth:`describe` by name, each one number or a tensor ``[R]``."""
        return {}


class TaskFamily(ABC):
    """A distribution of tasks.

    Args:
        data_dir: a folder with more data: ``images/CLASS/*.{png,jpg,jpeg}``, ``text/*.txt``, or
            both. Families that need neither take it all the same.

    Raises:
        FileNotFoundError: ``data_dir`` has neither ``images`` nor ``text``.
    """

    name: str

    def __init__(self, data_dir: Path | None = None) -> None:
        kinds = ("images", "text")
        if data_dir is not None and not any((data_dir / kind).is_dir() for kind in kinds):
            raise FileNotFoundError(
                f"{data_dir} has no folder images or text; expected {data_dir}/images/CLASS/*.png "
                f"(or .jpg), {data_dir}/text/*.txt, or both"
            )
        self.data_dir = data_dir

    @abstractmethod
    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> TaskBatch:
        """Draw one architecture and ``runs`` tasks of it.

        Data, label noise, initial scale and seeds are each task's own.

        Args:
            seed: 0 to 2**63 - 1; equal seeds give equal tasks.
            runs: R, at least 1; the first tasks of a larger batch are those of a smaller one.
            device: where the tasks live.

        Raises:
            ValueError: a bad ``seed`` or ``runs``.
            ModuleNotFoundError, FileNotFoundError: data that is missing; names the package or path.
        """
