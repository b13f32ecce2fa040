"""What happened at each outer step of a run, and where it can go: callbacks, CSV, TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from lhopt_fused.actions import REGISTER_CHOICES

__all__ = ["OuterStep", "read_csv", "tensorboard_callback", "write_csv", "write_tensorboard"]


@dataclass(frozen=True)
class OuterStep:
    """One outer step: what the policy saw and what it did.

    Attributes:
        outer_step: 1 for the first.
        inner_step: inner steps done so far.
        progress: share of the run that is done, 0 to 1.
        train_loss: mean of the observed losses since the last outer step, NaN if there were none.
        eval_loss: the like, None if there were none.
        features: the 13 inner features by name.
        shifts: log multiplier (or shift of the logit) of each hyperparameter by name.
        register: choice of the register head, ``"keep"`` where nothing was done.
        hyperparameters: of the first param group, after the decision.
    """

    outer_step: int
    inner_step: int
    progress: float
    train_loss: float
    eval_loss: float | None
    features: dict[str, float]
    shifts: dict[str, float]
    register: str
    hyperparameters: dict[str, float]

    def scalars(self) -> dict[str, float]:
        """All numbers under one level of names: ``features/log_lamb``, ``hyperparameters/lr``."""
        flat: dict[str, float] = {"progress": self.progress, "train_loss": self.train_loss}
        if self.eval_loss is not None:
            flat["eval_loss"] = self.eval_loss
        for room in ("features", "shifts", "hyperparameters"):
            flat |= {f"{room}/{name}": value for name, value in getattr(self, room).items()}
        return flat

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for a checkpoint: ``OuterStep(**step.to_plain())`` is equal."""
        return asdict(self)


def write_csv(history: Iterable[OuterStep], path: str | PathLike[str]) -> None:
    """One row per outer step; columns as in :meth:`OuterStep.scalars`."""
    rows = [
        {"outer_step": s.outer_step, "inner_step": s.inner_step, "register": s.register}
        | s.scalars()
        for s in history
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: str | PathLike[str]) -> list[OuterStep]:
    """The inverse of :func:`write_csv`.

    Raises:
        ValueError: the file is not such a table; the message names the missing column or the line.
    """
    with Path(path).open(newline="") as file:
        try:
            rows = list(csv.DictReader(file, restkey="", restval=""))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a history of outer steps: {error}") from None
    return [_from_row(row, path, line) for line, row in enumerate(rows, start=2)]


def _from_row(row: dict[str, str], path: str | PathLike[str], line: int) -> OuterStep:
    def room(prefix: str) -> dict[str, float]:
        return {
            name.removeprefix(prefix): float(value)
            for name, value in row.items()
            if name.startswith(prefix)
        }

    try:
        return OuterStep(
            outer_step=int(row["outer_step"]),
            inner_step=int(row["inner_step"]),
            progress=float(row["progress"]),
            train_loss=float(row["train_loss"]),
            eval_loss=float(row["eval_loss"]) if row.get("eval_loss") else None,
            features=room("features/"),
            shifts=room("shifts/"),
            register=row["register"],
            hyperparameters=room("hyperparameters/"),
        )
    except KeyError as error:
        raise ValueError(
            f"{path} is not a history of outer steps: it has no column {error}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from None


class _ScalarWriter(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


def write_tensorboard(history: Iterable[OuterStep], writer: _ScalarWriter) -> None:
    """Every number of each outer step as a scalar ``lhopt/...``; the global step is the inner one.

    The tags are those of :meth:`OuterStep.scalars`, and ``lhopt/register`` for the choice of the
    register head, as its index in :data:`lhopt_fused.actions.REGISTER_CHOICES`.

    Args:
        history: of an :class:`lhopt_fused.LHOPT`.
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything else with its
            ``add_scalar(tag, scalar_value, global_step)``.
    """
    for step in history:
        for name, value in step.scalars().items():
            writer.add_scalar(f"lhopt/{name}", value, step.inner_step)
        register = REGISTER_CHOICES.index(step.register)
        writer.add_scalar("lhopt/register", register, step.inner_step)


def tensorboard_callback(writer: _ScalarWriter) -> Callable[[OuterStep], None]:
    """The ``callback`` of an :class:`lhopt_fused.LHOPT` that writes to TensorBoard as it trains.

    Args:
        writer: as for :func:`write_tensorboard`.
    """
    return lambda step: write_tensorboard([step], writer)
