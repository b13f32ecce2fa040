"""A learned policy: network weights together with everything that is needed to run them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from lhopt_fused import _C
from lhopt_fused.actions import ActionSpace
from lhopt_fused.policy.base import PUBLISHED_OPTIONS, RunDecision, RunObservation, StartOptions
from lhopt_fused.policy.decision import DecisionMode, check_mode, check_seed
from lhopt_fused.policy.features import FEATURES
from lhopt_fused.policy.network import NetworkShape, PolicyNetwork
from lhopt_fused.types import HYPERPARAMETERS

__all__ = ["LearnedPolicy", "check_start_hyperparameters"]

if len(FEATURES) != _C.NUM_POLICY_FEATURES:
    raise ImportError(
        "lhopt_fused._C was built for other policy features than lhopt_fused.policy describes; "
        "reinstall lhopt-fused"
    )

_WEIGHT_RANGE: Final = (-1e4, 1e4)
_STATISTICS_RANGES: Final = {
    "normalisation.mean": (-1e6, 1e6),
    "normalisation.var": (0.0, 1e13),
    "normalisation.total_weight": (0.0, 1.0),
}
"""Within these ranges no activation can overflow float32; the extension checks the same."""


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """Weights of a :class:`PolicyNetwork` and what they were trained for.

    Attributes:
        name: for people.
        shape: of the network.
        weights: NumPy float32 arrays by their name in the network's ``state_dict``.
        action_space: what the heads decide.
        start_hyperparameters: where runs are meant to start, within the actions' bounds.
        start_options: what else runs are meant to be like.
        trained_on: what it was trained on, as plain JSON values.
        commit: of the code that trained it, or "".

    Raises:
        ValueError: naming the field that does not fit the others or this version.
    """

    name: str
    shape: NetworkShape
    weights: Mapping[str, NDArray[np.float32]] = field(repr=False)
    action_space: ActionSpace
    start_hyperparameters: Mapping[str, float]
    start_options: StartOptions = PUBLISHED_OPTIONS
    trained_on: Mapping[str, Any] = field(default_factory=dict)
    commit: str = ""

    def __post_init__(self) -> None:
        if self.shape.features != len(FEATURES):
            raise ValueError(f"network.features is {self.shape.features}, expected {len(FEATURES)}")
        if self.shape.heads != self.action_space.head_sizes:
            raise ValueError(
                f"network.heads is {list(self.shape.heads)}, but the action space has heads of "
                f"{list(self.action_space.head_sizes)} choices"
            )
        check_start_hyperparameters(self.start_hyperparameters, self.action_space)
        _check_weights(self.weights, self.shape)

    @classmethod
    def from_network(
        cls,
        network: PolicyNetwork,
        *,
        name: str,
        action_space: ActionSpace,
        start_hyperparameters: Mapping[str, float],
        start_options: StartOptions = PUBLISHED_OPTIONS,
        trained_on: Mapping[str, Any] | None = None,
        commit: str = "",
    ) -> LearnedPolicy:
        """A policy with copies of the network's weights."""
        weights = {
            key: value.detach().cpu().contiguous().numpy().copy()
            for key, value in network.state_dict().items()
        }
        return cls(
            name,
            network.shape,
            weights,
            action_space,
            dict(start_hyperparameters),
            start_options,
            dict(trained_on or {}),
            commit,
        )

    def network(self) -> PolicyNetwork:
        """The torch network with copies of these weights, in evaluation mode."""
        network = PolicyNetwork(self.shape)
        network.load_state_dict(
            {name: torch.from_numpy(value.copy()) for name, value in self.weights.items()}
        )
        return network.eval()

    def start_run(self, *, mode: DecisionMode = "mean", seed: int = 0) -> LearnedRun:
        """A fresh run, on the CPU, in C++."""
        check_mode(mode)
        check_seed(seed)
        return LearnedRun(self, mode, seed)


class LearnedRun:
    """A learned policy at work on one run: :class:`PolicyRun` over the extension's runner."""

    def __init__(self, policy: LearnedPolicy, mode: DecisionMode, seed: int) -> None:
        space = policy.action_space
        self._runner = _C.PolicyRunner(
            weights=dict(policy.weights),
            actions=[(a.kind == "logit", list(a.shifts), a.low, a.high) for a in space.actions],
            registers=space.registers,
            mode=mode,
            seed=seed,
        )

    @property
    def isa(self) -> str:
        """The instruction set it runs with."""
        return self._runner.isa

    def decide(self, observation: RunObservation) -> RunDecision:
        """One outer step."""
        return RunDecision(*self._runner.decide(*observation))

    def get_state(self) -> NDArray[np.float64]:
        """Seed, number of decisions, previous decision, CDF moments and LSTM memory."""
        return self._runner.get_state()

    def set_state(self, state: NDArray[np.float64]) -> None:
        """Go on from :meth:`get_state`, with its seed."""
        self._runner.set_state(state)


def check_start_hyperparameters(values: Mapping[str, float], space: ActionSpace) -> None:
    """Raise ValueError unless there is one value per hyperparameter, within its bounds."""
    if set(values) != set(HYPERPARAMETERS):
        raise ValueError(
            f"start_hyperparameters are for {', '.join(sorted(values)) or 'nothing'}; "
            f"expected {', '.join(HYPERPARAMETERS)}"
        )
    for action in space.actions:
        value = values[action.name]
        if not action.low <= value <= action.high:  # NaN too
            raise ValueError(
                f"start_hyperparameters.{action.name} is {value}, "
                f"expected {action.low} to {action.high}"
            )


def _check_weights(weights: Mapping[str, NDArray[np.float32]], shape: NetworkShape) -> None:
    expected = _weight_shapes(shape)
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise ValueError(f"weight {name} is missing")
        if name not in expected:
            raise ValueError(f"weight {name} is unknown")
        _check_weight(name, weights[name], expected[name])


def _check_weight(name: str, value: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    if value.dtype != np.float32:
        raise ValueError(f"weight {name} has dtype {value.dtype}, expected float32")
    if value.shape != shape:
        raise ValueError(f"weight {name} has shape {list(value.shape)}, expected {list(shape)}")
    if not value.flags.c_contiguous:
        raise ValueError(f"weight {name} is not contiguous")
    low, high = _STATISTICS_RANGES.get(name, _WEIGHT_RANGE)
    wrong = np.flatnonzero(~((value >= low) & (value <= high)))  # NaN too
    if wrong.size:
        raise ValueError(
            f"weight {name} holds {value.flat[wrong[0]]} at {wrong[0]}, "
            f"expected a number from {low:g} to {high:g}"
        )


def _weight_shapes(shape: NetworkShape) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from a network without memory."""
    with torch.device("meta"):
        network = PolicyNetwork(shape)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}
