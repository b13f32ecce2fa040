"""The parity of a sequence of bits."""

from __future__ import annotations

import torch

from lhopt_fused.meta.tasks.base import TaskFamily
from lhopt_fused.meta.tasks.seeded import architecture_random, task_seeds
from lhopt_fused.meta.tasks.sequences import digits, rule_tasks
from lhopt_fused.meta.tasks.supervised import SupervisedTasks

__all__ = ["XorFamily"]


class XorFamily(TaskFamily):
    """Parity of 4 to 10 bits, after every bit or only after the last, with recurrent networks.

    A batch shares length, kind of target, a network of ``random_recurrent`` and a batch size of 8
    to 32. Each task holds out its own eighths of all sequences (64 at most), trains on half to all
    of the others, half of the tasks with label noise up to 0.1. About 15 to 90 us a step.
    """

    name = "xor"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> SupervisedTasks:
        """Draw length, network and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        bits = digits(2, generator.randint(4, 10))
        parity = bits.cumsum(dim=1) % 2
        targets = parity if generator.random() < 0.7 else parity[:, -1]
        return rule_tasks(self.name, seeds, generator, bits, targets, symbols=2)
