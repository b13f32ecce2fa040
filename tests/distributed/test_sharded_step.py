"""Steps over pieces of tensors on several ranks: the same as one rank's with whole tensors.

On the CPU, and where there are GPUs.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from cases import CIAO_OPTIONS
from distributed.launch import run_ranks
from distributed.runs import CASES, FUSED, trajectories, uses_exact_trust
from distributed.same import assert_same
from distributed.worlds import GPUS, on

Found = dict[tuple[str, str, str], dict[str, Any]]

WORLDS = [("cpu", ranks, "sharded_by_rows") for ranks in (1, 2, 4)]
WORLDS += [("cpu", 4, "sharded_in_many_ways")]
WORLDS += [("cuda", GPUS, "sharded_by_rows")] if GPUS else []


@functools.cache
def found(device: str, ranks: int) -> list[Found]:
    """What each rank has found."""
    return run_ranks(trajectories, ranks, device=device)


@pytest.mark.parametrize(
    ("device", "ranks", "layout", "backend", "options"),
    [on(*world, *case) for world in WORLDS for case in CASES[world[0]]],
)
def test_equals_one_rank(device: str, ranks: int, layout: str, backend: str, options: str) -> None:
    assert_same(found(device, ranks)[0][layout, backend, options], backend, options)


@pytest.mark.parametrize(("device", "ranks", "layout"), [on(*world) for world in WORLDS])
def test_copies_that_are_counted_otherwise_are_seen(device: str, ranks: int, layout: str) -> None:
    with pytest.raises(AssertionError):
        assert_same(found(device, ranks)[0][layout, "wrong", "lhopt"], FUSED[device], "lhopt")


@pytest.mark.parametrize(("device", "ranks", "layout"), [on(*world) for world in WORLDS])
def test_is_bit_identical_on_every_rank_and_in_every_run(
    device: str, ranks: int, layout: str
) -> None:
    of_ranks = found(device, ranks)
    for key, outcome in of_ranks[0].items():
        assert {of_rank[key]["bits"] for of_rank in of_ranks} == {outcome["bits"]}
    once, again, wrong = (
        of_ranks[0][layout, k, "lhopt"]["bits"] for k in (FUSED[device], "again", "wrong")
    )
    assert once == again
    assert once != wrong  # each layout has a tensor of which every rank has a copy


@pytest.mark.parametrize("options", CIAO_OPTIONS)
@pytest.mark.parametrize(("device", "ranks", "layout"), [on(*world) for world in WORLDS])
def test_messages_are_one_a_step_or_two_with_exact_trust(
    device: str, ranks: int, layout: str, options: str
) -> None:
    messages = found(device, ranks)[0][layout, FUSED[device], options]["messages"]
    assert messages == [2, 2] if uses_exact_trust(options) else [1, 1]
