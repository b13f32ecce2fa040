"""A noisy quadratic: the loss whose best schedule is known in theory, without any data."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import nn

from lhopt_fused.evaluation.task import Batch, Scores, Size, Split, Task

__all__ = ["NoisyQuadratic"]

_DRAWS: Final = 4_096


class _Point(nn.Module):
    """Where in the bowl a run is."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(dimensions))


class NoisyQuadratic(Task):
    """``0.5 sum(h (x - noise)^2)``, curvatures h from 1e-3 to 1; a batch is a few draws of noise.

    The three splits are draws of their own, so that what a policy sees is not what is reported.
    """

    name = "noisy_quadratic"
    metric = "distance"
    higher_is_better = False

    def __init__(self, size: Size, data_dir: Path | None = None) -> None:
        dimensions = 100 if size == "small" else 10_000
        generator = torch.Generator().manual_seed(0)
        count = 3 * _DRAWS // (1 if size == "small" else 8)
        draws = torch.randn(count, dimensions, generator=generator)
        training, policy_eval, report = draws.chunk(3)
        splits: dict[Split, Batch] = {"policy_eval": (policy_eval,), "report": (report,)}
        super().__init__((training,), splits, steps=500 if size == "small" else 5_000, batch_size=4)
        self.curvatures = torch.logspace(-3, 0, dimensions)

    def make_model(self) -> nn.Module:
        return _Point(len(self.curvatures))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        assert isinstance(model, _Point)
        curvatures = self.curvatures.to(model.position.device)
        away = model.position - batch[0]
        return 0.5 * (curvatures * away.square()).sum(-1).mean()

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        assert isinstance(model, _Point)
        return Scores(self.loss(model, batch).item(), {"distance": model.position.norm().item()})
