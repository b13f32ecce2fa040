"""The C++ runner against the batched definition in Python, its state, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from policy.samples import SPACE, START, observation, of_run, random_policy

from lhopt_fused import _C
from lhopt_fused.actions import REGISTER_CHOICES, ActionSpace
from lhopt_fused.policy import DecisionMode, LearnedPolicy, policy_step
from lhopt_fused.policy.decision import initial_policy_state, uniform

PARITY = 1e-5
"""Float32 with two orders of summation over a dozen recurrent steps; relative to max(1, |x|)."""

MODES: tuple[DecisionMode, ...] = ("mean", "sample", "argmax")
STEPS = 12


@dataclass
class Comparison:
    """The largest errors over many sequences, and how many went separate ways."""

    error: float = 0.0
    decisions: int = 0
    wrong_choices: int = 0
    ties: int = 0  # choices that differ where rounding decides; the sequence ends there

    def add(self, value: np.ndarray, expected: torch.Tensor, floor: float = 1.0) -> None:
        """Takes in errors relative to ``max(floor, |expected|)``."""
        target = expected.numpy()
        assert value.shape == target.shape
        assert np.array_equal(np.isnan(value), np.isnan(target))
        error = np.abs(value - target) / np.maximum(floor, np.abs(target))
        self.error = max(self.error, float(np.nan_to_num(error).max()))


def is_tie(probabilities: torch.Tensor, u: torch.Tensor | None) -> bool:
    """Whether rounding could move a head's choice: of a draw u, or of the most probable one."""
    if u is None:
        top = probabilities.topk(2).values
        return bool(top[0] - top[1] < PARITY)
    return bool((probabilities.cumsum(-1) - u).abs().min() < PARITY)


def compare(
    policy: LearnedPolicy,
    twin: LearnedPolicy,
    mode: DecisionMode,
    sequences: int,
    seed: int,
    *,
    runner_seed: int = 0,
) -> Comparison:
    """Runs ``policy`` in C++ and ``twin`` in Python on the same random sequences."""
    result = Comparison()
    network, generator = twin.network(), torch.Generator().manual_seed(seed)
    state = initial_policy_state(network, torch.arange(sequences))
    runs = [policy.start_run(mode=mode, seed=runner_seed + index) for index in range(sequences)]
    together = set(range(sequences))
    for step in range(STEPS):
        seen = observation(generator, sequences, step / STEPS)
        with torch.inference_mode():
            moved, decision, features, new_state = policy_step(
                network, twin.action_space, seen, state, mode
            )
        for index in sorted(together):
            got = runs[index].decide(of_run(seen, index))
            result.decisions += 1
            result.add(got.features, features[index])
            result.add(got.probabilities, decision.probabilities[index])
            if _choices_differ(got, decision.shifts[index], int(decision.register[index])):
                heads = decision.probabilities[index].split(list(SPACE.head_sizes))
                draws: list[torch.Tensor | None] = [None] * len(heads)
                if mode == "sample":
                    draws = list(uniform(state.seed[index], state.step[index], torch.arange(9)))
                if any(is_tie(p, u) for p, u in zip(heads, draws, strict=True)):
                    result.ties += 1
                else:
                    result.wrong_choices += 1
                together.discard(index)
                continue
            result.add(got.shifts, decision.shifts[index])
            result.add(got.hyperparameters, moved[index], floor=1e-9)  # they span decades
        state = new_state
    return result


def _choices_differ(got: Any, shifts: torch.Tensor, register: int) -> bool:
    """Choices lie at least 0.05 apart, so that anything else is rounding."""
    return got.register != register or bool(np.abs(got.shifts - shifts.numpy()).max() > 0.04)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", range(3))
