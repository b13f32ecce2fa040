"""Models that ranks train together: decisions, checkpoints, disagreements, deaths."""

from __future__ import annotations

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
    with_registers,
)
from tolerances import SHARDED_RUN, assert_close

# ------------------------------------------------------------------ decisions


@pytest.fixture(scope="module", params=[2, 4])
def decided(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    """What each rank has decided and reached."""
    return run_ranks(decisions, request.param)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_decide_the_same_as_one_with_all_the_data(
    decided: list[dict[str, dict[str, Any]]], kind: str
) -> None:
    first, alone = decided[0][kind], decided[0]["alone"]
    for other in decided:
        assert other[kind]["bits"] == first["bits"]
        assert other[kind]["decided"] == first["decided"]
        assert other[kind]["losses"] == first["losses"]
    for value, expected in zip(first["params"], alone["params"], strict=True):
        assert_close(value, expected, SHARDED_RUN, expected.abs().max())
    for mine, whole in zip(first["decided"], alone["decided"], strict=True):
        assert mine == pytest.approx(whole, rel=SHARDED_RUN.relative)
    assert first["losses"] == pytest.approx(alone["losses"], rel=SHARDED_RUN.relative)


def test_every_outer_step_decides(decided: list[dict[str, dict[str, Any]]]) -> None:
    rates = [step["lr"] for step in decided[0]["fsdp"]["decided"]]
    assert len(set(rates)) == len(rates)


def test_frozen_parameters_stay_and_take_nothing() -> None:
    before = bits([p.detach() for p in make_model().parameters() if p.dim() == 2])
    outcomes = run_ranks(decisions, 2, True)
    for found in outcomes:
        for name in ("ddp", "fsdp", "alone"):
            assert found[name]["frozen"] == before
            assert found[name]["have_state"] == [True] * 3
            assert found[name]["bits"] == outcomes[0][name]["bits"]
        expected = found["alone"]["params"]
        for name in ("ddp", "fsdp"):
            for value, param in zip(found[name]["params"], expected, strict=True):
                assert_close(value, param, SHARDED_RUN, param.abs().max())


# ------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run on 2, then 1, then 4 ranks; one on 2 throughout, and one resumed on 2."""
    at = {name: str(tmp_path_factory.mktemp("run") / name) for name in ("5", "8", "12", "a", "b")}
    return {
        "on 2": run_ranks(leg, 2, None, at["5"], 0, 5)[0],
        "on 1": run_ranks(leg, 1, at["5"], at["8"], 5, 8)[0],
        "on 4": run_ranks(leg, 4, at["8"], at["12"], 8, STEPS)[0],
        "throughout": run_ranks(leg, 2, None, at["a"], 0, STEPS)[0],
        "resumed": run_ranks(leg, 2, at["5"], at["b"], 5, STEPS)[0],
    }


def test_loads_on_other_numbers_of_ranks(legs: dict[str, Any]) -> None:
    for before, after in (("on 2", "on 1"), ("on 1", "on 4")):
        saved, begun = legs[before][1], legs[after][0]
        assert begun["bits"] == saved["bits"]
        assert begun["decided"] == saved["decided"]
    reached, expected = legs["on 4"][1], legs["throughout"][1]
    for value, of_two in zip(reached["params"], expected["params"], strict=True):
        assert_close(value, of_two, SHARDED_RUN, of_two.abs().max())
    for mine, of_two in zip(reached["decided"], expected["decided"], strict=True):
        assert mine == pytest.approx(of_two, rel=SHARDED_RUN.relative)


def test_resumes_bit_identical_on_as_many_ranks(legs: dict[str, Any]) -> None:
    assert legs["resumed"][1]["bits"] == legs["throughout"][1]["bits"]
    assert legs["resumed"][1]["decided"] == legs["throughout"][1]["decided"]
    assert legs["resumed"][1]["bits"] != legs["on 2"][1]["bits"]


def test_codes_and_split_masters_do_not_see_the_number_of_ranks(legs: dict[str, Any]) -> None:
    """On 2, 1 and 4 ranks the same bits as on 2 throughout, each tensor in its own dtype."""
    for before, after in (("on 2", "on 1"), ("on 1", "on 4"), ("on 2", "resumed")):
        assert legs[after][2][0] == legs[before][2][1]
    assert legs["on 4"][2][1] == legs["throughout"][2][1] == legs["resumed"][2][1]
    assert legs["on 4"][2][1] != legs["on 1"][2][1]
    kept = ["torch.int8", "torch.bfloat16", "torch.uint8", "torch.bfloat16", "torch.int8"]
    assert legs["on 4"][2][2] == legs["on 2"][2][2] == kept


def test_registers_in_use_go_into_a_checkpoint(tmp_path: Path) -> None:
    for found in run_ranks(with_registers, 2, str(tmp_path)):
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
    "shape": "ranks disagree on parameters: ranks [2] differ from rank 0",
    "number": "ranks disagree on parameters",
    "options": "Trust.EXACT",
    "lr": "ranks disagree on hyperparameters",
    "policy": "ranks disagree on the policy",
    "draws": "'seed': 1",
    "presence": "gradients of parameters that other ranks have none of",
}


def test_ranks_that_disagree_all_get_the_error() -> None:
    first, *others = run_ranks(disagreements, 3)
    assert all(other == first for other in others)
    assert set(first) == set(DISAGREEMENTS)
    for name, message in DISAGREEMENTS.items():
        kind, text = first[name]
        assert kind == "RanksDisagreeError"
        assert message in text


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
