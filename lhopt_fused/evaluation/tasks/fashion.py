"""Fashion-MNIST: a multi-layer perceptron, a plain CNN and an autoencoder."""

from __future__ import annotations

import gzip
import math
import zlib
from collections import OrderedDict
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Final

import torch
from torch import nn
from torch.nn import functional as F

from lhopt_fused.evaluation.task import Batch, DataError, Scores, Size, Split, Task, find_data
from lhopt_fused.evaluation.tasks.supervised import Classification, hold_out

__all__ = ["FashionAutoencoder", "FashionCNN", "FashionMLP", "fashion_splits", "read_idx"]

_SYSTEM: Final = Path("/usr/share/datasets/fashion-mnist")
_SOURCE: Final = (
    "the Debian package dataset-fashion-mnist, or https://github.com/zalandoresearch/fashion-mnist"
)
_EXAMPLES: Final[dict[Size, tuple[int, int, int]]] = {
    "small": (12_000, 512, 2_000),
    "full": (55_000, 5_000, 10_000),
}
"""Examples of the three splits."""


def read_idx(path: Path) -> torch.Tensor:
    """An array of bytes in the IDX format of MNIST, plain or gzipped: uint8 of any shape.

    Raises:
        DataError: the file cannot be read, or is not such an array.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; get it again from {_SOURCE}") from error
    start = 4 + 4 * (raw[3] if len(raw) > 3 else 0)
    shape = [int.from_bytes(raw[place : place + 4], "big") for place in range(4, start, 4)]
    if raw[:3] != b"\0\0\x08" or not shape or not 0 < len(raw) - start == math.prod(shape):
        raise DataError(
            f"{path} is damaged: expected an IDX header and {math.prod(shape)} bytes, found "
            f"{len(raw)} bytes that begin with {raw[:4].hex()}; get it again from {_SOURCE}"
        )
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).view(shape)


@lru_cache(maxsize=2)
def fashion_splits(size: Size, data_dir: Path | None) -> tuple[Batch, dict[Split, Batch]]:
    """Images, uint8 ``[N, 1, 28, 28]``, and their classes: for training, and held out.

    Raises:
        DataError: the files are missing or damaged.
    """
    folders = ([data_dir / "fashion-mnist"] if data_dir is not None else []) + [_SYSTEM]
    folder = find_data("Fashion-MNIST", folders, _SOURCE)
    train, policy_eval, at_most = _EXAMPLES[size]
    return hold_out(
        _part(folder, "train"),
        _part(folder, "t10k"),
        train=train,
        policy_eval=policy_eval,
        at_most=at_most,
    )


def _part(folder: Path, prefix: str) -> Batch:
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    files = [
        find_data("Fashion-MNIST", [folder / f"{name}.gz", folder / name], _SOURCE)
        for name in names
    ]
    images, labels = map(read_idx, files)
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{files[0]} has shape {list(images.shape)} and {files[1]} {list(labels.shape)}, "
            f"expected [N, 28, 28] and [N]; get both again from {_SOURCE}"
        )
    return images[:, None], labels.long()


def _unit(images: torch.Tensor) -> torch.Tensor:
    """Bytes as numbers from 0 to 1."""
    return images.float() / 255.0


class _FashionClassification(Classification):
    small_steps: ClassVar[int]
    small_width: ClassVar[int]
    full_width: ClassVar[int]

    def __init__(self, size: Size, data_dir: Path | None) -> None:
        training, held_out = fashion_splits(size, data_dir)
        steps = self.small_steps if size == "small" else 4_000
        super().__init__(training, held_out, steps=steps, batch_size=64)
        self.width = self.small_width if size == "small" else self.full_width

    def inputs(self, raw: torch.Tensor) -> torch.Tensor:
        """Centred and of about unit variance."""
        return (_unit(raw) - 0.286) / 0.353


class FashionMLP(_FashionClassification):
    """Two hidden layers."""

    name = "fashion_mlp"
    small_steps, small_width, full_width = 400, 128, 1_024

    def make_model(self) -> nn.Module:
        width = self.width
        layers = (nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width))
        named = OrderedDict[str, nn.Module]((f"layer{i}", layer) for i, layer in enumerate(layers))
        return nn.Sequential(named | {"relu": nn.ReLU(), "head": nn.Linear(width, 10)})


class FashionCNN(_FashionClassification):
    """Three convolutions without normalisation."""

    name = "fashion_cnn"
    small_steps, small_width, full_width = 250, 8, 64

    def make_model(self) -> nn.Module:
        width = self.width
        channels = (1, width, 2 * width, 4 * width)
        layers: dict[str, nn.Module] = {}
        for index in range(3):
            layers[f"conv{index}"] = nn.Conv2d(
                channels[index], channels[index + 1], 3, stride=1 + (index > 0), padding=1
            )
            layers[f"relu{index}"] = nn.ReLU()
        layers |= {"flatten": nn.Flatten(), "head": nn.Linear(4 * width * 49, 10)}
        return nn.Sequential(OrderedDict(layers))


class FashionAutoencoder(Task):
    """A deep autoencoder with a code of 16 numbers; the loss is the cross-entropy of each pixel."""

    name = "autoencoder"
    metric = "mean_squared_error"
    higher_is_better = False

    def __init__(self, size: Size, data_dir: Path | None) -> None:
        training, held_out = fashion_splits(size, data_dir)
        small = size == "small"
        images: dict[Split, Batch] = {split: batch[:1] for split, batch in held_out.items()}
        super().__init__(training[:1], images, steps=400 if small else 4_000, batch_size=64)
        self.widths = (784, 128, 64, 16) if small else (784, 1_000, 500, 250, 16)

    def make_model(self) -> nn.Module:
        widths = (*self.widths, *self.widths[-2:0:-1])
        layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
        for index, (before, after) in enumerate(pairwise(widths)):
            layers[f"linear{index}"] = nn.Linear(before, after)
            layers[f"tanh{index}"] = nn.Tanh()
        layers["head"] = nn.Linear(widths[-1], 784)
        return nn.Sequential(OrderedDict(layers))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        pixels = _unit(batch[0])
        return F.binary_cross_entropy_with_logits(model(pixels), pixels.flatten(1))

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        pixels = _unit(batch[0])
        logits, targets = model(pixels), pixels.flatten(1)
        loss = F.binary_cross_entropy_with_logits(logits, targets)
        return Scores(
            loss.item(), {"mean_squared_error": F.mse_loss(logits.sigmoid(), targets).item()}
        )
