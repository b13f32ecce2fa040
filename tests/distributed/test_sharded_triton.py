"""Triton's steps over pieces of tensors, in its interpreter: the same as with whole ones."""

from __future__ import annotations

import pytest
from cases import INTERPRETED
from distributed.launch import run_ranks
from distributed.runs import triton_trajectory
from distributed.same import assert_same

CASES = [("lhopt", "skip", 2), ("lhopt_delayed", "mask", 1)] if INTERPRETED else []


@pytest.mark.parametrize(("options", "nonfinite", "messages"), CASES)
def test_equals_one_rank(options: str, nonfinite: str, messages: int) -> None:
    first, second = run_ranks(triton_trajectory, 2, options, nonfinite)
    # what exact trust ratios do without is not remembered
    if options == "lhopt":
        del first["norms"]
    assert_same({"norms": ([], []), **first}, "triton")
    assert first["bits"] == second["bits"]
    assert first["messages"][-1] == messages
