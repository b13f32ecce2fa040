"""Classification: cross-entropy and accuracy on inputs with one class each."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lhopt_fused.evaluation.task import Batch, Scores, Split, Task

__all__ = ["Classification", "hold_out"]


class Classification(Task):
    """Examples are inputs ``[N, ...]`` and classes, int64 ``[N]``, or ``[N, T]`` for sequences.

    Models give logits ``[N, C]`` or ``[N, C, T]``.
    """

    metric = "accuracy"

    def inputs(self, raw: torch.Tensor) -> torch.Tensor:
        """What the model is given, of what is stored."""
        return raw

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, classes = batch
        return F.cross_entropy(model(self.inputs(inputs)), classes)

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        inputs, classes = batch
        logits = model(self.inputs(inputs))
        accuracy = (logits.argmax(1) == classes).double().mean()
        return Scores(F.cross_entropy(logits, classes).item(), {"accuracy": accuracy.item()})


def hold_out(
    training: Batch, report: Batch, *, train: int, policy_eval: int, at_most: int
) -> tuple[Batch, dict[Split, Batch]]:
    """Take the policy's split out of the training data, and shuffle all once and for all.

    Args:
        training: the authors' training split.
        report: the authors' test split.
        train: examples to train on, at most.
        policy_eval: examples of the training split to show to policies, at most a fifth of it.
        at_most: examples of the test split to report on, at most.
    """
    count = len(training[0])
    held = min(policy_eval, count // 5)
    order = _shuffled(count)
    splits: dict[Split, Batch] = {
        "policy_eval": tuple(tensor[order[:held]] for tensor in training),
        "report": tuple(tensor[_shuffled(len(report[0]))[:at_most]] for tensor in report),
    }
    return tuple(tensor[order[held : held + train]] for tensor in training), splits


def _shuffled(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))
