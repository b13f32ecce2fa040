"""Text that every Python carries, in a small alphabet: documentation, sources, the licence."""

from __future__ import annotations

import string
import sysconfig
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

import torch

__all__ = ["SYMBOLS", "encode", "held_out_text", "training_text", "user_text"]

SYMBOLS: Final = 32
"""Space, line end, 26 letters without case, any digit, points, brackets and quotes, the rest."""

_SHORTEST: Final = 8000  # characters of a source worth its name
_DEBIAN: Final = Path("/usr/share/doc/anarchism/markdown")


def _alphabet() -> dict[str, int]:
    table = {" ": 0, "\n": 1}
    for index, letter in enumerate(string.ascii_lowercase, 2):
        table |= {letter: index, letter.upper(): index}
    table |= dict.fromkeys(string.digits, 28)
    table |= dict.fromkeys(".,;:!?", 29)
    return table | dict.fromkeys("()[]{}<>'\"`", 30)


_ALPHABET: Final = _alphabet()


def encode(text: str) -> torch.Tensor:
    """Symbols below :data:`SYMBOLS`, uint8 ``[characters]``."""
    return torch.tensor([_ALPHABET.get(letter, 31) for letter in text], dtype=torch.uint8)


@cache
def training_text() -> Mapping[str, torch.Tensor]:
    """Sources by name: documentation topics, three in four modules, and Python's licence.

    Raises:
        ModuleNotFoundError: this Python has no ``pydoc_data``.
        FileNotFoundError: this Python has no source files.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "text tasks need pydoc_data, which this Python's standard library lacks; install the "
            "whole standard library (on Debian: apt-get install libpython3-stdlib)"
        ) from error
    found = {f"topic {name}": text for name, text in topics.items() if len(text) >= _SHORTEST}
    found |= {
        path.stem: _read(path) for index, path in enumerate(_modules()) if not _is_held_out(index)
    }
    licence = _library() / "LICENSE.txt"
    if licence.is_file():
        found["licence"] = _read(licence)
    return {name: encode(text) for name, text in sorted(found.items())}


@cache
def _standard_held_out() -> torch.Tensor:
    return torch.cat(
        [encode(_read(path)) for index, path in enumerate(_modules()) if _is_held_out(index)]
    )


def held_out_text(data_dir: Path | None = None) -> torch.Tensor:
    """Text that no training family reads, uint8.

    The user's own if there is any, else the Debian package ``anarchism`` if it is installed, else
    the modules that :func:`training_text` leaves out.

    Args:
        data_dir: has the user's own in ``text/*.txt``, if anything.
    """
    if data_dir is not None and (data_dir / "text").is_dir():
        return user_text(data_dir / "text", "*.txt")
    if _DEBIAN.is_dir():
        return user_text(_DEBIAN, "*")
    return _standard_held_out()


@lru_cache(maxsize=4)
def user_text(folder: Path, pattern: str) -> torch.Tensor:
    """The files of a folder, one after the other, uint8; the first 4 million characters.

    Raises:
        FileNotFoundError: no files, or fewer than 8,000 characters in them.
    """
    files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    text = "\n".join(_read(path) for path in files)[:4_000_000]
    if len(text) < _SHORTEST:
        raise FileNotFoundError(
            f"{folder}/{pattern} has {len(text):,} characters of text, expected {_SHORTEST:,} at "
            "least; put plain text files there"
        )
    return encode(text)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def _modules() -> list[Path]:
    """Sources of the standard library's larger modules, by name."""
    found = sorted(_library().glob("[!_]*.py"))
    found = [path for path in found if path.stat().st_size >= _SHORTEST]
    if len(found) < 20:
        raise FileNotFoundError(
            f"{_library()} has {len(found)} Python sources of {_SHORTEST:,} bytes and more, "
            "expected those of the standard library; use a Python that comes with its sources"
        )
    return found


def _is_held_out(index: int) -> bool:
    return index % 4 == 3


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
