"""Sentiment of sentences, SST-2: an LSTM and a small transformer over words."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F

from lhopt_fused.evaluation.task import Batch, DataError, Size, Split, find_data
from lhopt_fused.evaluation.tasks.supervised import Classification

__all__ = ["SentimentLSTM", "SentimentTransformer", "read_sentences"]

_SOURCE: Final = (
    "https://nlp.stanford.edu/sentiment or GLUE: sst-2/train.tsv, sst-2/dev.tsv and "
    "sst-2/test.tsv with a sentence, a tab and 0 or 1 in each line"
)
_LENGTH: Final = 40  # words of a sentence that are read
_WORDS: Final = 5_000
_NOTHING: Final = 0
_UNKNOWN: Final = 1


def read_sentences(path: Path) -> list[tuple[list[str], int]]:
    """Words and label of each line; a header of GLUE's is left out.

    Raises:
        DataError: a line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); get it from {_SOURCE}") from error
    found = []
    for number, line in enumerate(lines, 1):
        sentence, _, label = line.rpartition("\t")
        if number == 1 and label == "label":
            continue
        if label not in ("0", "1"):
            raise DataError(
                f"{path}: line {number} is {line[:60]!r}, expected a sentence, a tab and 0 or 1; "
                f"get it from {_SOURCE}"
            )
        found.append((sentence.split(), int(label)))
    return found


@lru_cache(maxsize=2)
def _splits(data_dir: Path | None) -> tuple[Batch, dict[Split, Batch], int]:
    roots = [data_dir / "sst-2"] if data_dir is not None else []
    folder = find_data("SST-2", roots, _SOURCE)
    train, dev, test = (
        read_sentences(find_data("SST-2", [folder / f"{part}.tsv"], _SOURCE))
        for part in ("train", "dev", "test")
    )
    counts = Counter(word for words, _ in train for word in words)
    known = sorted(counts, key=lambda word: (-counts[word], word))[: _WORDS - 2]
    indices = {word: index for index, word in enumerate(known, start=2)}
    splits: dict[Split, Batch] = {
        "policy_eval": _encoded(dev, indices),
        "report": _encoded(test, indices),
    }
    return _encoded(train, indices), splits, 2 + len(known)


def _encoded(sentences: list[tuple[list[str], int]], indices: dict[str, int]) -> Batch:
    """Words ``[N, 40]``, zero after the end, and labels ``[N]``; int64."""
    words = torch.zeros(len(sentences), _LENGTH, dtype=torch.int64)
    for row, (sentence, _) in enumerate(sentences):
        found = [indices.get(word, _UNKNOWN) for word in sentence[:_LENGTH]] or [_UNKNOWN]
        words[row, : len(found)] = torch.tensor(found)
    return words, torch.tensor([label for _, label in sentences])


class _LSTM(nn.Module):
    """The mean of an LSTM's outputs over a sentence, both ways."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 2)

    def forward(self, words: torch.Tensor) -> torch.Tensor:  # [batch, length] -> [batch, 2]
        outputs = self.lstm(self.token(words))[0]
        logits: torch.Tensor = self.head(_mean_of(outputs, words))
        return logits


class _Transformer(nn.Module):
    """Attention over a sentence, then the mean."""

    def __init__(self, words: int, width: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(words, width)
        self.position = nn.Embedding(_LENGTH, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, words: torch.Tensor) -> torch.Tensor:  # [batch, length] -> [batch, 2]
        x = self.token(words) + self.position.weight
        outputs = self.layers(x, src_key_padding_mask=words == _NOTHING)
        logits: torch.Tensor = self.head(F.dropout(_mean_of(outputs, words), 0.1, self.training))
        return logits


def _mean_of(outputs: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Over the words that there are: ``[B, L, D]`` -> ``[B, D]``."""
    there = (words != _NOTHING)[..., None].to(outputs.dtype)
    return (outputs * there).sum(1) / there.sum(1)


class _Sentiment(Classification):
    def __init__(self, size: Size, data_dir: Path | None) -> None:
        training, held_out, self.words = _splits(data_dir)
        steps = 200 if size == "small" else 2_000
        super().__init__(training, held_out, steps=steps, batch_size=32)
        self.width = 32 if size == "small" else 256


class SentimentLSTM(_Sentiment):
    """A bidirectional LSTM."""

    name = "sentiment_lstm"

    def make_model(self) -> nn.Module:
        return _LSTM(self.words, self.width)


class SentimentTransformer(_Sentiment):
    """A transformer of two or four layers."""

    name = "sentiment_transformer"

    def make_model(self) -> nn.Module:
        return _Transformer(self.words, self.width, 2 if self.width == 32 else 4)
