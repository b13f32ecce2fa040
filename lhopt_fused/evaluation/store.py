"""Results of runs in an SQLite file: one row a run, found again by what was run."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from lhopt_fused.evaluation.rows import (
    FORMAT,
    KEY,
    NESTED,
    VALUES,
    Circumstances,
    Row,
    StoreError,
    from_record,
    json_text,
    machine,
    refuse_others,
    to_record,
)
from lhopt_fused.evaluation.run import RunResult, RunSpec

__all__ = ["Merged", "Store"]

_TABLE: Final = f"""
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    task TEXT NOT NULL, size TEXT NOT NULL, optimizer TEXT NOT NULL,
    hyperparameters TEXT NOT NULL, seed INTEGER NOT NULL, budget REAL NOT NULL,
    data TEXT NOT NULL, versions TEXT NOT NULL, device TEXT NOT NULL,
    machine TEXT NOT NULL, parameters INTEGER NOT NULL,
    steps INTEGER NOT NULL, report_loss REAL NOT NULL, metrics TEXT NOT NULL,
    eval_loss REAL NOT NULL, curve TEXT NOT NULL, seconds REAL NOT NULL,
    optimizer_seconds REAL NOT NULL, trajectory TEXT NOT NULL,
    UNIQUE ({", ".join(KEY)})
)
"""
_BUSY_SECONDS: Final = 60.0


class Merged(NamedTuple):
    """What became of rows that were taken over.

    Attributes:
        new: how many were.
        known: how many were there already, and stay as they were.
        different: how many of these have another loss here than there.
    """

    new: int
    known: int
    different: int


class Store:
    """Rows in a file, which several processes may use at once.

    A row is written whole or not at all, and only once: what is there already stays. What is only
    read is not written to.

    Args:
        path: of the file; it is made where there is none.
        create: whether it may be made.

    Raises:
        StoreError: it is no store, or of another version of this package, or cannot be made.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        if not create and not path.is_file():
            raise StoreError(f"there is no store {path}; `lhopt eval` makes one")
        if not self._is_one():
            with self._opened() as connection:
                connection.execute("BEGIN IMMEDIATE")
                if not _tables(connection):  # another process may have been faster
                    connection.execute(_TABLE)
                    connection.execute(f"PRAGMA user_version = {FORMAT}")

    def _is_one(self) -> bool:
        """Whether there is a store; False where there is nothing yet."""
        with self._opened() as connection:
            connection.execute("BEGIN")  # both are of one moment: another process may make it now
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            known = _tables(connection)
        if version != FORMAT and (version or known):
            raise StoreError(
                f"{self.path} is a store of format {version}, expected {FORMAT}: it was written by "
                "another version of lhopt-fused, or by something else; nothing was changed: read "
                "it with that version, or use another --out"
            )
        return bool(known)

    def add(self, spec: RunSpec, circumstances: Circumstances, result: RunResult) -> bool:
        """Keep a result of this machine; whether it is new.

        Raises:
            StoreError: it cannot be written (a full disk); nothing has changed.
        """
        with self._opened() as connection:
            return _insert(connection, Row(0, spec, circumstances, result, machine()))

    def merge(self, rows: Sequence[Row], source: Path) -> Merged:
        """Take over rows of elsewhere, all or none.

        Args:
            rows: what is taken over.
            source: where they are from, for messages.

        Raises:
            StoreError: they cannot be compared with what is here, or cannot be written.
        """
        refuse_others(self.rows(), rows, source)
        with self._opened() as connection:
            known = [row for row in rows if not _insert(connection, row)]
            different = sum(_loss(connection, row) != row.result.report_loss for row in known)
        return Merged(len(rows) - len(known), len(known), different)

    def __contains__(self, run: tuple[RunSpec, Circumstances]) -> bool:
        with self._opened() as connection:
            return _found(connection, "1", _key(*run)) is not None

    def rows(self) -> list[Row]:
        """Every run, in the order of completion.

        Raises:
            StoreError: a row is damaged.
        """
        columns = ("id", *KEY, *VALUES)
        with self._opened() as connection:
            connection.row_factory = sqlite3.Row
            found = connection.execute(f"SELECT {', '.join(columns)} FROM runs ORDER BY id")
            return [self._row(row) for row in found]

    def _row(self, row: sqlite3.Row) -> Row:
        try:
            nested = {name: json.loads(row[name]) for name in NESTED}
            return from_record(row["id"], {**dict(row), **nested})
        except (TypeError, ValueError, KeyError, AttributeError) as error:
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


def _tables(connection: sqlite3.Connection) -> int:
    count: int = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return count


def _insert(connection: sqlite3.Connection, row: Row) -> bool:
    """Write a row unless it is there; whether it was not."""
    record = to_record(row)
    columns = (*KEY, *VALUES)
    values = [json_text(record[name]) if name in NESTED else record[name] for name in columns]
    marks = ", ".join("?" * len(columns))
    done = connection.execute(
        f"INSERT OR IGNORE INTO runs ({', '.join(columns)}) VALUES ({marks})", values
    )
    return done.rowcount == 1


def _loss(connection: sqlite3.Connection, row: Row) -> float:
    loss: float = _found(connection, "report_loss", _key(row.spec, row.circumstances))
    return loss


def _found(connection: sqlite3.Connection, what: str, key: Sequence[Any]) -> Any:
    where = " AND ".join(f"{name} = ?" for name in KEY)
    found = connection.execute(f"SELECT {what} FROM runs WHERE {where}", key).fetchone()
    return None if found is None else found[0]


def _key(spec: RunSpec, circumstances: Circumstances) -> tuple[Any, ...]:
    own = (spec.task, spec.size, spec.optimizer, _canonical(spec.hyperparameters))
    data, versions, device = circumstances
    return (*own, spec.seed, spec.budget, data, _canonical(versions), device)


def _canonical(text: str) -> str:
    """JSON as it is in the store."""
    return json_text(json.loads(text))
