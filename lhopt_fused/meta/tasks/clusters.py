"""Telling gaussian clusters apart."""

from __future__ import annotations

import torch

from lhopt_fused.meta.tasks.base import TaskFamily
from lhopt_fused.meta.tasks.mlp import random_mlp
from lhopt_fused.meta.tasks.seeded import (
    architecture_random,
    normal_numbers,
    task_seeds,
    uniform_numbers,
)
from lhopt_fused.meta.tasks.supervised import (
    SupervisedTasks,
    affordable_batch,
    random_conditions,
    random_loss,
)
from lhopt_fused.meta.tasks.synthetic import HELD_OUT, NOISE_ROWS, deal_examples, shared_normals

__all__ = ["ClustersFamily"]

_LARGEST = 1024  # examples to train on
_WIDEST = 24  # inputs


class ClustersFamily(TaskFamily):
    """Mixtures of gaussians in 2 to 24 dimensions, one to four clusters to a class, with MLPs.

    A batch shares the dimensions, 2 to 10 classes, the number of clusters, a network of
    :func:`random_mlp`, loss, dropout or not, and a batch size of 8 to 32. Each task has its own
    centres, spread (0.2 to 1.2 of their distance from zero), 64 to 1024 examples, label noise,
    dropout rate and gain. About 5 to 50 us a step.
    """

    name = "clusters"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> SupervisedTasks:
        """Draw clusters, network and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        inputs, classes = generator.randint(2, _WIDEST), generator.randint(2, 10)
        clusters = classes * generator.randint(1, 4)
        network = random_mlp(generator, inputs, classes)
        conditions = random_conditions(seeds, generator, dropout=0.15)
        points, cluster = self._points(seeds, inputs, clusters)
        rows = torch.arange(points.shape[0] * points.shape[1], device=seeds.device)
        examples = deal_examples(
            seeds,
            points.flatten(0, 1),
            rows.view(points.shape[:2]),
            cluster % classes,
            smallest=64,
            noise=conditions["label_noise"],
            classes=classes,
        )
        return SupervisedTasks(
            self.name,
            seeds,
            network,
            examples,
            loss=random_loss(generator),
            batch_size=affordable_batch(generator, network.products, 8, 32),
            numbers=conditions,
        )

    @staticmethod
    def _points(
        seeds: torch.Tensor, inputs: int, clusters: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each task's points, float32 ``[R, n, D]``, and their clusters, int64 ``[R, n]``."""
        count = _LARGEST + 2 * HELD_OUT
        picked = uniform_numbers(seeds, 30, 2 * count)
        cluster = (picked[:, :count] * clusters).to(torch.int64)
        noise = shared_normals(seeds.device)[:, :inputs][(picked[:, count:] * NOISE_ROWS).long()]
        centres = normal_numbers(seeds, 31, clusters * inputs).to(torch.float32)
        centres = centres.view(-1, clusters, inputs)
        spread = (0.2 + uniform_numbers(seeds, 32, 1)).to(torch.float32)[:, :, None]
        own = centres.gather(1, cluster[..., None].expand(-1, -1, inputs))
        return own + spread * noise, cluster
