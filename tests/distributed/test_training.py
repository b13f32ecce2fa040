"""Models that ranks train together: decisions, checkpoints, disagreements, deaths."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from distributed.kills import survive
from distributed.launch import Launched, run_ranks
from distributed.runs import bits
from distributed.training import (
    STEPS,
    decisions,
    disagreements,
    leg,
    make_model,
    one_dies,
    refusals,
    registers_saved,
    through_full_states,
)
from distributed.worlds import GPUS, on, worlds
from tolerances import SHARDED_RUN, assert_close

# ------------------------------------------------------------------ decisions


WORLDS = [("cpu", 2), ("cpu", 4), *([("cuda", GPUS)] if GPUS else [])]
KINDS = [(device, kind) for device in ("cpu", "cuda") for kind in ("ddp", "fsdp")]
KINDS += [("cuda", "offloaded")]


@functools.cache
def decided(device: str, ranks: int) -> list[dict[str, dict[str, Any]]]:
    """What each rank has decided and reached."""
    return run_ranks(decisions, ranks, device=device)


@pytest.mark.parametrize(
    ("device", "ranks", "kind"),
    [on(*world, kind) for world in WORLDS for device, kind in KINDS if device == world[0]],
)
def test_ranks_decide_the_same_as_one_with_all_the_data(device: str, ranks: int, kind: str) -> None:
    of_ranks = decided(device, ranks)
    first, alone = of_ranks[0][kind], of_ranks[0]["alone"]
    for other in of_ranks:
        assert other[kind]["bits"] == first["bits"]
        assert other[kind]["decided"] == first["decided"]
        assert other[kind]["losses"] == first["losses"]
    for value, expected in zip(first["params"], alone["params"], strict=True):
        assert_close(value, expected, SHARDED_RUN, expected.abs().max())
    for mine, whole in zip(first["decided"], alone["decided"], strict=True):
        assert mine == pytest.approx(whole, rel=SHARDED_RUN.relative)
    assert first["losses"] == pytest.approx(alone["losses"], rel=SHARDED_RUN.relative)


@pytest.mark.parametrize(("device", "ranks"), [on(*world) for world in WORLDS])
def test_every_outer_step_decides(device: str, ranks: int) -> None:
    rates = [step["lr"] for step in decided(device, ranks)[0]["fsdp"]["decided"]]
    assert len(set(rates)) == len(rates)


@pytest.mark.parametrize(("device", "ranks"), worlds(2))
def test_frozen_parameters_stay_and_take_nothing(device: str, ranks: int) -> None:
    before = bits([p.detach() for p in make_model().parameters() if p.dim() == 2])
    outcomes = run_ranks(decisions, ranks, True, device=device)
    for found in outcomes:
        for name in found:
            assert found[name]["frozen"] == before
            assert found[name]["have_state"] == [True] * 3
            assert found[name]["bits"] == outcomes[0][name]["bits"]
        expected = found["alone"]["params"]
        for name in found:
            for value, param in zip(found[name]["params"], expected, strict=True):
                assert_close(value, param, SHARDED_RUN, param.abs().max())


# ------------------------------------------------------------------ checkpoints


@functools.cache
def legs(device: str, *ranks: int) -> dict[str, Any]:
    """One run on so many ranks in turn; one on the first number throughout, and one resumed."""
    with tempfile.TemporaryDirectory() as folder:
        at = {name: f"{folder}/{name}" for name in ("5", "8", "12", "a", "b")}

        def first_rank(count: int, *arguments: Any) -> Any:
            return run_ranks(leg, count, *arguments, device=device)[0]

        return {
            "first": first_rank(ranks[0], None, at["5"], 0, 5),
            "second": first_rank(ranks[1], at["5"], at["8"], 5, 8),
            "third": first_rank(ranks[2], at["8"], at["12"], 8, STEPS),
            "throughout": first_rank(ranks[0], None, at["a"], 0, STEPS),
            "resumed": first_rank(ranks[0], at["5"], at["b"], 5, STEPS),
        }


LEGS = [on("cpu", 2, 1, 4), *([on("cuda", GPUS, 1, GPUS)] if GPUS else [])]


@pytest.mark.parametrize(("device", "first", "second", "third"), LEGS)
def test_loads_on_other_numbers_of_ranks(device: str, first: int, second: int, third: int) -> None:
    of = legs(device, first, second, third)
    for before, after in (("first", "second"), ("second", "third")):
        saved, begun = of[before][1], of[after][0]
        assert begun["bits"] == saved["bits"]
        assert begun["decided"] == saved["decided"]
    reached, expected = of["third"][1], of["throughout"][1]
    for value, wanted in zip(reached["params"], expected["params"], strict=True):
        assert_close(value, wanted, SHARDED_RUN, wanted.abs().max())
    for mine, wanted in zip(reached["decided"], expected["decided"], strict=True):
        assert mine == pytest.approx(wanted, rel=SHARDED_RUN.relative)


@pytest.mark.parametrize(("device", "first", "second", "third"), LEGS)
def test_resumes_bit_identical_on_as_many_ranks(
    device: str, first: int, second: int, third: int
) -> None:
    of = legs(device, first, second, third)
    assert of["resumed"][1]["bits"] == of["throughout"][1]["bits"]
    assert of["resumed"][1]["decided"] == of["throughout"][1]["decided"]
    assert of["resumed"][1]["bits"] != of["first"][1]["bits"]


@pytest.mark.parametrize(("device", "first", "second", "third"), LEGS)
def test_codes_and_split_masters_do_not_see_the_number_of_ranks(
    device: str, first: int, second: int, third: int
) -> None:
    """On one number of ranks after the other the same bits, each tensor in its own dtype."""
    of = {name: outcome[2] for name, outcome in legs(device, first, second, third).items()}
    for before, after in (("first", "second"), ("second", "third"), ("first", "resumed")):
        assert of[after][0] == of[before][1]
    assert of["third"][1] == of["throughout"][1] == of["resumed"][1]
    assert of["third"][1] != of["second"][1]
    kept = ["torch.int8", "torch.bfloat16", "torch.uint8", "torch.bfloat16", "torch.int8"]
    assert of["third"][2] == of["first"][2] == kept


@pytest.mark.parametrize(
    ("kind", "from_first"),
    [
        ("sharded", False),
        ("sharded", True),
        ("split16", False),
        ("split16", True),
        ("registers", False),
    ],
)
@pytest.mark.parametrize(("device", "ranks"), worlds(2))
def test_goes_on_with_whole_states(device: str, ranks: int, kind: str, from_first: bool) -> None:
    """As those write that keep a checkpoint in one file."""
    found = run_ranks(through_full_states, ranks, kind, from_first, device=device)
    for throughout, resumed in found:
        assert resumed["bits"] == throughout["bits"]


def test_registers_do_not_get_lost_in_whole_states_of_one_rank() -> None:
    """torch broadcasts no tensor that the other optimizers do not have yet."""
    with pytest.raises(RuntimeError, match="load it on every rank"):
        run_ranks(through_full_states, 2, "registers", True)


def test_registers_in_use_go_into_a_checkpoint(tmp_path: Path) -> None:
    for found in run_ranks(registers_saved, 2, str(tmp_path)):
        assert any(found["held"])
        assert any("load" in used or "swap" in used for used in found["used"])
        throughout, resumed = found["bits"]
        assert throughout == resumed


def test_killed_runs_end_bit_identical() -> None:
    survival = survive(3, seed=1)
    assert survival.kills >= 3
    assert survival.equal == survival.ended >= 1


# ------------------------------------------------------------------ what can go wrong

DISAGREEMENTS = {
    "shape": "ranks disagree on parameters: ranks [{last}] differ from rank 0",
    "number": "ranks disagree on parameters",
    "options": "Trust.EXACT",
    "lr": "ranks disagree on hyperparameters",
    "policy": "ranks disagree on the policy",
    "draws": "'seed': 1",
    "presence": "gradients of parameters that other ranks have none of",
}


@pytest.mark.parametrize(("device", "ranks"), worlds(3, fewest_gpus=2))
def test_ranks_that_disagree_all_get_the_error(device: str, ranks: int) -> None:
    first, *others = run_ranks(disagreements, ranks, device=device)
    assert all(other == first for other in others)
    assert set(first) == set(DISAGREEMENTS)
    for name, message in DISAGREEMENTS.items():
        kind, text = first[name]
        assert kind == "RanksDisagreeError"
        assert message.replace("{last}", str(ranks - 1)) in text


REFUSALS = {
    "partial": "yet to be summed over ranks",
    "alone": "process_group=None",
    "signs": "keep_grad_signs",
    "stochastic": "rounding='stochastic'",
    "placements": "the gradient of parameter 0 has the placements (Replicate(),)",
    "columns": "multiples of 64: shard dimension 0, or use moments='bfloat16'",
    "middle": "in pieces that cut blocks of 64 elements",
    "registers": "restart registers hold whole tensors",
}


def test_what_pieces_cannot_do_is_refused() -> None:
    for found in run_ranks(refusals, 2):
        assert set(found) == set(REFUSALS)
        for name, message in REFUSALS.items():
            assert found[name][0] == "ValueError"
            assert message in found[name][1]


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_others_end_with_an_error(how: str) -> None:
    """At once where a rank dies; after the timeout of the process group where it hangs."""
    outcomes = Launched(one_dies, 3, how, patience=3.0).outcomes()
    assert outcomes[:2] == [(True, "RuntimeError")] * 2
