"""Text: deterministic, split without overlap, refused when too short."""

from __future__ import annotations

import math

import pytest
import torch

from lhopt_fused.demo.text import InputError, Text, read_topics


def test_topics_are_english_and_the_same_every_time():
    topics = read_topics()
    assert topics == read_topics()
    assert len(topics) > 300_000
    assert b"assert statement" in topics


def test_split_keeps_the_end_for_evaluation():
    text = Text.split(bytes(range(100)), 0.2, context=4)
    assert text.train.tolist() == list(range(80))
    assert text.held_out.tolist() == list(range(80, 100))


def test_batches_are_windows_of_the_training_part():
    text = Text.split(bytes(range(100)), 0.2, context=4)
    batch = text.batch(64, 4, torch.Generator().manual_seed(0))
    assert batch.shape == (64, 5)
    assert (batch.diff(dim=1) == 1).all()
    assert int(batch.max()) < 80


def test_eval_windows_are_disjoint_and_held_out():
    windows = Text.split(bytes(range(100)), 0.2, context=4).eval_windows(4, at_most=8)
    assert windows.flatten().tolist() == list(range(80, 100))


def test_unigram_entropy_of_one_fair_bit():
    text = Text.split(b"ab" * 50_000, 0.1, context=4)
    assert text.unigram_entropy() == pytest.approx(math.log(2), abs=0.01)


@pytest.mark.parametrize("size", [0, 49])
def test_short_text_is_refused_with_the_size_that_would_do(size):
    with pytest.raises(InputError, match=r"needs at least 50; give more text"):
        Text.split(b"a" * size, 0.1, context=4)
    Text.split(b"a" * 50, 0.1, context=4)
