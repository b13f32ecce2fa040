"""Small data sets, made up, in the formats in which their authors publish them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

__all__ = ["write_fashion", "write_wikitext"]


def write_wikitext(data_dir: Path, *, training: bool = False) -> None:
    """Text of a few words, in the names of ``wikitext-2``."""
    folder = data_dir / "wikitext-2"
    folder.mkdir(parents=True)
    words = ["the", "of", "cat", "=", "\n", "sat", "on", ",", "@-@", "<unk>", "mat", "."]
    rng = np.random.default_rng(0)
    for part in ("train", "valid", "test") if training else ("valid", "test"):
        text = " ".join(rng.choice(words, 20_000))
        (folder / f"{part}.txt").write_text(text)


def write_fashion(data_dir: Path) -> None:
    """Bright halves of images, in IDX files."""
    folder = data_dir / "fashion-mnist"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 60)):
        labels = rng.integers(10, size=count).astype(np.uint8)
        images = rng.integers(100, size=(count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 4] += 150
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(header + images.tobytes())
        )
        header = struct.pack(">2i", 0x801, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
