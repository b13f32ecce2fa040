"""Telling from a few characters which text they are from."""

from __future__ import annotations

import random
from functools import lru_cache

import torch

from lhopt_fused.meta.tasks.base import TaskFamily
from lhopt_fused.meta.tasks.data import Pool
from lhopt_fused.meta.tasks.recurrent import random_recurrent
from lhopt_fused.meta.tasks.seeded import architecture_random, task_seeds
from lhopt_fused.meta.tasks.supervised import (
    SupervisedTasks,
    affordable_batch,
    choose_examples,
    random_conditions,
    random_loss,
)
from lhopt_fused.meta.tasks.text import SYMBOLS, training_text, user_text

__all__ = ["TextRNNFamily", "text_windows"]

_HELD_OUT = 64  # windows in each held-out split
_PER_CLASS = 400  # windows of a source at most


@lru_cache(maxsize=16)
def text_windows(texts: tuple[torch.Tensor, ...], length: int) -> Pool:
    """Windows that do not overlap, int64 ``[P, length]``, and the text that each is from."""
    windows = [text.unfold(0, length, length)[:_PER_CLASS].long() for text in texts]
    targets = [torch.full((len(own),), label) for label, own in enumerate(windows)]
    return Pool(torch.cat(windows), torch.cat(targets), len(texts))


class TextRNNFamily(TaskFamily):
    """8 to 12 characters out of 2 to 6 texts (documentation topics, modules, the licence, and a
    user's ``data_dir/text/*.txt``), with recurrent networks.

    A batch shares the texts, a network of ``random_recurrent``, loss, dropout or not, and a batch
    size of 8 to 24. Each task has its own split, training size (64 windows to all), label noise,
    dropout rate and gain. About 30 to 160 us a step.
    """

    name = "text_rnn"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> SupervisedTasks:
        """Draw texts, network and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        length = generator.randint(8, 12)
        pool = text_windows(self._texts(generator), length).to(seeds.device)
        network = random_recurrent(
            generator, symbols=SYMBOLS, length=length, outputs=pool.outputs, every_step=False
        )
        conditions = random_conditions(seeds, generator)
        examples = choose_examples(
            seeds,
            pool.inputs,
            pool.targets,
            held_out=_HELD_OUT,
            smallest=64,
            noise=conditions["label_noise"],
            classes=pool.outputs,
        )
        return SupervisedTasks(
            self.name,
            seeds,
            network,
            examples,
            loss=random_loss(generator),
            batch_size=affordable_batch(generator, network.products, 8, 24, budget=1.2e5),
            numbers=conditions,
        )

    def _texts(self, generator: random.Random) -> tuple[torch.Tensor, ...]:
        known = training_text()
        chosen = generator.sample(list(known), generator.randint(2, 6))
        texts = [known[name] for name in chosen]
        if self.data_dir is not None and (self.data_dir / "text").is_dir():
            texts[0] = user_text(self.data_dir / "text", "*.txt")
        return tuple(texts)
