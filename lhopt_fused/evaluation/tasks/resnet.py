"""A ResNet with batch norm on images in folders, as CIFAR-10 and ImageNet come."""

from __future__ import annotations

import io
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lhopt_fused.evaluation.task import Batch, DataError, Size, Split, find_data
from lhopt_fused.evaluation.tasks.supervised import Classification, hold_out

__all__ = ["ResNet", "read_images"]

_SOURCE: Final = (
    "https://www.cs.toronto.edu/~kriz/cifar.html as image folders cifar10/train/CLASS/*.png (or "
    ".jpg) and cifar10/test/CLASS/*, or the same in cifar10_images.tar"
)
_SIDE: Final = 32
_KINDS: Final = (".png", ".jpg", ".jpeg")
_PER_CLASS: Final[dict[Size, int]] = {"small": 400, "full": 5_000}
_EXAMPLES: Final[dict[Size, tuple[int, int, int]]] = {
    "small": (3_600, 400, 1_000),
    "full": (45_000, 2_000, 10_000),
}


def read_images(place: Path, per_class: int) -> dict[str, Batch]:
    """Images of a folder or tar, by part: uint8 ``[N, 3, 32, 32]``, and their classes, int64.

    Args:
        place: with ``PART/CLASS/NAME.jpg`` in it, below one more folder or not.
        per_class: images of each class, at most, the first by name.

    Raises:
        DataError: a file is no image, or a part or class is missing.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise DataError(
            f"images need the package pillow ({error}); run: pip install 'lhopt-fused[eval]'"
        ) from error
    found: dict[str, list[tuple[str, np.ndarray[Any, Any]]]] = {}
    for part, kind, name, raw in _limited(_files(place), per_class):
        try:
            with Image.open(io.BytesIO(raw)) as opened:
                image = opened.convert("RGB").resize((_SIDE, _SIDE))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{name} of {place} is no image ({error}); get it again") from error
        found.setdefault(part, []).append((kind, np.asarray(image)))
    classes = sorted({kind for images in found.values() for kind, _ in images})
    if set(found) != {"train", "test"} or len(classes) < 2:
        raise DataError(
            f"{place} has the parts {sorted(found)} with {len(classes)} classes, expected train "
            f"and test with two or more; get it from {_SOURCE}"
        )
    return {part: _stacked(images, classes) for part, images in found.items()}


def _stacked(images: list[tuple[str, np.ndarray[Any, Any]]], classes: list[str]) -> Batch:
    pixels = torch.from_numpy(np.stack([image for _, image in images])).movedim(-1, 1)
    return pixels.contiguous(), torch.tensor([classes.index(kind) for kind, _ in images])


def _files(place: Path) -> Iterator[tuple[str, bytes]]:
    """Paths and bytes of images, in the order of their names."""
    if place.is_dir():
        for path in sorted(place.rglob("*")):
            if path.suffix.lower() in _KINDS:
                yield path.relative_to(place).as_posix(), path.read_bytes()
        return
    try:
        with tarfile.open(place) as tar:
            members = {m.name: m for m in tar.getmembers() if m.isfile()}
            for name in sorted(members):
                opened = tar.extractfile(members[name])
                if opened is not None and PurePosixPath(name).suffix.lower() in _KINDS:
                    yield name, opened.read()
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{place} is damaged ({error}); get it again from {_SOURCE}") from error


def _limited(
    files: Iterable[tuple[str, bytes]], per_class: int
) -> Iterator[tuple[str, str, str, bytes]]:
    """The first files of each part and class, with both."""
    counts: dict[tuple[str, str], int] = {}
    for name, raw in files:
        parts = PurePosixPath(name).parts
        if len(parts) < 3:
            continue
        part, kind = parts[-3], parts[-2]
        counts[part, kind] = counts.get((part, kind), 0) + 1
        if counts[part, kind] <= per_class:
            yield part, kind, name, raw


@lru_cache(maxsize=2)
def _splits(size: Size, data_dir: Path | None) -> tuple[Batch, dict[Split, Batch]]:
    names = ("cifar10", "cifar10_images.tar")
    roots = [data_dir / name for name in names] if data_dir is not None else []
    parts = read_images(find_data("CIFAR-10", roots, _SOURCE), _PER_CLASS[size])
    train, policy_eval, at_most = _EXAMPLES[size]
    return hold_out(
        parts["train"], parts["test"], train=train, policy_eval=policy_eval, at_most=at_most
    )


class _Residual(nn.Module):
    """Two convolutions beside a short cut (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.short_cut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.short_cut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.short_cut(x))


class ResNet(Classification):
    """Residual networks for small images: 8 layers when small, else 18; flipped at random."""

    name = "resnet"

    def __init__(self, size: Size, data_dir: Path | None) -> None:
        training, held_out = _splits(size, data_dir)
        small = size == "small"
        super().__init__(
            training, held_out, steps=150 if small else 6_000, batch_size=32 if small else 128
        )
        self.widths = (8, 16, 32) if small else (64, 128, 256, 512)
        self.depth = 1 if small else 2
        self.classes = int(training[1].max()) + 1

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        for images, classes in super().batches(generator):
            flip = torch.rand(len(images), generator=generator) < 0.5
            yield torch.where(flip[:, None, None, None], images.flip(-1), images), classes

    def inputs(self, raw: torch.Tensor) -> torch.Tensor:
        """Centred and of about unit variance."""
        return (raw.float() / 255.0 - 0.47) / 0.25

    def make_model(self) -> nn.Module:
        first = self.widths[0]
        layers: dict[str, nn.Module] = {
            "conv": nn.Conv2d(3, first, 3, padding=1, bias=False),
            "norm": nn.BatchNorm2d(first),
            "relu": nn.ReLU(),
        }
        before = first
        for stage, width in enumerate(self.widths):
            for index in range(self.depth):
                stride = 2 if stage > 0 and index == 0 else 1
                layers[f"stage{stage}_{index}"] = _Residual(before, width, stride)
                before = width
        layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return nn.Sequential(OrderedDict(layers | {"head": nn.Linear(before, self.classes)}))
