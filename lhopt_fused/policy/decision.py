"""From logits to a decision, and the whole of one outer step: features, network, decision, actions.

One definition over leading batch dimensions: meta-training uses it, and the policy runner of the
extension is its twin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

import torch

from lhopt_fused.actions import ActionSpace, apply_shifts
from lhopt_fused.policy.features import FeatureState, Observation, policy_features
from lhopt_fused.policy.network import LSTMState, PolicyNetwork

__all__ = [
    "LARGEST_SEED",
    "Decision",
    "DecisionMode",
    "PolicyState",
    "check_mode",
    "check_seed",
    "decide",
    "initial_policy_state",
    "policy_step",
    "uniform",
]

DecisionMode = Literal["mean", "sample", "argmax"]
"""How probabilities become an action.

``mean`` takes the mean of the log multipliers (or logit shifts) under the probabilities, and the
most probable register choice; ``sample`` draws; ``argmax`` takes the most probable choice.
"""

LARGEST_SEED: Final = 2**63 - 1

_ADD: Final = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLY_1: Final = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2: Final = 0x94D049BB133111EB - 2**64


def check_mode(mode: str) -> None:
    """Raise ValueError unless ``mode`` is a :data:`DecisionMode`."""
    if mode not in get_args(DecisionMode):
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(get_args(DecisionMode))}")


def check_seed(seed: int) -> None:
    """Raise ValueError unless ``seed`` fits the generator."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed is {seed}, expected 0 to 2**63 - 1")


def uniform(seed: torch.Tensor, step: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1), a pure function of their key.

    Each part of the key goes through the finaliser of SplitMix64 (Steele, Lea, Flood 2014), modulo
    2**64: ``mix(mix(mix(seed + A) + step + A) + head + A) >> 11``, with 53 bits after the point.

    Args:
        seed, step, head: int64, of shapes that broadcast together.

    Returns:
        float64 of the common shape.
    """
    bits = _mix(_mix(_mix(seed + _ADD) + step + _ADD) + head + _ADD)
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)) * _MULTIPLY_1
    z = (z ^ _shift_right(z, 27)) * _MULTIPLY_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """The shift of an unsigned number, which int64 stands in for here."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Decision:
    """What a policy decided, over a batch ``[...]`` with H heads.

    Attributes:
        shifts: float64 ``[..., 8]``, log multipliers or logit shifts of the hyperparameters.
        register: int64 ``[...]``, index into ``REGISTER_CHOICES``; 0, keep, without such a head.
        choices: int64 ``[..., H]``, drawn or else most probable choice of each head.
        probabilities: float64 ``[..., sum(head_sizes)]``, of all heads side by side.
    """

    shifts: torch.Tensor
    register: torch.Tensor
    choices: torch.Tensor
    probabilities: torch.Tensor


def decide(
    logits: torch.Tensor,
    space: ActionSpace,
    mode: DecisionMode,
    *,
    seed: torch.Tensor,
    step: torch.Tensor,
) -> Decision:
    """Decide from the logits of one outer step.

    A draw is the number of cumulative probabilities that do not exceed a uniform number keyed by
    (seed, step, head); ties for the most probable choice go to the first.

    Args:
        logits: ``[..., sum(space.head_sizes)]``.
        space: the actions behind them.
        mode: how to decide.
        seed: int64 ``[...]``, of each run; only ``sample`` reads it.
        step: int64 ``[...]``, decisions taken before this one in each run.
    """
    check_mode(mode)
    sizes = list(space.head_sizes)
    heads = [head.softmax(-1) for head in torch.split(logits.to(torch.float64), sizes, dim=-1)]
    if mode == "sample":
        choices = [_draw(p, seed, step, index) for index, p in enumerate(heads)]
    else:
        choices = [p.argmax(-1) for p in heads]
    shifts = []
    for action, p, choice in zip(space.actions, heads, choices, strict=False):
        values = p.new_tensor(action.shifts)
        shifts.append((p * values).sum(-1) if mode == "mean" else values[choice])
    register = choices[-1] if space.registers else torch.zeros_like(choices[0])
    return Decision(
        torch.stack(shifts, -1), register, torch.stack(choices, -1), torch.cat(heads, -1)
    )


def _draw(p: torch.Tensor, seed: torch.Tensor, step: torch.Tensor, head: int) -> torch.Tensor:
    u = uniform(seed, step, torch.full_like(seed, head))
    passed = (p.cumsum(-1) <= u[..., None]).sum(-1)
    return passed.clamp_max(p.shape[-1] - 1)  # the sum may fall short of 1 by rounding


@dataclass(frozen=True)
class PolicyState:
    """Everything that a policy remembers of a batch ``[...]`` of runs.

    Attributes:
        features: what the features remember.
        lstm: the network's memory.
        step: int64 ``[...]``, decisions taken.
        seed: int64 ``[...]``, of the draws.
    """

    features: FeatureState
    lstm: LSTMState
    step: torch.Tensor
    seed: torch.Tensor


def initial_policy_state(network: PolicyNetwork, seed: torch.Tensor) -> PolicyState:
    """The state at the start of runs with the given seeds, int64 ``[...]``."""
    return PolicyState(
        FeatureState.initial(seed.shape, seed.device),
        network.initial_state(seed.shape, seed.device),
        torch.zeros_like(seed),
        seed,
    )


def policy_step(
    network: PolicyNetwork,
    space: ActionSpace,
    observation: Observation,
    state: PolicyState,
    mode: DecisionMode = "mean",
) -> tuple[torch.Tensor, Decision, torch.Tensor, PolicyState]:
    """One outer step of a batch of runs: observe, decide, apply.

    Returns:
        The new hyperparameters, float64 ``[..., 8]``; the decision; the policy features that led
        to it, float32 ``[..., F]``; and the state for the next outer step.
    """
    features, feature_state = policy_features(observation, state.features, space.actions)
    logits, lstm = network(features, state.lstm)
    decision = decide(logits, space, mode, seed=state.seed, step=state.step)
    hyperparameters = apply_shifts(observation.hyperparameters, decision.shifts, space.actions)
    feature_state = feature_state.after(decision.shifts, decision.register)
    new_state = replace(state, features=feature_state, lstm=lstm, step=state.step + 1)
    return hyperparameters, decision, features, new_state
