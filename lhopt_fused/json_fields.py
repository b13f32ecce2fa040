"""Reading JSON that others wrote: each value is what it should be, or an error names its field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = [
    "expect_equal",
    "expect_integer",
    "expect_list",
    "expect_number",
    "expect_object",
    "expect_string",
]

_SHOWN = 80


def expect_object(value: object, where: str, fields: Sequence[str]) -> dict[str, Any]:
    """``value`` if it is an object with exactly ``fields``.

    Raises:
        ValueError: naming the field that is missing or unknown.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_show(value)}, expected an object")
    for field in fields:
        if field not in value:
            raise ValueError(f"{where}.{field} is missing")
    for field in value:
        if field not in fields:
            raise ValueError(f"{where}.{_clip(field)} is unknown; expected {', '.join(fields)}")
    return value


def expect_equal(value: object, where: str, expected: object) -> None:
    """Raise ValueError unless ``value`` is ``expected``, of the same type."""
    if type(value) is not type(expected) or value != expected:
        raise ValueError(f"{where} is {_show(value)}, expected {expected!r}")


def expect_list(value: object, where: str) -> list[Any]:
    """``value`` if it is a list, or ValueError."""
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_show(value)}, expected a list")
    return value


def expect_string(value: object, where: str) -> str:
    """``value`` if it is a string, or ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {_show(value)}, expected a string")
    return value


def expect_integer(value: object, where: str) -> int:
    """``value`` if it is an integer, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where} is {_show(value)}, expected an integer")
    return value


def expect_number(value: object, where: str) -> float:
    """``value`` as a float if it is a number, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is {_show(value)}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where} is too large for a float") from None


def _show(value: object) -> str:
    """A value from outside, short enough for a message."""
    return _clip(repr(value))


def _clip(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
