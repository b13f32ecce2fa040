"""Language models over bytes or tokens, on text in the format of WikiText, in one pass over it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Final

import torch
from torch import nn

from lhopt_fused.demo.model import GPT, GPTConfig
from lhopt_fused.evaluation.task import Batch, DataError, Scores, Size, Split, Task, find_data
from lhopt_fused.evaluation.tasks.tokens import Tokenizer

__all__ = [
    "VOCABULARY",
    "WIDTHS",
    "LanguageModel",
    "LanguageModelBPE",
    "LanguageModelNarrow",
    "LanguageModelWide",
    "windows",
]

WIDTHS: Final = ("language_model_narrow", "language_model", "language_model_wide")
"""Tasks that differ in the width of their model alone, narrowest first."""


_SOURCE: Final = (
    "https://huggingface.co/datasets/Salesforce/wikitext: wikitext-2 as train.txt, valid.txt and "
    "test.txt, or as wiki.train.tokens and so on; without the training text, valid.txt is "
    "learned and test.txt is split in halves"
)
_FOLDERS: Final[dict[Size, tuple[str, ...]]] = {
    "small": ("wikitext-2",),
    "full": ("wikitext-103", "wikitext-2"),
}
_CONTEXT: Final[dict[Size, int]] = {"small": 64, "full": 512}
_WINDOWS: Final[dict[Size, tuple[int, int, int]]] = {
    "small": (16_000, 128, 1_024),
    "full": (1_000_000, 512, 4_096),
}
"""Windows of the three splits, at most."""

VOCABULARY: Final[dict[Size, int]] = {"small": 512, "full": 16_384}
"""Tokens of the models that do not read bytes."""

_TOKENIZER_BYTES: Final = 50_000_000  # of text that tokens are found in


@lru_cache(maxsize=2)
def _splits(size: Size, data_dir: Path | None) -> tuple[Batch, dict[Split, Batch]]:
    """Disjoint windows of bytes, uint8 ``[N, context + 1]``."""
    folder, texts = _texts(size, data_dir)
    limits = zip(texts, _WINDOWS[size], strict=True)
    train, policy_eval, report = (
        windows(_bytes(text), _CONTEXT[size], at_most, folder) for text, at_most in limits
    )
    return (train,), {"policy_eval": (policy_eval,), "report": (report,)}


def _texts(size: Size, data_dir: Path | None) -> tuple[Path, list[bytes]]:
    """A folder and its texts: what is learned, shown to policies and reported on."""
    roots = [data_dir / name for name in _FOLDERS[size]] if data_dir is not None else []
    folder = find_data("WikiText", roots, _SOURCE)
    texts = [_read(folder, part) for part in ("valid", "test")]
    has_training = any(path.exists() for path in _files(folder, "train"))
    if has_training:
        texts.insert(0, _read(folder, "train"))
    else:
        half = len(texts[1]) // 2
        texts[1:] = [texts[1][:half], texts[1][half:]]
    return folder, texts


@lru_cache(maxsize=2)
def _token_splits(size: Size, data_dir: Path | None) -> tuple[Batch, dict[Split, Batch]]:
    """Disjoint windows of tokens, int32 ``[N, context + 1]``, and bytes of all but the first.

    The tokens are found in the text that is learned alone.
    """
    folder, texts = _texts(size, data_dir)
    tokenizer = Tokenizer.of(texts[0][:_TOKENIZER_BYTES], VOCABULARY[size])
    parts = []
    for text, at_most in zip(texts, _WINDOWS[size], strict=True):
        tokens = tokenizer.tokens(text)
        found = windows(tokens, _CONTEXT[size], at_most, folder)
        parts.append((found, tokenizer.byte_counts[found[:, 1:].long()].sum(1)))
    train, policy_eval, report = parts
    return train[:1], {"policy_eval": policy_eval, "report": report}


def _files(folder: Path, part: str) -> list[Path]:
    return [folder / name for name in (f"{part}.txt", f"wiki.{part}.tokens", f"wiki.{part}.raw")]


def _read(folder: Path, part: str) -> bytes:
    path = find_data("WikiText", _files(folder, part), _SOURCE)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _bytes(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(symbols: torch.Tensor, context: int, at_most: int, folder: Path) -> torch.Tensor:
    """Disjoint windows spread over a text, ``[N, context + 1]``.

    Args:
        symbols: bytes or tokens of the text, ``[L]``.
        context: of the model.
        at_most: windows.
        folder: where the text is from, for the message.

    Raises:
        DataError: it is too short.
    """
    count = len(symbols) // (context + 1)
    if count < 1:
        raise DataError(
            f"a text of {folder} has {len(symbols)} bytes or tokens, expected at least "
            f"{2 * context + 2}; get it again from {_SOURCE}"
        )
    found = symbols[: count * (context + 1)].view(count, context + 1)
    return found[torch.linspace(0, count - 1, min(at_most, count)).long()]


class LanguageModel(Task):
    """GPT over bytes. At the largest budget, four, the small text is read about once."""

    name = "language_model"
    metric = "bits_per_byte"
    higher_is_better = False
    eval_batch_size = 64
    small_steps: ClassVar[int] = 250
    _models: ClassVar[dict[Size, GPTConfig]] = {
        "small": GPTConfig(context=64, width=64, layers=2, heads=4),
        "full": GPTConfig(context=512, width=512, layers=8, heads=8),
    }

    def __init__(self, size: Size, data_dir: Path | None) -> None:
        training, held_out = self.splits(size, data_dir)
        small = size == "small"
        batch = 16 if small else 32
        steps = self.small_steps if small else 5_000
        super().__init__(training, held_out, steps=steps, batch_size=batch)
        self.config = self._models[size]

    def splits(self, size: Size, data_dir: Path | None) -> tuple[Batch, dict[Split, Batch]]:
        """What is learned, and what is held out."""
        return _splits(size, data_dir)

    def make_model(self) -> nn.Module:
        return GPT(self.config, seed=int(torch.randint(2**31, ()).item()))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        assert isinstance(model, GPT)
        return model.loss(batch[0].long())

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        nats = self.loss(model, batch).item()
        return Scores(nats, {"bits_per_byte": nats / math.log(2)})


class LanguageModelNarrow(LanguageModel):
    """The same, half as wide."""

    name = "language_model_narrow"
    _models: ClassVar[dict[Size, GPTConfig]] = {
        "small": GPTConfig(context=64, width=32, layers=2, heads=4),
        "full": GPTConfig(context=512, width=256, layers=8, heads=8),
    }


class LanguageModelWide(LanguageModel):
    """The same, twice as wide."""

    name = "language_model_wide"
    _models: ClassVar[dict[Size, GPTConfig]] = {
        "small": GPTConfig(context=64, width=128, layers=2, heads=4),
        "full": GPTConfig(context=512, width=1_024, layers=8, heads=16),
    }


class LanguageModelBPE(LanguageModel):
    """GPT over byte pairs; held-out windows come with the bytes that their losses are of.

    Its loss is of a token, its metric of a byte, which those of other vocabularies compare with.
    """

    name = "language_model_bpe"
    small_steps = 125
    _models: ClassVar[dict[Size, GPTConfig]] = {
        size: replace(config, vocabulary=VOCABULARY[size])
        for size, config in LanguageModel._models.items()
    }

    def splits(self, size: Size, data_dir: Path | None) -> tuple[Batch, dict[Split, Batch]]:
        return _token_splits(size, data_dir)

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        tokens, byte_counts = batch
        nats = self.loss(model, batch).item()
        tokens_per_byte = tokens[:, 1:].numel() / byte_counts.sum().item()
        return Scores(nats, {"bits_per_byte": nats / math.log(2) * tokens_per_byte})
