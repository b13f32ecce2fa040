"""Adding two binary numbers, digit by digit."""

from __future__ import annotations

import torch

from lhopt_fused.meta.tasks.base import TaskFamily
from lhopt_fused.meta.tasks.seeded import architecture_random, task_seeds
from lhopt_fused.meta.tasks.sequences import digits, rule_tasks
from lhopt_fused.meta.tasks.supervised import SupervisedTasks

__all__ = ["AdditionFamily"]


class AdditionFamily(TaskFamily):
    """Sums of two numbers of 3 to 5 bits, smallest digit first, with recurrent networks.

    A symbol is a pair of digits, and the target the digit of the sum, the last carry included; the
    rest is drawn as in ``xor``. About 15 to 125 us a step.
    """

    name = "addition"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> SupervisedTasks:
        """Draw length, network and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        length = generator.randint(3, 5)
        pairs = torch.nn.functional.pad(digits(4, length), (0, 1))
        place = 2 ** torch.arange(length + 1)
        total = ((pairs % 2 + pairs // 2) * place).sum(dim=1, keepdim=True)
        return rule_tasks(self.name, seeds, generator, pairs, total // place % 2, symbols=4)
