"""Triton's steps over pieces of tensors, in its interpreter: the same as with whole ones."""

from __future__ import annotations

from typing import Any

import fuzz
import pytest
from cases import INTERPRETED
from distributed.launch import run_ranks
from distributed.runs import few_bits, triton_trajectory
from distributed.same import assert_same

CASES = [("lhopt", "skip", 2), ("lhopt_delayed", "mask", 1)] if INTERPRETED else []


@pytest.mark.parametrize(("options", "nonfinite", "messages"), CASES)
def test_equals_one_rank(options: str, nonfinite: str, messages: int) -> None:
    first, second = run_ranks(triton_trajectory, 2, options, nonfinite)
    assert_same(first, "triton", options)
    assert first["bits"] == second["bits"]
    assert first["messages"][-1] == messages


WAYS = [("int8", "split8"), ("bfloat16", "split16")] if INTERPRETED else []


@pytest.mark.parametrize(("moments", "master_weights"), WAYS)
def test_few_bits_are_those_of_the_whole(moments: Any, master_weights: Any) -> None:
    keywords = {"backend": "triton", "moments": moments, "master_weights": master_weights}
    of_two = run_ranks(few_bits, 2, keywords)
    (alone,) = run_ranks(few_bits, 1, keywords)
    assert of_two == [alone] * 2
    (other,) = run_ranks(few_bits, 1, {**keywords, "eps": 1e-4})
    assert other != alone


@pytest.mark.parametrize("count", [4] if INTERPRETED else [])
def test_random_combinations_agree_with_the_reference(count: int) -> None:
    """As in ``tests/test_fuzz.py``, with Triton's kernels in place of the C++."""
    sharded = [number for number in range(60) if fuzz.drawn(2, number).is_in_pieces]
    assert fuzz.failures(2, sharded[:count], fast="triton") == {}
