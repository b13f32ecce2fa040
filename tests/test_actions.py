"""Actions: bounds, inverses, what stays untouched, and which descriptions are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lhopt_fused.actions import (
    ACTIONS,
    REGISTER_CHOICES,
    Action,
    ActionSpace,
    apply_shifts,
    relative_to_start,
)
from lhopt_fused.types import HYPERPARAMETERS

START = torch.tensor([1e-3, 0.1, 1e-2, 1e-6, 1e-2, 0.8, 1e-2, 0.05], dtype=torch.float64)
LOW = torch.tensor([action.low for action in ACTIONS], dtype=torch.float64)
HIGH = torch.tensor([action.high for action in ACTIONS], dtype=torch.float64)


def test_the_actions_are_the_published_ones() -> None:
    assert tuple(action.name for action in ACTIONS) == HYPERPARAMETERS
    clip = ACTIONS[HYPERPARAMETERS.index("group_clip_grad_norm")]
    assert clip == Action("group_clip_grad_norm", "logit", (-1, -0.3, 0.3, 1), 1e-10, 1 - 1e-10)
    assert [len(action.choices) for action in ACTIONS] == [7, 2, 2, 2, 2, 4, 3, 3]
    assert ActionSpace(ACTIONS, registers=True).head_sizes[-1] == 10
    assert REGISTER_CHOICES[:4] == ("keep", "load_0", "save_0", "swap_0")


def test_choices_do_what_they_say() -> None:
    """Each choice of each action, taken alone from the start."""
    for index, action in enumerate(ACTIONS):
        for choice, shift in zip(action.choices, action.shifts, strict=True):
            shifts = torch.zeros(8, dtype=torch.float64)
            shifts[index] = shift
            value = START[index].item()
            moved = apply_shifts(START, shifts)[index].item()
            if action.kind == "scale":
                expected = value * choice
            else:
                expected = 1 / (1 + (1 - value) / value * math.exp(-choice))
            assert moved == pytest.approx(min(max(expected, action.low), action.high), rel=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-800, 800), min_size=8, max_size=8))
def test_never_out_of_bounds(shifts: list[float]) -> None:
    moved = apply_shifts(START.expand(3, 8), torch.tensor(shifts, dtype=torch.float64))
    assert bool(((moved >= LOW) & (moved <= HIGH) | (moved == START)).all())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-0.5, 0.5), min_size=8, max_size=8))
def test_relative_to_start_is_the_inverse(shifts: list[float]) -> None:
    wanted = torch.tensor(shifts, dtype=torch.float64)
    moved = apply_shifts(START, wanted)
    assert torch.allclose(relative_to_start(moved, START), wanted, rtol=0, atol=1e-9)


def test_a_shift_of_0_and_what_a_group_does_without_stay_to_the_bit() -> None:
    """Even out of bounds: 'fixed' never acts, and a group without clipping has no clip."""
    values = torch.tensor([5.0, 0.3, 0.7, 0.0, 0.0, 1.0 / 3.0, 0.1, 0.1], dtype=torch.float64)
    assert torch.equal(apply_shifts(values, torch.zeros(8, dtype=torch.float64)), values)
    ones = torch.ones(8, dtype=torch.float64)
    assert apply_shifts(torch.full_like(ones, torch.nan), ones).isnan().all()
    assert not apply_shifts(torch.zeros_like(ones), ones).any()
    assert not torch.equal(apply_shifts(values, 1e-9 * ones), values)


@pytest.mark.parametrize("registers", [False, True])
def test_json_round_trip(registers: bool) -> None:
    space = ActionSpace(ACTIONS, registers)
    assert ActionSpace.from_json(json.loads(json.dumps(space.to_json()))) == space


def _put(*path: str | int, value: object) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def _drop(*path: str | int) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("registers"), r"action_space\.registers is missing"),
        (_put("colour", value=1), r"action_space\.colour is unknown"),
        (_put("registers", value=["keep"]), r"action_space\.registers is \['keep'\]"),
        (_put("actions", value=7), r"action_space\.actions is 7, expected a list"),
        (_put("actions", 0, "name", value="lrr"), r"actions\[0\]: name is 'lrr'"),
        (_put("actions", 0, "name", value=3), r"actions\[0\]\.name is 3, expected a string"),
        (_put("actions", 1, "kind", value="add"), r"ombeta1\.kind is 'add'"),
        (_put("actions", 0, "choices", value=[]), r"lr\.choices has 0 entries"),
        (_put("actions", 0, "choices", 2, value=-1), r"lr\.choices\[2\] is -1"),
        (_put("actions", 0, "choices", 2, value="2"), r"actions\[0\]\.choices\[2\] is '2'"),
        (_put("actions", 0, "choices", 0, value=True), r"choices\[0\] is True"),
        (_put("actions", 0, "low", value=math.nan), r"lr\.low is nan"),
        (_put("actions", 0, "high", value=10**400), r"actions\[0\]\.high is too large"),
        (_put("actions", 5, "high", value=1.0), r"group_clip_grad_norm\.low is 1e-10 and high"),
        (_drop("actions", 3), r"actions are for lr, ombeta1, ombeta2, weight_decay"),
    ],
)
def test_other_descriptions_are_refused_by_field(
    change: Callable[[Any], None], message: str
) -> None:
    data = ActionSpace(ACTIONS).to_json()
    change(data)
    with pytest.raises(ValueError, match=message):
        ActionSpace.from_json(data)


def test_the_difference_is_named() -> None:
    space = ActionSpace(ACTIONS)
    assert space.difference(ActionSpace(ACTIONS)) is None
    other = ActionSpace((replace(ACTIONS[0], high=0.5), *ACTIONS[1:]))
    assert space.difference(other) == "lr.high is 0.5, expected 1.0"
    registers = ActionSpace(ACTIONS, registers=True)
    assert space.difference(registers) == "registers is True, expected False"
