"""What a run leaves behind: rows of measurements, as CSV and as the numbers of a summary."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from lhopt_fused.types import INNER_FEATURES

__all__ = ["COLUMNS", "Row", "Summary", "latest", "new_row", "series", "write_csv"]

Row: TypeAlias = dict[str, float]
"""Measurements up to ``step``, means over the steps since the row before; NaN: not measured."""

COLUMNS: Final = (
    "step",
    "lr",
    "train_loss",  # nats per byte
    "eval_loss",  # nats per byte
    "optimizer_ms",  # of one optimizer step
    "step_ms",  # of one whole training step: batch, forward, backward, optimizer
    "outer_ms",  # of all steps since the row before, on inner features and LHOPT's decisions
    *INNER_FEATURES,
)


def new_row(measured: Mapping[str, float]) -> Row:
    """A row with ``measured`` filled in and NaN elsewhere."""
    return dict.fromkeys(COLUMNS, math.nan) | dict(measured)


def series(rows: Sequence[Row], column: str) -> tuple[list[float], list[float]]:
    """Steps and values of ``column`` where it is finite."""
    points = [(row["step"], row[column]) for row in rows if math.isfinite(row[column])]
    return [step for step, _ in points], [value for _, value in points]


def latest(rows: Sequence[Row], column: str) -> float:
    """The last value of ``column`` that was measured; NaN if there is none."""
    _, values = series(rows, column)
    return values[-1] if values else math.nan


class Summary:
    """The numbers that one run is judged by; NaN where nothing was measured."""

    def __init__(self, rows: Sequence[Row]) -> None:
        _, losses = series(rows, "train_loss")
        self.train_loss = _mean(losses[-max(1, len(losses) // 10) :])
        self.eval_loss = latest(rows, "eval_loss")
        self.bits_per_byte = self.eval_loss / math.log(2)
        self.optimizer_ms = _median(series(rows, "optimizer_ms")[1])
        self.step_ms = _median(series(rows, "step_ms")[1])
        self.optimizer_share = self.optimizer_ms / self.step_ms
        self.seconds = _step_seconds(rows)
        self.outer_seconds = math.fsum(series(rows, "outer_ms")[1]) / 1e3


def _step_seconds(rows: Sequence[Row]) -> float:
    """What all steps of a run took together, without evaluations."""
    steps, means = series(rows, "step_ms")
    ends = zip([0.0, *steps], steps, means, strict=False)
    return math.fsum((end - start) * ms for start, end, ms in ends) / 1e3


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def write_csv(path: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """Write all rows of ``runs`` (name -> rows), with the name first and gaps left empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("optimizer", *COLUMNS))
        writer.writeheader()
        for name, rows in runs.items():
            for row in rows:
                writer.writerow(
                    {"optimizer": name}
                    | {key: "" if math.isnan(value) else value for key, value in row.items()}
                )
