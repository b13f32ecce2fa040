"""What a policy may do: scale or shift each hyperparameter by one of a few choices, within bounds.

One definition over leading batch dimensions, in float64: meta-training uses it, and the policy
runner of the extension is its twin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

import torch

from lhopt_fused.json_fields import expect_list, expect_number, expect_object, expect_string
from lhopt_fused.types import HYPERPARAMETERS

__all__ = [
    "ACTIONS",
    "DEFAULT_ACTION_SPACE",
    "LARGEST_HEAD",
    "REGISTERS",
    "REGISTER_CHOICES",
    "Action",
    "ActionSpace",
    "Kind",
    "apply_shifts",
    "relative_to_start",
]

Kind = Literal["scale", "logit"]

REGISTERS: Final = 3
"""Places for a whole training state that a policy may load, save or swap."""

REGISTER_CHOICES: Final = (
    "keep",
    *(f"{verb}_{register}" for register in range(REGISTERS) for verb in ("load", "save", "swap")),
)
"""Choices of the register head, in the order of its logits."""

LARGEST_HEAD: Final = 64
"""Most choices that one action may have."""


@dataclass(frozen=True)
class Action:
    """How one hyperparameter may move.

    Attributes:
        name: one of :data:`HYPERPARAMETERS`.
        kind: ``"scale"`` multiplies a positive number; ``"logit"`` adds to the logit of a number
            between 0 and 1.
        choices: factors, or what is added to the logit; finite, factors positive.
        low: smallest value that an action leaves behind.
        high: largest value that an action leaves behind.

    Raises:
        ValueError: a field holds something else.
    """

    name: str
    kind: Kind
    choices: tuple[float, ...]
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.name not in HYPERPARAMETERS:
            raise ValueError(f"name is {self.name!r}, expected one of {', '.join(HYPERPARAMETERS)}")
        if self.kind not in get_args(Kind):
            raise ValueError(f"{self.name}.kind is {self.kind!r}, expected 'scale' or 'logit'")
        if not 1 <= len(self.choices) <= LARGEST_HEAD:
            raise ValueError(
                f"{self.name}.choices has {len(self.choices)} entries, expected 1 to {LARGEST_HEAD}"
            )
        for index, choice in enumerate(self.choices):
            if not math.isfinite(choice) or (self.kind == "scale" and choice <= 0):
                raise ValueError(
                    f"{self.name}.choices[{index}] is {choice}, expected a finite number"
                    + (" above 0" if self.kind == "scale" else "")
                )
        limit = math.inf if self.kind == "scale" else 1.0
        if not 0 < self.low < self.high < limit:
            raise ValueError(
                f"{self.name}.low is {self.low} and high is {self.high}, "
                f"expected 0 < low < high < {limit}"
            )

    @property
    def shifts(self) -> tuple[float, ...]:
        """The choices as they add up: logs of factors, or shifts of the logit."""
        return tuple(map(math.log, self.choices)) if self.kind == "scale" else self.choices

    def to_json(self) -> dict[str, Any]:
        """Plain values that :meth:`from_json` takes back unchanged."""
        return {
            "name": self.name,
            "kind": self.kind,
            "choices": list(self.choices),
            "low": self.low,
            "high": self.high,
        }

    @classmethod
    def from_json(cls, value: object, where: str = "action") -> Action:
        """The action that ``value`` describes; ``where`` names it in errors.

        Raises:
            ValueError: naming the field that is missing, unknown, or not of its type.
        """
        fields = expect_object(value, where, ("name", "kind", "choices", "low", "high"))
        name, kind = (expect_string(fields[key], f"{where}.{key}") for key in ("name", "kind"))
        low, high = (expect_number(fields[key], f"{where}.{key}") for key in ("low", "high"))
        choices = tuple(
            expect_number(choice, f"{where}.choices[{index}]")
            for index, choice in enumerate(expect_list(fields["choices"], f"{where}.choices"))
        )
        try:
            return cls(name, cast(Kind, kind), choices, low, high)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


@dataclass(frozen=True)
class ActionSpace:
    """All that a policy decides at once: one head per hyperparameter, and one for the registers.

    Attributes:
        actions: one for each of :data:`HYPERPARAMETERS`, in that order.
        registers: whether the last head chooses among :data:`REGISTER_CHOICES`.

    Raises:
        ValueError: the actions are other ones, or in another order.
    """

    actions: tuple[Action, ...]
    registers: bool = False

    def __post_init__(self) -> None:
        names = tuple(action.name for action in self.actions)
        if names != HYPERPARAMETERS:
            raise ValueError(
                f"actions are for {', '.join(names) or 'nothing'}; "
                f"expected {', '.join(HYPERPARAMETERS)}, in this order"
            )

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Choices per head; the register head, if there is one, comes last."""
        sizes = tuple(len(action.choices) for action in self.actions)
        return (*sizes, len(REGISTER_CHOICES)) if self.registers else sizes

    def to_json(self) -> dict[str, Any]:
        """Plain values that :meth:`from_json` takes back unchanged."""
        actions = [action.to_json() for action in self.actions]
        return {"actions": actions, "registers": list(REGISTER_CHOICES) if self.registers else []}

    @classmethod
    def from_json(cls, value: object, where: str = "action_space") -> ActionSpace:
        """The action space that ``value`` describes; ``where`` names it in errors.

        Raises:
            ValueError: naming the field that is missing, unknown, or not as expected.
        """
        fields = expect_object(value, where, ("actions", "registers"))
        actions = expect_list(fields["actions"], f"{where}.actions")
        registers = expect_list(fields["registers"], f"{where}.registers")
        if registers not in ([], list(REGISTER_CHOICES)):
            raise ValueError(
                f"{where}.registers is {registers!r}, expected [] or {list(REGISTER_CHOICES)}"
            )
        parsed = tuple(
            Action.from_json(action, f"{where}.actions[{index}]")
            for index, action in enumerate(actions)
        )
        try:
            return cls(parsed, registers=bool(registers))
        except ValueError as error:
            raise ValueError(f"{where}.actions: {error}") from None

    def difference(self, other: ActionSpace) -> str | None:
        """The first field in which ``other`` differs, with both values; None if there is none."""
        for mine, theirs in zip(self.actions, other.actions, strict=True):
            for field, value in mine.to_json().items():
                found = theirs.to_json()[field]
                if found != value:
                    return f"{mine.name}.{field} is {found}, expected {value}"
        if self.registers != other.registers:
            return f"registers is {other.registers}, expected {self.registers}"
        return None


