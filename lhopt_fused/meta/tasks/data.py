"""Real data for the inner tasks: images and tables of scikit-learn, or a user's own folder."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch

__all__ = ["IMAGE_SOURCES", "TABLES", "Pool", "image_folder", "load_images", "load_table", "need"]

IMAGE_SOURCES: Final = ("digits", "photographs", "regions")
TABLES: Final = ("wine", "breast_cancer", "diabetes")

_SIDE: Final = 8  # pixels, of every image
_PATCH: Final = 16  # pixels of a photograph that become one image
_PER_CLASS: Final = 400  # at most, of a user's images
_CLASSES: Final = 10  # at most, of a user's images


@dataclass(frozen=True)
class Pool:
    """Examples with their targets.

    Attributes:
        inputs: float32 ``[P, ...]``.
        targets: classes, int64 ``[P]``, or numbers, float32 ``[P, C]``.
        outputs: number of classes or C.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    outputs: int

    def to(self, device: torch.device) -> Pool:
        """The same on ``device``."""
        return Pool(self.inputs.to(device), self.targets.to(device), self.outputs)


def need(module: str, package: str, what: str) -> ModuleType:
    """Import what a data set comes from.

    Raises:
        ModuleNotFoundError: it is not installed; names the package.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} need the package {package}, which cannot be imported ({error}); "
            f"run: pip install {package}"
        ) from error


def load_images(source: str, data_dir: Path | None = None) -> Pool:
    """Small images, float32 ``[P, C, 8, 8]`` in 0 to 1, and what they show.

    Args:
        source: ``digits``; ``photographs``, patches of two photographs by photograph, or
            ``regions``, by photograph and quarter; ``folder``, the user's own.
        data_dir: where the user's own are, see :func:`image_folder`.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        FileNotFoundError: there are no images below ``data_dir``.
    """
    if source == "digits":
        return _digits()
    if source == "folder" and data_dir is not None:
        return image_folder(data_dir / "images")
    return _patches(source == "regions")


@lru_cache(maxsize=1)
def _digits() -> Pool:
    datasets = need("sklearn.datasets", "scikit-learn", "images of digits")
    digits = datasets.load_digits()
    inputs = torch.tensor(digits.images / 16.0, dtype=torch.float32)[:, None]
    return Pool(inputs, torch.tensor(digits.target, dtype=torch.int64), 10)


@lru_cache(maxsize=2)
def _patches(by_region: bool) -> Pool:
    """Patches of a grid, so that no two share a pixel."""
    datasets = need("sklearn.datasets", "scikit-learn", "patches of photographs")
    inputs, targets = [], []
    for photograph, picture in enumerate(datasets.load_sample_images().images):
        pixels = torch.tensor(np.asarray(picture), dtype=torch.float32).movedim(2, 0) / 255.0
        grid = pixels.unfold(1, _PATCH, _PATCH).unfold(2, _PATCH, _PATCH)  # [3, rows, columns, ...]
        rows, columns = grid.shape[1:3]
        patches = grid.permute(1, 2, 0, 3, 4).reshape(rows * columns, 3, _PATCH, _PATCH)
        inputs.append(torch.nn.functional.avg_pool2d(patches, _PATCH // _SIDE))
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        quarter = 2 * (place[:, 0] >= rows // 2).long() + (place[:, 1] >= columns // 2).long()
        own = photograph * 4 + quarter if by_region else torch.full_like(quarter, photograph)
        targets.append(own)
    return Pool(torch.cat(inputs), torch.cat(targets), 8 if by_region else 2)


@lru_cache(maxsize=8)
def image_folder(folder: Path) -> Pool:
    """Images of a folder ``FOLDER/CLASS/*.{png,jpg,jpeg}``, shrunk to 8x8 in colour.

    The first ten classes by name, and the first 400 images of each by name.

    Raises:
        FileNotFoundError: fewer than two classes with images.
    """
    image = need("PIL.Image", "pillow", "images of a folder")
    classes = [found for found in sorted(folder.glob("*")) if _image_files(found)][:_CLASSES]
    if len(classes) < 2:
        raise FileNotFoundError(
            f"{folder} has {len(classes)} folders with images, expected at least 2 classes as "
            f"{folder}/CLASS/NAME.png or .jpg"
        )
    inputs, targets = [], []
    for label, found in enumerate(classes):
        for path in _image_files(found)[:_PER_CLASS]:
            with image.open(path) as opened:
                small = opened.convert("RGB").resize((_SIDE, _SIDE), image.Resampling.BOX)
            inputs.append(torch.tensor(np.asarray(small), dtype=torch.float32) / 255.0)
            targets.append(label)
    return Pool(torch.stack(inputs).movedim(3, 1), torch.tensor(targets), len(classes))


def _image_files(folder: Path) -> list[Path]:
    kinds = {".png", ".jpg", ".jpeg"}
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in kinds)


@lru_cache(maxsize=len(TABLES))
def load_table(name: str) -> Pool:
    """One of :data:`TABLES`, with standardised columns; ``diabetes`` predicts a number.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    datasets = need("sklearn.datasets", "scikit-learn", "tables")
    load: Callable[[], Any] = getattr(datasets, f"load_{name}")
    table = load()
    inputs = _standardised(torch.tensor(table.data, dtype=torch.float64))
    if name == "diabetes":
        numbers = torch.tensor(table.target, dtype=torch.float64)[:, None]
        return Pool(inputs, _standardised(numbers), 1)
    targets = torch.tensor(table.target, dtype=torch.int64)
    return Pool(inputs, targets, int(targets.max()) + 1)


def _standardised(columns: torch.Tensor) -> torch.Tensor:
    deviation, mean = torch.std_mean(columns, dim=0)
    return ((columns - mean) / deviation).to(torch.float32)
