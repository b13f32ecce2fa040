"""What a policy is to the optimizer: an observation in, a decision out, state that can be saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from lhopt_fused.actions import ActionSpace
from lhopt_fused.policy.decision import DecisionMode

__all__ = [
    "PUBLISHED_OPTIONS",
    "Policy",
    "PolicyRun",
    "RunDecision",
    "RunObservation",
    "StartOptions",
    "policy_for_run",
]


@dataclass(frozen=True)
class StartOptions:
    """What a policy wants of the inner optimizer beside the hyperparameters that it moves.

    Attributes:
        trust, lamb_ignore_vectors: as of :class:`lhopt_fused.CIAO`.
        lr_steps: inner steps of a run that the start's learning rate is meant for: runs of another
            length start as :meth:`for_run` says. None where all start alike.
        lr_reach: how far the learning rate may be taken above where a run of that length starts, as
            a factor of 1 or more; None for as far as the action reaches.

    Raises:
        ValueError: naming the option that is something else.
    """

    trust: Literal["exact", "delayed"] = "exact"
    lamb_ignore_vectors: bool = True
    lr_steps: int | None = None
    lr_reach: float | None = None

    def __post_init__(self) -> None:
        if self.trust not in ("exact", "delayed"):
            raise ValueError(f"trust is {self.trust!r}, expected 'exact' or 'delayed'")
        if not isinstance(self.lamb_ignore_vectors, bool):
            raise ValueError(
                f"lamb_ignore_vectors is {self.lamb_ignore_vectors!r}, expected True or False"
            )
        if self.lr_steps is not None and (type(self.lr_steps) is not int or self.lr_steps < 1):
            raise ValueError(f"lr_steps is {self.lr_steps!r}, expected a number >= 1, or null")
        if self.lr_reach is not None and not _is_factor(self.lr_reach):
            raise ValueError(f"lr_reach is {self.lr_reach!r}, expected a factor >= 1, or null")

    def keywords(self) -> dict[str, Any]:
        """Keywords of :class:`lhopt_fused.CIAO`."""
        return {"trust": self.trust, "lamb_ignore_vectors": self.lamb_ignore_vectors}

    def for_run(
        self, start: Mapping[str, float], space: ActionSpace, total_steps: int
    ) -> tuple[dict[str, float], ActionSpace]:
        """Where a run of ``total_steps`` inner steps starts, and what may be done to it.

        With ``lr_steps`` the learning rate is multiplied by ``sqrt(lr_steps / total_steps)``. Under
        trust ratios it is the relative length of a step, and steps whose direction is mostly noise
        lead as far as the square root of their number. The best fixed learning rates of the tasks
        of meta-training fall like that: about 0.1 for 25 steps, 0.03 for 250, 0.015 for 700.

        With ``lr_reach`` decisions leave it at most at that multiple of this.
        """
        own = dict(start)
        if self.lr_steps is not None:
            own["lr"] *= math.sqrt(self.lr_steps / total_steps)
        if self.lr_reach is None:
            return own, space
        high = self.lr_reach * own["lr"]
        actions = (
            replace(action, high=min(high, action.high)) if action.name == "lr" else action
            for action in space.actions
        )
        return own, replace(space, actions=tuple(actions))

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _is_factor(value: object) -> bool:
    return type(value) in (int, float) and 1 <= cast(float, value) < math.inf


PUBLISHED_OPTIONS: Final = StartOptions()
"""Those of LHOPT's published configuration."""


def policy_for_run(policy: Policy, total_steps: int) -> Policy:
    """The policy as a run of ``total_steps`` inner steps has it: its start and its bounds.

    One whose options depend on the length of the run is a dataclass.
    """
    options = policy.start_options
    if options.lr_steps is None and options.lr_reach is None:
        return policy
    start, space = options.for_run(policy.start_hyperparameters, policy.action_space, total_steps)
    options = replace(options, lr_steps=None, lr_reach=None)
    resolved: Policy = replace(
        policy,  # type: ignore[type-var]
        start_hyperparameters=start,
        action_space=space,
        start_options=options,
    )
    return resolved


class RunObservation(NamedTuple):
    """What one outer step shows of one run; the fields are those of ``features.Observation``.

    ``eval_loss`` is None where there is none. Losses may be NaN, infinite or not positive; inner
    features, norms and what belongs to an empty register may be NaN.
    """

    inner: Sequence[float]  # 13
    train_loss: float
    eval_loss: float | None
    progress: float
    outer_steps: int
    path_length: float
    param_norm: float
    hyperparameters: Sequence[float]  # 8
    start_hyperparameters: Sequence[float]  # 8
    register_losses: Sequence[float]  # 3
    register_progress: Sequence[float]  # 3


class RunDecision(NamedTuple):
    """What a policy decided for one run."""

    hyperparameters: NDArray[np.float64]  # [8], already within their bounds
    shifts: NDArray[np.float64]  # [8], log multipliers or logit shifts
    register: int  # index into REGISTER_CHOICES
    features: NDArray[np.float32]  # [len(FEATURES)], or [0] of a policy that does not look
    probabilities: NDArray[np.float64]  # of all heads side by side, or [0]


class PolicyRun(Protocol):
    """A policy at work on one training run; not to be shared between threads."""

    def decide(self, observation: RunObservation) -> RunDecision:
        """One outer step.

        Raises:
            ValueError: progress or the number of outer steps is out of range.
        """

    def get_state(self) -> NDArray[np.float64]:
        """Everything that changes from one outer step to the next, as one flat array."""

    def set_state(self, state: NDArray[np.float64]) -> None:
        """Go on from :meth:`get_state`.

        Raises:
            ValueError: it is not the state of a run of this policy; nothing has changed.
        """


class Policy(Protocol):
    """Something that decides; it can work on any number of runs."""

    @property
    def name(self) -> str:
        """For people: the built-in's name or the file's."""

    @property
    def action_space(self) -> ActionSpace:
        """What it may do."""

    @property
    def start_hyperparameters(self) -> Mapping[str, float]:
        """Where runs are meant to start, for each of HYPERPARAMETERS."""

    @property
    def start_options(self) -> StartOptions:
        """What else runs are meant to be like."""

    def start_run(self, *, mode: DecisionMode = "mean", seed: int = 0) -> PolicyRun:
        """A fresh run.

        Raises:
            ValueError: an unknown mode, or a seed outside 0 to 2**63 - 1.
        """
