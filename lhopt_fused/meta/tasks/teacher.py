"""Imitating random networks: regression and classification."""

from __future__ import annotations

import torch

from lhopt_fused.meta.tasks.base import TaskFamily
from lhopt_fused.meta.tasks.layers import draw_parameters
from lhopt_fused.meta.tasks.mlp import MLP, random_mlp
from lhopt_fused.meta.tasks.seeded import (
    architecture_random,
    task_seeds,
    uniform_numbers,
)
from lhopt_fused.meta.tasks.supervised import (
    SupervisedTasks,
    affordable_batch,
    random_conditions,
    random_loss,
)
from lhopt_fused.meta.tasks.synthetic import (
    HELD_OUT,
    NOISE_WIDTH,
    deal_examples,
    shared_normals,
    shared_rows,
)

__all__ = ["TeacherFamily"]

_LARGEST = 1024  # examples to train on


class TeacherFamily(TaskFamily):
    """Students of random MLPs with one or two hidden layers, on normal inputs.

    A batch shares 4 to 32 inputs, 1 to 8 outputs, numbers or classes, the shapes of teacher and
    student (:func:`random_mlp`), loss, dropout or not, and a batch size of 8 to 32. Each task has
    its own teacher (gain 1 to 3), 64 to 1024 examples, noise, dropout rate and gain. About 5 to
    60 us a step.
    """

    name = "teacher"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> SupervisedTasks:
        """Draw teachers, student and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        inputs, classify = generator.randint(4, NOISE_WIDTH), generator.random() < 0.5
        outputs = generator.randint(2, 8) if classify else generator.randint(1, 4)
        network = random_mlp(generator, inputs, outputs)
        widths = (generator.randint(4, 16),) * generator.randint(1, 2)
        conditions = random_conditions(seeds, generator, dropout=0.15)
        pool = shared_normals(seeds.device)[:, :inputs].contiguous()
        rows = shared_rows(seeds, _LARGEST + 2 * HELD_OUT)
        targets = self._targets(MLP(inputs, widths, outputs, "tanh", "none"), seeds, pool[rows])
        examples = deal_examples(
            seeds,
            pool,
            rows,
            targets.argmax(dim=2) if classify else targets,
            smallest=64,
            noise=conditions["label_noise"],
            classes=outputs,
        )
        return SupervisedTasks(
            self.name,
            seeds,
            network,
            examples,
            loss=random_loss(generator) if classify else "squared_error",
            batch_size=affordable_batch(generator, network.products, 8, 32),
            numbers=conditions,
        )

    @staticmethod
    def _targets(teacher: MLP, seeds: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """What each task's teacher says, standardised, float32 ``[R, n, C]``."""
        gain = 1.0 + 2.0 * uniform_numbers(seeds, 31, 1)[:, 0].to(torch.float32)
        params = draw_parameters(teacher.parameters, ~seeds, gain)  # not the student's weights
        said = teacher.forward(params, inputs, None)
        deviation, mean = torch.std_mean(said, dim=1, keepdim=True)
        return (said - mean) / deviation
