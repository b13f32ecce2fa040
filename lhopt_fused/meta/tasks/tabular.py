"""Predicting columns of small real tables with MLPs."""

from __future__ import annotations

import torch

from lhopt_fused.meta.tasks.base import TaskFamily
from lhopt_fused.meta.tasks.data import TABLES, load_table
from lhopt_fused.meta.tasks.mlp import random_mlp
from lhopt_fused.meta.tasks.seeded import architecture_random, task_seeds
from lhopt_fused.meta.tasks.supervised import (
    SupervisedTasks,
    affordable_batch,
    choose_examples,
    random_conditions,
    random_loss,
)

__all__ = ["TabularFamily"]


class TabularFamily(TaskFamily):
    """Scikit-learn's wine, breast cancer (classes) and diabetes (a number) with MLPs.

    A batch shares the table, a network of :func:`random_mlp`, loss, dropout or not, and a batch
    size of 8 to 32. Each task has its own split (a fifth for each held-out one), training size (24
    rows to the rest), noise, dropout rate and gain. About 5 to 50 us a step.
    """

    name = "tabular"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> SupervisedTasks:
        """Draw table, network and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        pool = load_table(generator.choice(TABLES)).to(seeds.device)
        network = random_mlp(generator, pool.inputs.shape[1], pool.outputs)
        conditions = random_conditions(seeds, generator)
        examples = choose_examples(
            seeds,
            pool.inputs,
            pool.targets,
            held_out=pool.inputs.shape[0] // 5,
            smallest=24,
            noise=conditions["label_noise"],
            classes=pool.outputs,
        )
        return SupervisedTasks(
            self.name,
            seeds,
            network,
            examples,
            loss="squared_error" if pool.targets.is_floating_point() else random_loss(generator),
            batch_size=affordable_batch(generator, network.products, 8, 32),
            numbers=conditions,
        )
