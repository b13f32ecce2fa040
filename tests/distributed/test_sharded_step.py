"""Steps over pieces of tensors on 2 and 4 ranks: the same as one rank's with whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
from cases import CIAO_OPTIONS
from distributed.launch import run_ranks
from distributed.runs import CASES, trajectories
from distributed.same import assert_same

Found = dict[tuple[str, str, str], dict[str, Any]]

LAYOUTS = [(2, "sharded_by_rows"), (4, "sharded_by_rows"), (4, "sharded_in_many_ways")]


@pytest.fixture(scope="module")
def found() -> dict[int, list[Found]]:
    """By number of ranks, what each rank has found."""
    return {ranks: run_ranks(trajectories, ranks) for ranks in (2, 4)}


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
@pytest.mark.parametrize(("backend", "options"), CASES)
def test_equals_one_rank(
    found: dict[int, list[Found]], ranks: int, layout: str, backend: str, options: str
) -> None:
    assert_same(found[ranks][0][layout, backend, options], backend)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS[2:])
def test_copies_that_count_each_are_seen(
    found: dict[int, list[Found]], ranks: int, layout: str
) -> None:
    with pytest.raises(AssertionError):
        assert_same(found[ranks][0][layout, "wrong", "lhopt"], "cpu")


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_is_bit_identical_on_every_rank_and_in_every_run(
    found: dict[int, list[Found]], ranks: int, layout: str
) -> None:
    for key, outcome in found[ranks][0].items():
        assert {of[key]["bits"] for of in found[ranks]} == {outcome["bits"]}
    once, again, wrong = (
        found[ranks][0][layout, k, "lhopt"]["bits"] for k in ("cpu", "again", "wrong")
    )
    assert once == again
    assert once != wrong  # each layout has a tensor of which every rank has a copy


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
@pytest.mark.parametrize("options", CIAO_OPTIONS)
def test_messages_are_one_a_step_or_two_with_exact_trust(
    found: dict[int, list[Found]], ranks: int, layout: str, options: str
) -> None:
    keywords = CIAO_OPTIONS[options]
    is_exact = "lamb_power" in keywords and keywords.get("trust") != "delayed"
    messages = found[ranks][0][layout, "cpu", options]["messages"]
    assert messages == [2, 2] if is_exact else [1, 1]
