"""The actions in plain numbers are those of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import PLAIN_ACTIONS, assert_close

from lhopt_fused.actions import ACTIONS, Action, apply_shifts, relative_to_start
from lhopt_fused.policy.plain import moved, relative

VALUES = st.one_of(
    st.floats(1e-9, 1.0),
    st.sampled_from([0.0, -1.0, 1.0, 2.0, 5e-324, 1e308, math.nan, math.inf, -math.inf]),
)
SHIFTS = st.one_of(st.floats(-3.0, 3.0), st.sampled_from([0.0, 1e-300, -800.0, 745.0]))


def differs(plain: list[float], tensors: torch.Tensor) -> bool:
    try:
        assert_close(torch.tensor(plain, dtype=torch.float64), tensors, PLAIN_ACTIONS, 1.0)
    except AssertionError:
        return True
    return False


def compare(
    of_one: Callable[[float, float, Action], float],
    of_all: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: list[float],
    others: list[float],
) -> bool:
    plain = list(map(of_one, values, others, ACTIONS))
    rows = [torch.tensor(row, dtype=torch.float64) for row in (values, others)]
    return differs(plain, of_all(*rows))


def eight(elements: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    return st.lists(elements, min_size=len(ACTIONS), max_size=len(ACTIONS))


@given(eight(VALUES), eight(SHIFTS))
def test_moved_is_apply_shifts(values: list[float], shifts: list[float]) -> None:
    assert not compare(moved, apply_shifts, values, shifts)


@given(eight(VALUES), eight(VALUES))
def test_relative_is_relative_to_start(values: list[float], starts: list[float]) -> None:
    assert not compare(relative, relative_to_start, values, starts)


def wrong_twins() -> Iterator[tuple[Callable[..., float], Callable[..., torch.Tensor]]]:
    yield lambda v, s, a: moved(v, s * (1 + 1e-9), a), apply_shifts
    yield lambda v, s, a: v * math.exp(s), apply_shifts  # without bounds and logits
    yield lambda v, s, a: relative(v, s * (1 + 1e-9), a), relative_to_start


def test_wrong_twins_are_told_apart() -> None:
    values, others = [0.01, 0.2, 0.09, 0.5, 0.3, 0.7, 0.4, 0.9], [0.3] * 8
    for plain, tensors in wrong_twins():
        assert compare(plain, tensors, values, others)
