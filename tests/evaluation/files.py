"""Small data sets, made up, in the formats in which their authors publish them."""

from __future__ import annotations

import gzip
import struct
import wave
from pathlib import Path

import numpy as np
from PIL import Image


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


def write_cifar(data_dir: Path) -> None:
    """Two classes of noise of a colour each, as image folders."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 10)):
        for kind, channel in (("cat", 0), ("dog", 2)):
            folder = data_dir / "cifar10" / part / kind
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(100, size=(32, 32, 3)).astype(np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{index:04d}.png")


def write_movielens(data_dir: Path) -> None:
    """Users who like films of their own parity, in GroupLens's ``u.data``."""
    rng = np.random.default_rng(0)
    lines = []
    for user in range(1, 41):
        films = rng.permutation(np.arange(user % 2, 300, 2))[:20]
        lines += [f"{user}\t{film}\t5\t{moment}" for moment, film in enumerate(films)]
    folder = data_dir / "ml-100k"
    folder.mkdir(parents=True)
    (folder / "u.data").write_text("\n".join(rng.permutation(lines)) + "\n")


def write_sst2(data_dir: Path) -> None:
    """Sentences of words that say it all."""
    rng = np.random.default_rng(0)
    words = {0: ["bad", "dull", "a", "film"], 1: ["good", "funny", "a", "film"]}
    folder = data_dir / "sst-2"
    folder.mkdir(parents=True)
    for part, count in (("train", 80), ("dev", 20), ("test", 30)):
        lines = [
            f"{' '.join(rng.choice(words[label], rng.integers(1, 50)))}\t{label}"
            for label in rng.integers(2, size=count).tolist()
        ]
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")


def write_digits(data_dir: Path, speakers: tuple[str, ...] = ("ann", "bob", "cid", "dee")) -> None:
    """Tones for digits, 8 kHz, 16 bits, mono."""
    rng = np.random.default_rng(0)
    folder = data_dir / "recordings"
    folder.mkdir(parents=True)
    for place, speaker in enumerate(speakers):
        for digit in range(10):
            for take in range(2):
                time = np.arange(rng.integers(1_600, 12_000)) / 8_000
                tone = np.sin(2 * np.pi * (300 + 200 * digit + 10 * place) * time)
                with wave.open(str(folder / f"{digit}_{speaker}_{take}.wav"), "wb") as sound:
                    sound.setnchannels(1)
                    sound.setsampwidth(2)
                    sound.setframerate(8_000)
                    sound.writeframes((8_000 * tone).astype("<i2").tobytes())


def write_all(data_dir: Path) -> None:
    """Data for every task."""
    for write in (write_wikitext, write_fashion, write_cifar, write_movielens, write_sst2):
        write(data_dir)
    write_digits(data_dir)