ACTIONS: Final = (
    Action("lr", "scale", (0.5, 0.707, 0.9, 1.0, 1.1, 1.414, 2.0), 1e-8, 1.0),
    Action("ombeta1", "scale", (0.5, 2.0), 1e-5, 1.0),
    Action("ombeta2", "scale", (0.5, 2.0), 1e-5, 0.1),
    Action("epsilon", "scale", (0.5, 2.0), 1e-8, 1.0),
    Action("weight_decay", "scale", (0.5, 2.0), 1e-8, 1.0),
    Action("group_clip_grad_norm", "logit", (-1.0, -0.3, 0.3, 1.0), 1e-10, 1 - 1e-10),
    Action("grad_clip_ombeta", "scale", (0.5, 1.0, 2.0), 1e-5, 1.0),
    Action("lamb_update_norm_ombeta", "scale", (1.0 / 1.5, 1.0, 1.5), 1e-5, 1.0),
)
"""LHOPT's actions with their published choices and bounds, in the order of HYPERPARAMETERS."""

DEFAULT_ACTION_SPACE: Final = ActionSpace(ACTIONS)


def apply_shifts(
    hyperparameters: torch.Tensor,
    shifts: torch.Tensor,
    actions: Sequence[Action] = ACTIONS,
) -> torch.Tensor:
    """Hyperparameters after a decision.

    A scale gives ``clamp(h exp(shift), low, high)``; a logit shift gives
    ``clamp(sigmoid(logit(h') + shift), low, high)`` with ``h'`` the value clamped to its bounds.
    Where the shift is 0, or the value is 0 or not finite because its group does without it, the
    value stays as it is, to the bit.

    Args:
        hyperparameters: float64 ``[..., 8]``, in the order of the actions.
        shifts: float64 ``[..., 8]``, log multipliers or logit shifts.
        actions: their kinds and bounds.

    Returns:
        float64 ``[..., 8]``.
    """
    columns = [
        _moved(value, shift, action)
        for value, shift, action in zip(
            hyperparameters.unbind(-1), shifts.unbind(-1), actions, strict=True
        )
    ]
    stays = (shifts == 0) | (hyperparameters == 0) | ~hyperparameters.isfinite()
    return torch.where(stays, hyperparameters, torch.stack(columns, dim=-1))


def relative_to_start(
    hyperparameters: torch.Tensor, start: torch.Tensor, actions: Sequence[Action] = ACTIONS
) -> torch.Tensor:
    """How far hyperparameters have moved: log ratios, or differences of logits.

    Args:
        hyperparameters: float64 ``[..., 8]``, in the order of the actions.
        start: float64 ``[..., 8]``, where they started.
        actions: their kinds and bounds; logits are of values clamped to the bounds.

    Returns:
        float64 ``[..., 8]``; NaN or infinite where a hyperparameter is missing or 0.
    """
    columns = [
        value.log() - origin.log()
        if action.kind == "scale"
        else _bounded_logit(value, action) - _bounded_logit(origin, action)
        for value, origin, action in zip(
            hyperparameters.unbind(-1), start.unbind(-1), actions, strict=True
        )
    ]
    return torch.stack(columns, dim=-1)


def _moved(value: torch.Tensor, shift: torch.Tensor, action: Action) -> torch.Tensor:
    if action.kind == "scale":
        moved = value * shift.exp()
    else:
        moved = 1.0 / (1.0 + (-(_bounded_logit(value, action) + shift)).exp())
    return moved.clamp(action.low, action.high)


def _bounded_logit(value: torch.Tensor, action: Action) -> torch.Tensor:
    bounded = value.clamp(action.low, action.high)
    return bounded.log() - (1.0 - bounded).log()
