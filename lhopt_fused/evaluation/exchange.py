"""Rows as text: a line of JSON each, to be committed with results and merged into other stores."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from lhopt_fused.evaluation.rows import FORMAT, Row, StoreError, from_record, json_text, to_record
from lhopt_fused.evaluation.store import Store

__all__ = ["STORE_NAME", "read_rows", "rows_text", "write_whole"]

STORE_NAME: Final = "runs.sqlite"
"""Of the store in a folder of results."""

_WHAT: Final = "lhopt-fused evaluation rows"
_SQLITE: Final = b"SQLite format 3\0"


def rows_text(rows: Iterable[Row]) -> str:
    """A line that says what this is, and one for each row, with its id."""
    header = json_text({"what": _WHAT, "format": FORMAT})
    lines = [json_text({"id": row.id, **to_record(row)}) for row in rows]
    return "\n".join([header, *lines]) + "\n"


def read_rows(place: Path) -> list[Row]:
    """Rows of a store, of a folder with one, or of a text file of :func:`rows_text`.

    Raises:
        StoreError: it is none of these, of another format, or damaged.
    """
    path = place / STORE_NAME if place.is_dir() else place
    try:
        with path.open("rb") as opened:
            is_store = opened.read(len(_SQLITE)) == _SQLITE
        if is_store:
            return Store(path, create=False).rows()
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}); expected a store, a folder with {STORE_NAME}, or a "
            "file of `lhopt eval export`"
        ) from error
    _check_header(path, lines[0] if lines else "")
    return _unique([_row(path, number, line) for number, line in enumerate(lines[1:], 2)], path)


def _check_header(path: Path, line: str) -> None:
    try:
        header = json.loads(line)
        found = header["format"] if header["what"] == _WHAT else None
    except (ValueError, TypeError, KeyError):
        found = None
    if found is None:
        raise StoreError(
            f"{path} begins with {line[:40]!r}; expected a store or a file of `lhopt eval export`"
        )
    if found != FORMAT:
        raise StoreError(
            f"{path} has rows of format {found}, expected {FORMAT}: it was written by another "
            "version of lhopt-fused; read it with that version"
        )


def _row(path: Path, number: int, line: str) -> Row:
    try:
        record = json.loads(line)
        return from_record(int(record["id"]), record)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise StoreError(
            f"{path}: line {number} is damaged ({type(error).__name__}: {error}); get the file "
            "again, or delete that line"
        ) from error


def _unique(rows: Sequence[Row], path: Path) -> list[Row]:
    if len({row.id for row in rows}) != len(rows):
        raise StoreError(
            f"{path} has two rows of one id; merge the files that it is made of with "
            "`lhopt eval merge` instead of joining them"
        )
    return list(rows)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: what was there before stays until all is written.

    Raises:
        OSError: it cannot be written.
    """
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(raw)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
