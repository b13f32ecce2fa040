"""What synthetic data sets are made of: inputs that all of them share, and splits of each task's
own examples."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch

from lhopt_fused.meta.tasks.seeded import normal_numbers, uniform_numbers
from lhopt_fused.meta.tasks.supervised import Examples, noisy_targets

__all__ = [
    "HELD_OUT",
    "NOISE_ROWS",
    "NOISE_WIDTH",
    "deal_examples",
    "shared_normals",
    "shared_rows",
]

NOISE_ROWS: Final = 8192
NOISE_WIDTH: Final = 32
HELD_OUT: Final = 64  # examples in each held-out split


@lru_cache(maxsize=4)
def shared_normals(device: torch.device) -> torch.Tensor:
    """Standard normal rows that every synthetic task draws from, float32
    ``[NOISE_ROWS, NOISE_WIDTH]``: cheaper than drawing anew for every task."""
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    numbers = normal_numbers(seed, 0, NOISE_ROWS * NOISE_WIDTH)
    return numbers.view(NOISE_ROWS, NOISE_WIDTH).to(torch.float32)


def shared_rows(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` distinct rows of :func:`shared_normals` for each task, int64 ``[R, count]``."""
    walk = (uniform_numbers(seeds, 30, 2) * NOISE_ROWS).to(torch.int64)
    # an odd stride visits every row of a power of two before it returns
    stride = 2 * walk[:, 1:] + 1
    return (walk[:, :1] + stride * torch.arange(count, device=seeds.device)) % NOISE_ROWS


def deal_examples(
    seeds: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    *,
    smallest: int,
    noise: torch.Tensor,
    classes: int,
) -> Examples:
    """Each task's own examples: two held-out splits first, the rest to train on.

    Args:
        seeds: int64 ``[R]``.
        pool: inputs ``[P, D]``.
        rows: of the pool, int64 ``[R, n]``, distinct within a task.
        targets: ``[R, n]`` or ``[R, n, C]``.
        smallest, noise, classes: as in ``choose_examples``.
    """
    parts = {
        "eval": slice(0, HELD_OUT),
        "report": slice(HELD_OUT, 2 * HELD_OUT),
        "train": slice(2 * HELD_OUT, None),
    }
    dealt = {name: targets[:, part] for name, part in parts.items()}
    dealt["train"] = noisy_targets(seeds, dealt["train"], noise, classes)
    largest = rows.shape[1] - 2 * HELD_OUT
    share = uniform_numbers(seeds, 11, 1)[:, 0]
    sizes = (smallest * (largest / smallest) ** share).round().to(torch.int64)
    return Examples(pool, {name: rows[:, part] for name, part in parts.items()}, dealt, sizes)
