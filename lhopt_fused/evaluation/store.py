"""Results of runs in an SQLite file: one row a run, found again by what was run."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from lhopt_fused.evaluation.run import CurvePoint, RunResult, RunSpec
from lhopt_fused.evaluation.task import Size

__all__ = ["Circumstances", "Row", "Store", "StoreError"]

_FORMAT: Final = 1
_KEY: Final = (
    *("task", "size", "optimizer", "hyperparameters", "seed", "budget"),
    *("data", "versions", "device"),
)
_VALUES: Final = (
    *("steps", "report_loss", "metrics", "eval_loss", "curve", "seconds"),
    *("optimizer_seconds", "trajectory"),
)
_TABLE: Final = f"""
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY,
    task TEXT NOT NULL, size TEXT NOT NULL, optimizer TEXT NOT NULL,
    hyperparameters TEXT NOT NULL, seed INTEGER NOT NULL, budget REAL NOT NULL,
    data TEXT NOT NULL, versions TEXT NOT NULL, device TEXT NOT NULL,
    steps INTEGER NOT NULL, report_loss REAL NOT NULL, metrics TEXT NOT NULL,
    eval_loss REAL NOT NULL, curve TEXT NOT NULL, seconds REAL NOT NULL,
    optimizer_seconds REAL NOT NULL, trajectory TEXT NOT NULL,
    UNIQUE ({", ".join(_KEY)})
)
"""
_BUSY_SECONDS: Final = 60.0


class StoreError(Exception):
    """A store that cannot be used; says why and what to do."""


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


@dataclass(frozen=True)
class Row:
    """A run in the store.

    Attributes:
        id: its number in the store, in the order of completion.
        spec: what was run; where a policy was is not kept.
        circumstances: what else it depends on.
        result: what became of it.
    """

    id: int
    spec: RunSpec
    circumstances: Circumstances
    result: RunResult


class Store:
    """Rows in a file, which several processes may use at once.

    A row is written whole or not at all, and only once: what is there already stays.

    Args:
        path: of the file; it is made where there is none.
        create: whether it may be made.

    Raises:
        StoreError: it is no store, or of another version of this package, or cannot be made.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        if not create and not path.is_file():
            raise StoreError(f"there is no store {path}; run `lhopt eval` without --report-only")
        with self._opened() as connection:
            connection.execute("BEGIN IMMEDIATE")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            known = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version != _FORMAT and (version or known):
                raise StoreError(
                    f"{path} is a store of format {version}, expected {_FORMAT}: it was written by "
                    "another version of lhopt-fused, or by something else; use another --out"
                )
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version = {_FORMAT}")

    def add(self, spec: RunSpec, circumstances: Circumstances, result: RunResult) -> bool:
        """Keep a result; whether it is new.

        Raises:
            StoreError: it cannot be written (a full disk); nothing has changed.
        """
        values = {
            "steps": result.steps,
            "report_loss": result.report_loss,
            "metrics": json.dumps(result.metrics),
            "eval_loss": result.eval_loss,
            "curve": json.dumps(result.curve),
            "seconds": result.seconds,
            "optimizer_seconds": result.optimizer_seconds,
            "trajectory": json.dumps(result.trajectory),
        }
        columns = (*_KEY, *_VALUES)
        marks = ", ".join("?" * len(columns))
        row = (*_key(spec, circumstances), *(values[name] for name in _VALUES))
        with self._opened() as connection:
            done = connection.execute(
                f"INSERT OR IGNORE INTO runs ({', '.join(columns)}) VALUES ({marks})", row
            )
            return done.rowcount == 1

    def __contains__(self, run: tuple[RunSpec, Circumstances]) -> bool:
        where = " AND ".join(f"{name} = ?" for name in _KEY)
        with self._opened() as connection:
            found = connection.execute(f"SELECT 1 FROM runs WHERE {where}", _key(*run))
            return found.fetchone() is not None

    def rows(self) -> list[Row]:
        """Every run, in the order of completion."""
        columns = ("id", *_KEY, *_VALUES)
        with self._opened() as connection:
            connection.row_factory = sqlite3.Row
            found = connection.execute(f"SELECT {', '.join(columns)} FROM runs ORDER BY id")
            return [self._row(row) for row in found]

    def merge(self, others: Iterable[Path]) -> int:
        """Take over the rows of other stores; how many were new.

        Raises:
            StoreError: one of them is no store.
        """
        return sum(
            self.add(row.spec, row.circumstances, row.result)
            for path in others
            for row in Store(path, create=False).rows()
        )

    def _row(self, row: sqlite3.Row) -> Row:
        try:
            circumstances = Circumstances(row["data"], row["versions"], row["device"])
            return Row(row["id"], _spec(row), circumstances, _result(row))
        except (TypeError, ValueError, KeyError) as error:
            raise StoreError(
                f"row {row['id']} of {self.path} is damaged ({error}); delete that row"
            ) from error

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A connection in one transaction."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with (
                closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS)) as connection,
                connection,
            ):
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the store {self.path} cannot be used: {error}. Nothing that was in it is lost; "
                "where it is no store or the disk is full, use another --out or make room"
            ) from error


def _key(spec: RunSpec, circumstances: Circumstances) -> tuple[Any, ...]:
    own = (spec.task, spec.size, spec.optimizer, spec.hyperparameters, spec.seed, spec.budget)
    return (*own, *circumstances)


def _spec(row: sqlite3.Row) -> RunSpec:
    size: Size = row["size"]
    given = json.loads(row["hyperparameters"])
    return RunSpec(row["task"], size, row["optimizer"], given, row["seed"], row["budget"])


def _result(row: sqlite3.Row) -> RunResult:
    return RunResult(
        steps=row["steps"],
        report_loss=row["report_loss"],
        metrics=json.loads(row["metrics"]),
        eval_loss=row["eval_loss"],
        curve=[CurvePoint(*point) for point in json.loads(row["curve"])],
        seconds=row["seconds"],
        optimizer_seconds=row["optimizer_seconds"],
        trajectory=json.loads(row["trajectory"]),
    )
