"""Tasks as pure functions of their seeds: counter-based draws and tables with a row per task."""

from __future__ import annotations

import copy
import math
import random
from abc import abstractmethod
from typing import Final

import torch

from lhopt_fused.meta.tasks.base import TaskBatch
from lhopt_fused.policy.decision import check_seed, uniform

__all__ = [
    "CHUNK",
    "SeededTasks",
    "architecture_random",
    "log_uniform",
    "normal_numbers",
    "random_orders",
    "step_normals",
    "step_uniforms",
    "task_seeds",
    "uniform_numbers",
]

CHUNK: Final = 64
"""Steps whose random numbers are drawn together."""

_AGAIN: Final = -(2**32)  # far from the keys of draws and steps


def architecture_random(name: str, seed: int) -> random.Random:
    """The generator of what all tasks of a batch share, keyed by the family and the seed."""
    return random.Random(f"{name}/{seed}")


def log_uniform(generator: random.Random, low: float, high: float) -> float:
    """A number between ``low`` and ``high``, uniform in its logarithm."""
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def task_seeds(seed: int, runs: int, device: torch.device | str) -> torch.Tensor:
    """Seeds of the tasks of a batch, int64 ``[runs]``, each a function of ``seed`` and position.

    Raises:
        ValueError: a seed out of range or no runs.
    """
    check_seed(seed)
    if runs < 1:
        raise ValueError(f"runs is {runs}, expected at least 1 task in a batch")
    position = torch.arange(runs, device=device)
    drawn = uniform(torch.full_like(position, seed), position, torch.zeros_like(position))
    return (drawn * 2.0**53).to(torch.int64)


def uniform_numbers(seeds: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """``count`` uniform numbers in [0, 1) for each task, float64 ``[R, count]``.

    Args:
        seeds: int64 ``[R]``.
        stream: what they are for; the numbers of different streams are independent.
        count: how many.
    """
    # negative keys, so that they never meet the keys of training steps
    key = torch.full_like(seeds[:1, None], -1 - stream)
    return uniform(seeds[:, None], key, torch.arange(count, device=seeds.device)[None])


def normal_numbers(seeds: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """``count`` standard normal numbers for each task, float64 ``[R, count]``."""
    return _box_muller(uniform_numbers(seeds, stream, 2 * count))


def _box_muller(pairs: torch.Tensor) -> torch.Tensor:
    """Uniform numbers ``[..., 2 n]`` to normal ones ``[..., n]``."""
    radius, angle = pairs.chunk(2, dim=-1)
    return (-2.0 * (1.0 - radius).log()).sqrt() * (2.0 * math.pi * angle).cos()


def random_orders(seeds: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """A random order of ``count`` things for each task, int64 ``[R, count]``."""
    return uniform_numbers(seeds, stream, count).argsort(dim=1)


def step_uniforms(seeds: torch.Tensor, chunk: int, count: int) -> torch.Tensor:
    """``count`` uniform numbers for each task and each step of a chunk, float64
    ``[CHUNK, R, count]``."""
    steps = torch.arange(chunk * CHUNK, (chunk + 1) * CHUNK, device=seeds.device)
    heads = torch.arange(count, device=seeds.device)
    return uniform(seeds[None, :, None], steps[:, None, None], heads[None, None])


def step_normals(seeds: torch.Tensor, chunk: int, count: int) -> torch.Tensor:
    """As :func:`step_uniforms`, standard normal."""
    return _box_muller(step_uniforms(seeds, chunk, 2 * count))


class SeededTasks(TaskBatch):
    """Tasks whose own tensors lie in one table, so that selecting tasks is selecting rows.

    Args:
        family: name of the family.
        seeds: int64 ``[R]``.
        table: tensors ``[R, ...]`` by name; whatever is not in it is common to all tasks.
    """

    def __init__(self, family: str, seeds: torch.Tensor, table: dict[str, torch.Tensor]) -> None:
        self.family = family
        self.runs = seeds.shape[0]
        self.device = seeds.device
        self.seeds = seeds
        self.table = table
        self._chunk = -1
        self._drawn = seeds.new_zeros(0)

    def select(self, index: torch.Tensor) -> SeededTasks:
        """Tasks by index, int64 ``[S]``, which may repeat."""
        index = index.to(self.device)
        chosen = copy.copy(self)
        chosen.seeds = self.seeds[index]
        chosen.runs = chosen.seeds.shape[0]
        chosen.table = {name: rows[index] for name, rows in self.table.items()}
        chosen._chunk = -1
        return chosen

    def again(self, number: int) -> SeededTasks:
        """The same tasks with other seeds."""
        other = copy.copy(self)
        other.seeds = (uniform_numbers(self.seeds, _AGAIN - number, 1)[:, 0] * 2.0**53).long()
        other._chunk = -1
        return other

    def drawn(self, step: int) -> torch.Tensor:
        """The random numbers of minibatch number ``step``, ``[R, ...]``."""
        chunk, row = divmod(step, CHUNK)
        if chunk != self._chunk:
            self._drawn, self._chunk = self.draw(chunk), chunk
        return self._drawn[row]

    @abstractmethod
    def draw(self, chunk: int) -> torch.Tensor:
        """The random numbers of :data:`CHUNK` steps, ``[CHUNK, R, ...]``."""
