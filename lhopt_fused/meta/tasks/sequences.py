"""Tasks on all short sequences of symbols with a rule behind them."""

from __future__ import annotations

import random

import torch

from lhopt_fused.meta.tasks.recurrent import random_recurrent
from lhopt_fused.meta.tasks.supervised import (
    SupervisedTasks,
    affordable_batch,
    choose_examples,
    random_conditions,
)

__all__ = ["digits", "rule_tasks"]


def digits(base: int, length: int) -> torch.Tensor:
    """All sequences of ``length`` digits, the smallest first, int64 ``[base ** length, length]``"""
    numbers = torch.arange(base**length)[:, None]
    return numbers // base ** torch.arange(length) % base


def rule_tasks(
    family: str,
    seeds: torch.Tensor,
    generator: random.Random,
    sequences: torch.Tensor,
    targets: torch.Tensor,
    *,
    symbols: int,
) -> SupervisedTasks:
    """Recurrent networks that are to find out the bits behind sequences.

    Args:
        family: name of the family.
        seeds: int64 ``[R]``.
        generator: of the architecture; draws network and batch size.
        sequences: int64 ``[P, T]``, all there are.
        targets: int64 ``[P]``, one bit of each, or ``[P, T]``, one for each symbol.
        symbols: how many there are.
    """
    network = random_recurrent(
        generator,
        symbols=symbols,
        length=sequences.shape[1],
        outputs=2,
        every_step=targets.ndim == 2,
    )
    conditions = random_conditions(seeds, generator, dropout=0.0, noise=0.1)
    count = sequences.shape[0]
    examples = choose_examples(
        seeds,
        sequences.to(seeds.device),
        targets.to(seeds.device),
        held_out=min(64, count // 8),
        smallest=count // 2,
        noise=conditions["label_noise"],
        classes=2,
    )
    return SupervisedTasks(
        family,
        seeds,
        network,
        examples,
        loss="cross_entropy",
        batch_size=affordable_batch(generator, network.products, 8, 32, budget=1e5),
        numbers=conditions,
    )
