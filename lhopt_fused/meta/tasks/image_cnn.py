"""Classifying small real images with convolutional networks."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from lhopt_fused.meta.tasks.image_mlp import ImageFamily, image_tasks
from lhopt_fused.meta.tasks.layers import ACTIVATIONS, NORMS, Dropout, Norm, Parameter, linear
from lhopt_fused.meta.tasks.seeded import architecture_random, task_seeds
from lhopt_fused.meta.tasks.supervised import Network, SupervisedTasks, affordable_batch

__all__ = ["CNN", "ImageCNNFamily"]


@dataclass(frozen=True)
class CNN(Network):
    """Convolutions 3x3, then a linear layer on the mean over pixels or on all of them; dropout
    takes whole channels away from that layer.

    All networks run as one grouped convolution, with the channels of R tasks side by side.

    Attributes:
        inputs: channels, rows and columns of an image.
        layers: channels and stride of each convolution.
        outputs: classes.
        activation: a key of :data:`ACTIVATIONS`.
        norm: what normalises a layer: over all of an image, or each channel over the batch.
        pooled: whether the mean over pixels is taken before the last layer.
    """

    inputs: tuple[int, int, int]
    layers: tuple[tuple[int, int], ...]
    outputs: int
    activation: str
    norm: Norm
    pooled: bool

    def _sizes(self) -> list[tuple[int, int, int]]:
        """Channels, rows and columns before, between and after the layers."""
        sizes = [self.inputs]
        for channels, stride in self.layers:
            _, rows, columns = sizes[-1]
            sizes.append((channels, math.ceil(rows / stride), math.ceil(columns / stride)))
        return sizes

    @property
    def _features(self) -> int:
        channels, rows, columns = self._sizes()[-1]
        return channels if self.pooled else channels * rows * columns

    @property
    def products(self) -> int:
        """Multiplications of one image."""
        sizes = self._sizes()
        layers = sum(9 * i[0] * math.prod(o) for i, o in pairwise(sizes))
        return layers + self._features * self.outputs

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Weights ``[O, C, 3, 3]``, biases, scales and shifts, and those of the last layer."""
        found, channels = {}, self.inputs[0]
        for index, (o, _) in enumerate(self.layers):
            found[f"{index}.weight"] = Parameter((o, channels, 3, 3), fan_in=9 * channels)
            found[f"{index}.bias"] = Parameter((o,))
            if self.norm != "none":
                found[f"{index}.scale"] = Parameter((o,), start=1.0)
                found[f"{index}.shift"] = Parameter((o,))
            channels = o
        found["head.weight"] = Parameter((self._features, self.outputs), fan_in=self._features)
        found["head.bias"] = Parameter((self.outputs,))
        return found

    def forward(
        self, params: Mapping[str, torch.Tensor], inputs: torch.Tensor, dropout: Dropout | None
    ) -> torch.Tensor:
        """Outputs ``[R, B, classes]`` for images ``[R, B, C, H, W]``."""
        runs, batch = inputs.shape[:2]
        hidden = inputs.transpose(0, 1).flatten(1, 2)  # [B, R C, H, W]
        for index, (_, stride) in enumerate(self.layers):
            weight = params[f"{index}.weight"].flatten(0, 1)
            bias = params[f"{index}.bias"].flatten()
            hidden = F.conv2d(hidden, weight, bias, stride=stride, padding=1, groups=runs)
            hidden = ACTIVATIONS[self.activation](self._normalise(params, index, hidden, runs))
        hidden = hidden.view(batch, runs, -1, math.prod(hidden.shape[2:])).transpose(0, 1)
        if dropout is not None:
            hidden = hidden * dropout(hidden.new_ones(hidden.shape[:3]))[..., None]
        return linear(params, "head", hidden.mean(dim=3) if self.pooled else hidden.flatten(2))

    def _normalise(
        self, params: Mapping[str, torch.Tensor], index: int, hidden: torch.Tensor, runs: int
    ) -> torch.Tensor:
        if self.norm == "none":
            return hidden
        scale, shift = params[f"{index}.scale"].flatten(), params[f"{index}.shift"].flatten()
        if self.norm == "layer":
            return F.group_norm(hidden, runs, scale, shift)
        return F.batch_norm(hidden, None, None, scale, shift, training=True)

    def numbers(self) -> dict[str, float]:
        """Sizes and the kind of normalisation."""
        kind = {f"{self.norm}_norm": 1.0} if self.norm != "none" else {}
        return kind | {
            "log_inputs": math.log(math.prod(self.inputs)),
            "log_outputs": math.log(self.outputs),
            "log_width": math.log(max(channels for channels, _ in self.layers)),
            "depth": float(len(self.layers)),
        }


def random_cnn(generator: random.Random, inputs: tuple[int, int, int], outputs: int) -> CNN:
    """One to three convolutions with 4, 8 or 16 channels; the first two may halve the image."""
    depth = generator.choice((1, 2, 2, 3))
    channels = generator.choice((4, 8, 8, 16))
    strides = [generator.choice((1, 2)), 2, 1][:depth]
    return CNN(
        inputs,
        tuple((channels, stride) for stride in strides),
        outputs,
        generator.choice(sorted(ACTIVATIONS)),
        generator.choice(NORMS),
        pooled=generator.random() < 0.5,
    )


class ImageCNNFamily(ImageFamily):
    """Handwritten digits and patches of photographs, 8x8, with convolutional networks.

    A batch shares a network of :func:`random_cnn` and a batch size of 8 to 24; all else is drawn
    as in ``image_mlp``. About 50 to 160 us a step.
    """

    name = "image_cnn"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> SupervisedTasks:
        """Draw images, network and tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        pool = self.images(generator)
        channels, rows, columns = pool.inputs.shape[1:]
        network = random_cnn(generator, (channels, rows, columns), pool.outputs)
        batch_size = affordable_batch(generator, network.products, 8, 24)
        return image_tasks(self.name, seeds, generator, pool, network, batch_size)
