"""Text as tokens: byte pairs, found in the text that is learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lhopt_fused.evaluation.task import find_package

__all__ = ["Tokenizer"]


class Tokenizer:
    """Byte pairs of the library ``tokenizers``; no text is without tokens.

    Args:
        made: of that library, with a model of byte pairs over bytes.

    Attributes:
        byte_counts: bytes of each token, int64 ``[vocabulary]``.
    """

    def __init__(self, made: Any) -> None:
        self._made = made
        names = [made.id_to_token(number) for number in range(made.get_vocab_size())]
        self.byte_counts = torch.tensor([len(name) for name in names])  # a letter stands for a byte

    @classmethod
    def of(cls, text: bytes, vocabulary: int) -> Tokenizer:
        """Find the tokens of a text: its bytes, and what is frequent beside one another.

        Args:
            text: in UTF-8.
            vocabulary: tokens, at most; 256 and more.

        Raises:
            DataError: the library is missing.
        """
        library: Any = find_package("tokenizers", "byte pairs need")
        made = library.Tokenizer(library.models.BPE())
        made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(_lines(text), trainer)
        return cls(made)

    def tokens(self, text: bytes) -> torch.Tensor:
        """Of a text in UTF-8, int32; bytes that are none are left out."""
        parts = [found.ids for found in self._made.encode_batch(list(_lines(text)))]
        return torch.tensor([number for part in parts for number in part], dtype=torch.int32)


def _lines(text: bytes) -> Iterator[str]:
    yield from text.decode("utf-8", errors="ignore").splitlines(keepends=True)
