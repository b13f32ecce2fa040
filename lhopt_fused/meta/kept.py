"""Results that take long to find, kept in a folder from one use to the next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["kept"]

Row = tuple[NDArray[np.float64], ...]


def kept(
    folder: Path,
    name: str,
    depends_on: Mapping[str, Any],
    fields: Sequence[str],
    find: Callable[[], Iterable[Row]],
) -> list[Row]:
    """What was found before, or else what is found now.

    Args:
        folder: where it is kept.
        name: of the file, which goes on with a digest.
        depends_on: all that the results depend on, as plain values.
        fields: names of the arrays in a row.
        find: gives the rows.
    """
    described = json.dumps(depends_on, sort_keys=True).encode()
    path = folder / f"{name}-{hashlib.sha256(described).hexdigest()[:16]}.npz"
    if path.is_file():
        with np.load(path) as held:
            count = len(held.files) // len(fields)
            return [tuple(held[f"{row}.{field}"] for field in fields) for row in range(count)]
    rows = list(find())
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    named = {
        f"{index}.{field}": array
        for index, row in enumerate(rows)
        for field, array in zip(fields, row, strict=True)
    }
    np.savez(partial, **named)  # type: ignore[arg-type]
    partial.replace(path)
    return rows
