"""A run as a row, and a row as a record of plain values, for the store and for text files alike."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from lhopt_fused.evaluation.run import CurvePoint, RunResult, RunSpec

__all__ = [
    "COMPARED_VERSIONS",
    "FORMAT",
    "KEY",
    "NESTED",
    "VALUES",
    "Circumstances",
    "Row",
    "StoreError",
    "from_record",
    "json_text",
    "machine",
    "refuse_others",
    "to_record",
]

FORMAT: Final = 2
"""Changes with what a record holds. Records of format 1 lack the size of the model."""

KEY: Final = (
    *("task", "size", "optimizer", "hyperparameters", "seed", "budget"),
    *("data", "versions", "device"),
)
"""The names in a record that say which run it is."""

VALUES: Final = (
    *("machine", "parameters", "steps", "report_loss", "metrics", "eval_loss", "curve"),
    *("seconds", "optimizer_seconds", "trajectory"),
)
"""The names of what became of it."""

COMPARED_VERSIONS: Final = ("lhopt-fused", "protocol", "torch")
"""The versions that must be the same for rows to be compared."""

NESTED: Final = ("hyperparameters", "versions", "metrics", "curve", "trajectory")
"""Those that are more than a number or a word."""

_DIGITS: Final = 6  # of the numbers of curves and trajectories, which are only drawn


class StoreError(Exception):
    """A store, or a file of rows, that cannot be used; says why and what to do."""


class Circumstances(NamedTuple):
    """What else a result depends on; results of one comparison share it.

    Attributes:
        data: digest of the task.
        versions: of the packages, as JSON.
        device: "cpu", or the name of a GPU.
    """

    data: str
    versions: str
    device: str

    @property
    def compared(self) -> dict[str, str]:
        """What must be the same for rows to be compared; other packages may differ."""
        versions = json.loads(self.versions)
        own = {name: str(versions.get(name)) for name in COMPARED_VERSIONS}
        return {"data": self.data, "device": self.device, **own}


@dataclass(frozen=True)
class Row:
    """A run in the store.

    Attributes:
        id: its number in the store, in the order of completion.
        spec: what was run; where a policy was is not kept.
        circumstances: what else it depends on.
        result: what became of it.
        machine: where; times of different machines are not compared.
    """

    id: int
    spec: RunSpec
    circumstances: Circumstances
    result: RunResult
    machine: str = ""


@cache
def machine() -> str:
    """The processor of this machine, as its operating system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def to_record(row: Row) -> dict[str, Any]:
    """The values of a row by :data:`KEY` and :data:`VALUES`; its id is left out."""
    spec, result = row.spec, row.result
    return {
        "task": spec.task,
        "size": spec.size,
        "optimizer": spec.optimizer,
        "hyperparameters": json.loads(spec.hyperparameters),
        "seed": spec.seed,
        "budget": spec.budget,
        "data": row.circumstances.data,
        "versions": json.loads(row.circumstances.versions),
        "device": row.circumstances.device,
        "machine": row.machine,
        "parameters": result.parameters,
        "steps": result.steps,
        "report_loss": result.report_loss,
        "metrics": result.metrics,
        "eval_loss": result.eval_loss,
        "curve": {
            name: [_rounded(point[place]) for point in result.curve]
            for place, name in enumerate(CurvePoint._fields)
        },
        "seconds": result.seconds,
        "optimizer_seconds": result.optimizer_seconds,
        "trajectory": [[_rounded(value) for value in step] for step in result.trajectory],
    }


def from_record(number: int, record: Mapping[str, Any]) -> Row:
    """The inverse of :func:`to_record`, with an id, of values that may have been JSON.

    Raises:
        KeyError, TypeError, ValueError: the record is damaged.
    """
    spec = RunSpec(
        record["task"],
        record["size"],
        record["optimizer"],
        record["hyperparameters"],
        int(record["seed"]),
        float(record["budget"]),
    )
    versions = json.dumps(record["versions"], sort_keys=True)
    return Row(
        number,
        spec,
        Circumstances(record["data"], versions, record["device"]),
        _result(record),
        record["machine"],
    )


def _result(record: Mapping[str, Any]) -> RunResult:
    columns = [record["curve"][name] for name in CurvePoint._fields]
    return RunResult(
        steps=int(record["steps"]),
        report_loss=_number(record["report_loss"]),
        metrics={name: _number(value) for name, value in record["metrics"].items()},
        eval_loss=_number(record["eval_loss"]),
        curve=[
            CurvePoint(int(step), *map(_number, others))
            for step, *others in zip(*columns, strict=True)
        ],
        seconds=_number(record["seconds"]),
        optimizer_seconds=_number(record["optimizer_seconds"]),
        trajectory=[[_number(value) for value in step] for step in record["trajectory"]],
        parameters=int(record["parameters"]),
    )


def json_text(value: Any) -> str:
    """Strict JSON in one line, the same for the same: NaN is null, infinity "inf"."""
    return json.dumps(_strict(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _number(value: float | str | None) -> float:
    """A number that may have been JSON."""
    return math.nan if value is None else float(value)


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")


def refuse_others(known: Iterable[Row], new: Sequence[Row], source: Path) -> None:
    """Refuse rows that cannot be compared with those that they would lie beside.

    Args:
        known: rows that are there; of a task, size and device, the last one counts.
        new: rows that are to join them.
        source: where these are from, for the message.

    Raises:
        StoreError: data or versions of a task differ.
    """
    expected = {_where(row): row.circumstances.compared for row in known}
    for row in new:
        compared = row.circumstances.compared
        wanted = expected.setdefault(_where(row), compared)
        for name, value in compared.items():
            if value != wanted[name]:
                raise StoreError(
                    f"{source}: row {row.id}, of {row.spec.task}, was made with {name} "
                    f"{value[:24]}, and rows that it would be compared with with "
                    f"{wanted[name][:24]}; nothing was taken over: run it again with the same, "
                    "or merge into another store"
                )


def _where(row: Row) -> tuple[str, str, str]:
    return row.spec.task, row.spec.size, row.circumstances.device
