"""Byte-level text: where it comes from, how it is split, and the windows cut out of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["InputError", "Text", "read_files", "read_topics"]


class InputError(ValueError):
    """Something the user gave cannot be used; names the option and says what to do."""

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option}: {problem}")
        self.option = option
        self.problem = problem


def read_topics() -> bytes:
    """Python's own language reference in English, as ``help()`` shows it.

    Topics that are part of another one are left out, so that what is held out is not seen in
    training.
    """
    from pydoc_data.topics import topics

    longest_first = sorted(topics.values(), key=lambda topic: (-len(topic), topic))
    kept: list[str] = []
    for topic in longest_first:
        if not any(topic.strip() in other for other in kept):
            kept.append(topic)
    names = {topic: name for name, topic in topics.items()}
    return "\n".join(sorted(kept, key=names.__getitem__)).encode()


def read_files(paths: Sequence[Path]) -> bytes:
    """The bytes of ``paths``, one after the other.

    Raises:
        InputError: a file cannot be read.
    """
    try:
        return b"\n".join(path.read_bytes() for path in paths)
    except OSError as error:
        raise InputError(
            "--text", f"cannot read {error.filename}: {error.strerror}; give a readable text file"
        ) from error


@dataclass(frozen=True)
class Text:
    """Bytes to learn from and bytes to be judged on, which are the end of the text."""

    train: torch.Tensor  # uint8
    held_out: torch.Tensor  # uint8
    digest: str  # of the whole text

    @classmethod
    def split(cls, data: bytes, eval_fraction: float, context: int) -> Text:
        """Hold out the last ``eval_fraction`` of ``data``.

        Raises:
            InputError: a part is shorter than one window of ``context + 1`` bytes.
        """
        cut = len(data) - math.floor(len(data) * eval_fraction)
        if min(cut, len(data) - cut) <= context:
            smaller = min(eval_fraction, 1 - eval_fraction)
            raise InputError(
                "--text",
                f"has {len(data):,} bytes, but a --context of {context} with an --eval-fraction "
                f"of {eval_fraction:g} needs at least {math.ceil((context + 1) / smaller):,}; "
                "give more text or a smaller --context",
            )
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return cls(whole[:cut], whole[cut:], hashlib.sha256(data).hexdigest())

    def batch(self, size: int, context: int, generator: torch.Generator) -> torch.Tensor:
        """Windows at random places of the training part: ``int64`` ``[size, context + 1]``."""
        windows = self.train.unfold(0, context + 1, 1)
        picked = torch.randint(len(windows), (size,), generator=generator)
        return windows[picked].long()

    def eval_windows(self, context: int, at_most: int) -> torch.Tensor:
        """Disjoint windows spread over the held-out part: ``int64`` ``[n, context + 1]``."""
        windows = self.held_out.unfold(0, context + 1, context + 1)
        picked = torch.linspace(0, len(windows) - 1, min(at_most, len(windows))).long()
        return windows[picked].long()

    def unigram_entropy(self) -> float:
        """Nats per held-out byte of a model that knows only how often each byte is in the text."""
        counts = torch.bincount(self.train.long(), minlength=256).double() + 1
        log_share = (counts / counts.sum()).log()
        return -float(log_share[self.held_out.long()].mean())