def test_parity_over_1000_sequences(mode: DecisionMode, group: int) -> None:
    """9 x 112 sequences of 12 outer steps under 36 networks."""
    total = Comparison()
    for index in range(4):
        policy = random_policy(10 * group + index, hidden=(16, 32, 48, 64)[index])
        one = compare(policy, policy, mode, sequences=28, seed=100 * group + index)
        total.error = max(total.error, one.error)
        total.decisions += one.decisions
        total.wrong_choices += one.wrong_choices
        total.ties += one.ties
    assert total.error < PARITY
    assert total.wrong_choices == 0
    assert total.ties <= 3
    assert total.decisions > 4 * 28 * STEPS - 3 * STEPS - 1


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("mode", MODES)
def test_parity_of_every_instruction_set(
    isa: str, mode: DecisionMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LHOPT_CPU_ISA", isa)
    policy = random_policy(7, hidden=256, head_hidden=32)
    assert policy.start_run().isa == isa
    result = compare(policy, policy, mode, sequences=4, seed=7)
    assert result.error < PARITY
    assert result.wrong_choices == 0


def test_wrong_twins_are_told_apart() -> None:
    """Each of them breaks what the parity tests ask for."""
    policy = random_policy(0)

    noise = np.random.default_rng(0)

    def changed(name: str) -> LearnedPolicy:
        weights = {key: value.copy() for key, value in policy.weights.items()}
        weights[name] += 1e-3 * noise.standard_normal(weights[name].shape, np.float32)
        return replace(policy, weights=weights)

    one_head = [name for name in policy.weights if name.startswith(("heads.0.", "heads.8."))]
    shared = [name for name in policy.weights if not name.startswith("heads.")]
    for name in {*one_head, *shared} - {"normalisation.total_weight"}:
        assert compare(policy, changed(name), "mean", 4, 1).error > PARITY, name
    bounds = replace(SPACE.actions[0], high=1.2e-3)
    other = replace(policy, action_space=ActionSpace((bounds, *SPACE.actions[1:]), True))
    assert compare(policy, other, "mean", 4, 1).error > PARITY
    assert compare(policy, policy, "sample", 4, 1, runner_seed=1).wrong_choices == 4


def _decide(run: Any, **changes: Any) -> Any:
    seen = of_run(observation(torch.Generator().manual_seed(0), 1, 0.5), 0)
    return run.decide(seen._replace(**changes))


@pytest.mark.parametrize("mode", MODES)
def test_saved_and_resumed_is_bit_identical(mode: DecisionMode) -> None:
    policy, generator = random_policy(3), torch.Generator().manual_seed(3)
    seen = [of_run(observation(generator, 1, step / 10), 0) for step in range(10)]
    run = policy.start_run(mode=mode, seed=2**63 - 1)
    whole = [run.decide(one) for one in seen]
    first = policy.start_run(mode=mode, seed=2**63 - 1)
    for one in seen[:4]:
        first.decide(one)
    saved = torch.from_numpy(first.get_state())  # as a checkpoint holds it
    second = policy.start_run(mode=mode, seed=5)
    second.set_state(saved.numpy())
    assert np.array_equal(second.get_state(), first.get_state(), equal_nan=True)
    for one, expected in zip(seen[4:], whole[4:], strict=True):
        for a, b in zip(second.decide(one), expected, strict=True):
            assert np.array_equal(a, b, equal_nan=True)


def test_a_fresh_run_would_not_go_on_like_that() -> None:
    policy = random_policy(3)
    run = policy.start_run()
    first = _decide(run)
    assert not np.array_equal(_decide(run).probabilities, first.probabilities)


def test_foreign_states_change_nothing() -> None:
    run = random_policy(0).start_run()
    _decide(run)
    state = run.get_state()
    changes: list[tuple[int, float, str]] = [
        (0, 2.0, "version"),
        (1, 145.0, "number of features"),
        (2, 64.0, "width"),
        (3, 2.0**32, "seed"),
        (5, -1.0, "number of decisions"),
        (5, 0.5, "number of decisions"),
        (6, 10.0, "register choice"),
        (8, math.nan, "shift"),
        (16, math.inf, "count"),
        (17, math.nan, "mean"),
        (22, -1.0, "variance"),
        (-1, math.nan, "c is nan"),
        (-33, 1.5, "h is 1.5"),
    ]
    for index, value, message in changes:
        bad = state.copy()
        bad[index] = value
        with pytest.raises(ValueError, match=message):
            run.set_state(bad)
    for size in (0, len(state) - 1, len(state) + 1):
        with pytest.raises(ValueError, match=f"{size} numbers, expected {len(state)}"):
            run.set_state(np.zeros(size))
    assert np.array_equal(run.get_state(), state, equal_nan=True)


def test_results_are_the_callers() -> None:
    run = random_policy(0).start_run()
    first = _decide(run)
    before = first.features.copy()
    _decide(run, progress=0.9)
    assert np.array_equal(first.features, before)


def test_bad_observations_are_refused() -> None:
    run = random_policy(0).start_run()
    for changes, message in (
        ({"progress": math.nan}, "progress is nan"),
        ({"progress": 1.5}, "progress is 1.5"),
        ({"outer_steps": 0}, "outer_steps is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            _decide(run, **changes)
    for changes in ({"inner": [0.0] * 12}, {"train_loss": "1"}, {"hyperparameters": None}):
        with pytest.raises(TypeError):
            _decide(run, **changes)


def _arguments() -> dict[str, Any]:
    policy = random_policy(0)
    return {
        "weights": dict(policy.weights),
        "actions": [(a.kind == "logit", list(a.shifts), a.low, a.high) for a in SPACE.actions],
        "registers": True,
        "mode": "mean",
        "seed": 0,
    }


def _weight(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(arguments: dict[str, Any]) -> None:
        arguments["weights"][name] = change(arguments["weights"][name].copy())

    return apply


def _with(array: np.ndarray, value: float) -> np.ndarray:
    array.flat[5] = value
    return array


def _bounds(low: float, high: float) -> Callable[[dict[str, Any]], None]:
    def apply(arguments: dict[str, Any]) -> None:
        arguments["actions"][0] = (False, [0.0], low, high)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["weights"].pop("post.bias"), "post.bias is missing"),
        (lambda a: a["weights"].pop("pre.weight"), "pre.weight is missing"),
        (lambda a: a["weights"].update(x=np.zeros(1, np.float32)), "there are 69 weights"),
        (_weight("post.weight", lambda x: x[:-1]), r"post.weight has shape \[31, 32\]"),
        (_weight("post.weight", lambda x: x.astype(np.float64)), "post.weight has dtype float64"),
        (_weight("post.weight", lambda x: x.T), "post.weight is not contiguous"),
        (_weight("post.weight", lambda x: x.tolist()), "post.weight is not a NumPy array"),
        (_weight("post.weight", lambda x: _with(x, math.nan)), "post.weight holds nan at 5"),
        (_weight("pre.bias", lambda x: _with(x, 1e30)), "pre.bias holds"),
        (_weight("normalisation.var", lambda x: _with(x, -1)), "normalisation.var holds -1"),
        (_weight("pre.weight", lambda x: x[:8].copy()), "pre.weight has 8 rows"),
        (lambda a: a.update(mode="best"), "mode is"),
        (lambda a: a.update(registers=False), "there are 68 weights, expected 62"),
        (lambda a: a["actions"].pop(), "there are 7 actions"),
        (_bounds(2.0, 1.0), r"actions\[0\] has bounds"),
        (_bounds(math.nan, 1.0), r"actions\[0\] has bounds"),
        (lambda a: a["actions"].__setitem__(1, (False, [], 0.1, 1.0)), "has 0 choices"),
        (lambda a: a["actions"].__setitem__(1, (False, [math.inf], 0.1, 1.0)), "not finite"),
    ],
)
def test_the_boundary_checks_everything(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    arguments = _arguments()
    _C.PolicyRunner(**arguments)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        _C.PolicyRunner(**arguments)


def test_without_a_register_head_nothing_is_ever_loaded() -> None:
    space = ActionSpace(SPACE.actions)
    policy = random_policy(0)
    heads = {k: v for k, v in policy.weights.items() if not k.startswith("heads.8.")}
    shape = replace(policy.shape, heads=space.head_sizes)
    small = LearnedPolicy("small", shape, heads, space, START)
    run = small.start_run(mode="sample")
    assert {_decide(run).register for _ in range(20)} == {REGISTER_CHOICES.index("keep")}
    assert len({_decide(policy.start_run(mode="sample", seed=s)).register for s in range(20)}) > 1
