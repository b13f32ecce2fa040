"""Classifying small real images with MLPs."""

from __future__ import annotations

import random

import torch

from lhopt_fused.meta.tasks.base import TaskFamily
from lhopt_fused.meta.tasks.data import IMAGE_SOURCES, Pool, load_images
from lhopt_fused.meta.tasks.mlp import random_mlp
from lhopt_fused.meta.tasks.seeded import architecture_random, task_seeds, uniform_numbers
from lhopt_fused.meta.tasks.supervised import (
    Network,
    SupervisedTasks,
    affordable_batch,
    choose_examples,
    random_conditions,
    random_loss,
)

__all__ = ["ImageFamily", "ImageMLPFamily", "image_tasks"]

_HELD_OUT = 64  # images in each held-out split


def image_tasks(
    family: str,
    seeds: torch.Tensor,
    generator: random.Random,
    pool: Pool,
    network: Network,
    batch_size: int,
) -> SupervisedTasks:
    """Tasks on images, each with its own split, training size, pixel scale and label noise.

    Args:
        family: name of the family.
        seeds: int64 ``[R]``.
        generator: of the architecture; draws loss and dropout.
        pool: the images.
        network: what classifies them.
        batch_size: images in a minibatch.
    """
    pool = pool.to(seeds.device)
    conditions = random_conditions(seeds, generator)
    centred = pool.inputs - pool.inputs.mean(dim=(0, 2, 3), keepdim=True)
    examples = choose_examples(
        seeds,
        centred / centred.std(),
        pool.targets,
        held_out=min(_HELD_OUT, pool.inputs.shape[0] // 4),
        smallest=min(48, pool.inputs.shape[0] // 4),
        noise=conditions["label_noise"],
        classes=pool.outputs,
    )
    return SupervisedTasks(
        family,
        seeds,
        network,
        examples,
        loss=random_loss(generator),
        batch_size=batch_size,
        numbers=conditions,
        input_scale=2.0 ** (2.0 * uniform_numbers(seeds, 20, 1)[:, 0] - 1.0),
    )


class ImageFamily(TaskFamily):
    """A family on images, of scikit-learn and of ``data_dir/images/CLASS/``, if that is there."""

    def images(self, generator: random.Random) -> Pool:
        """The images of one batch."""
        sources = [*IMAGE_SOURCES, "digits"]  # the hardest one more often
        if self.data_dir is not None and (self.data_dir / "images").exists():
            sources += ["folder"] * len(sources)
        return load_images(generator.choice(sources), self.data_dir)


class ImageMLPFamily(ImageFamily):
    """Handwritten digits and patches of photographs, 8x8, with MLPs.

    A batch shares the images, a network of :func:`random_mlp`, the loss (cross entropy, squared
    error, hinge), whether there is dropout, and a batch size of 8 to 32. Each task has its own
    training set (48 images to all but the held-out 128, log-uniform, so that small ones are
    overfitted), pixel scale (0.5 to 2), label noise (half none, else up to 0.4), dropout rate and
    gain. About 10 to 70 us a step.
    """

    name = "image_mlp"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> SupervisedTasks:
        """Draw images, network and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        pool = self.images(generator)
        network = random_mlp(generator, pool.inputs[0].numel(), pool.outputs)
        batch_size = affordable_batch(generator, network.products, 8, 32)
        return image_tasks(self.name, seeds, generator, pool, network, batch_size)
