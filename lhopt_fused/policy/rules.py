"""Hand-made policies: schedules of the progress, described in JSON, that act like a learned one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from lhopt_fused.actions import DEFAULT_ACTION_SPACE, Action, ActionSpace
from lhopt_fused.json_fields import expect_equal, expect_number, expect_object, expect_string
from lhopt_fused.policy.base import PUBLISHED_OPTIONS, RunDecision, RunObservation, StartOptions
from lhopt_fused.policy.decision import DecisionMode, check_mode, check_seed
from lhopt_fused.policy.learned import check_start_hyperparameters
from lhopt_fused.policy.plain import moved, relative
from lhopt_fused.types import HYPERPARAMETERS

__all__ = ["RULE_FORMAT_VERSION", "RulePolicy", "Schedule"]

RULE_FORMAT_VERSION: Final = 1

Shape = Literal["cosine", "linear"]


@dataclass(frozen=True)
class Schedule:
    """A hyperparameter as a share of its start: from 1 at the beginning to ``final`` at the end.

    Attributes:
        shape: ``"cosine"`` for ``final + (1 - final) (1 + cos(pi progress)) / 2``, ``"linear"`` for
            a straight line.
        final: share at the end, 0 to 1.

    Raises:
        ValueError: naming the field that holds something else.
    """

    shape: Shape
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape is {self.shape!r}, expected 'cosine' or 'linear'")
        if not 0.0 <= self.final <= 1.0:
            raise ValueError(f"final is {self.final}, expected 0 to 1")

    def __call__(self, progress: float) -> float:
        """The share at ``progress``, 0 to 1."""
        if self.shape == "linear":
            return 1.0 + (self.final - 1.0) * progress
        return self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class RulePolicy:
    """Moves some hyperparameters along schedules, through the same actions as a learned policy.

    Attributes:
        name: for people.
        description: what it does, in a sentence.
        schedules: by hyperparameter; those without one are never touched.
        start_hyperparameters: where runs are meant to start.
        start_options: what else runs are meant to be like.
        action_space: for the bounds.

    Raises:
        ValueError: naming the field that does not fit.
    """

    name: str
    description: str
    schedules: Mapping[str, Schedule]
    start_hyperparameters: Mapping[str, float]
    start_options: StartOptions = PUBLISHED_OPTIONS
    action_space: ActionSpace = DEFAULT_ACTION_SPACE

    def __post_init__(self) -> None:
        for name in self.schedules:
            if name not in HYPERPARAMETERS:
                raise ValueError(
                    f"schedules.{name} is for no hyperparameter; "
                    f"expected some of {', '.join(HYPERPARAMETERS)}"
                )
        check_start_hyperparameters(self.start_hyperparameters, self.action_space)

    def start_run(self, *, mode: DecisionMode = "mean", seed: int = 0) -> RuleRun:
        """A fresh run; rules have nothing to draw, so mode and seed change nothing."""
        check_mode(mode)
        check_seed(seed)
        return RuleRun(self)

    @classmethod
    def from_json(cls, value: object, where: str = "rule") -> RulePolicy:
        """The policy that ``value`` describes; ``where`` names it in errors.

        Raises:
            ValueError: naming the field that is missing, unknown, or not as expected.
        """
        names = ("format_version", "name", "description", "start_hyperparameters", "schedules")
        fields = expect_object(value, where, names)
        expect_equal(fields["format_version"], f"{where}.format_version", RULE_FORMAT_VERSION)
        starts = f"{where}.start_hyperparameters"
        start = expect_object(fields["start_hyperparameters"], starts, HYPERPARAMETERS)
        schedules = fields["schedules"]
        if not isinstance(schedules, dict):
            raise ValueError(f"{where}.schedules is not an object")
        return cls(
            expect_string(fields["name"], f"{where}.name"),
            expect_string(fields["description"], f"{where}.description"),
            {
                name: _schedule(schedule, f"{where}.schedules.{name}")
                for name, schedule in schedules.items()
            },
            {name: expect_number(number, f"{starts}.{name}") for name, number in start.items()},
        )


def _schedule(value: object, where: str) -> Schedule:
    fields = expect_object(value, where, ("shape", "final"))
    shape = expect_string(fields["shape"], f"{where}.shape")
    final = expect_number(fields["final"], f"{where}.final")
    try:
        return Schedule(cast(Shape, shape), final)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


class RuleRun:
    """A rule at work on one run; what it decides depends on nothing but the observation."""

    def __init__(self, policy: RulePolicy) -> None:
        self._policy = policy

    def decide(self, observation: RunObservation) -> RunDecision:
        """Shifts that take each scheduled hyperparameter to its share of its start."""
        progress = observation.progress
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress is {progress}, expected 0 to 1")
        shifts = [
            self._shift(action, now, start, progress)
            for action, now, start in zip(
                self._policy.action_space.actions,
                observation.hyperparameters,
                observation.start_hyperparameters,
                strict=True,
            )
        ]
        after = map(moved, observation.hyperparameters, shifts, self._policy.action_space.actions)
        return RunDecision(
            np.array(list(after)),
            np.array(shifts),
            0,
            np.empty(0, np.float32),
            np.empty(0, np.float64),
        )

    def _shift(self, action: Action, now: float, start: float, progress: float) -> float:
        """What takes one hyperparameter from ``now`` to where its schedule has it."""
        schedule = self._policy.schedules.get(action.name)
        if schedule is None:
            return 0.0
        target = min(max(start * schedule(progress), action.low), action.high)
        shift = relative(target, now, action)
        return shift if math.isfinite(shift) else 0.0

    def get_state(self) -> NDArray[np.float64]:
        """Empty: rules remember nothing."""
        return np.empty(0, np.float64)

    def set_state(self, state: NDArray[np.float64]) -> None:
        """Accept the empty state of a rule, and nothing else."""
        if state.size:
            raise ValueError(f"policy state: {state.size} numbers, expected 0 for a rule")
