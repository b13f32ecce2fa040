"""What the commands of an evaluation say, and how they say what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import typer
from rich.console import Console

__all__ = ["bad_input", "console", "names", "say"]

console = Console(highlight=False)
_errors = Console(highlight=False, stderr=True)
Name = TypeVar("Name", bound=str)


def say(message: str) -> None:
    """Print a message as it is: paths may hold what looks like markup."""
    console.print(message, markup=False, soft_wrap=True)


def names(option: str, given: str, known: list[Name]) -> list[Name]:
    """The names in an option, with commas between, in the order of those known; or all.

    Raises:
        ValueError: one of them is unknown.
    """
    if given == "all":
        return known
    wanted = [name.strip() for name in given.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{option}: {unknown[0]!r} is none of {', '.join(known)}")
    return [name for name in known if name in wanted]


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Turn what a user can put right into a message and exit code 2."""
    from lhopt_fused.evaluation.campaign import WorkerDiedError
    from lhopt_fused.evaluation.optimizers import ContenderError
    from lhopt_fused.evaluation.rows import StoreError
    from lhopt_fused.evaluation.task import DataError

    known = (DataError, ContenderError, StoreError, WorkerDiedError, ValueError, OSError)
    try:
        yield
    except known as error:
        _errors.print(f"Error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
