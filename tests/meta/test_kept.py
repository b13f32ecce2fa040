"""What takes long to find is found once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lhopt_fused.meta.kept import kept

ROWS = [(np.arange(3.0), np.ones((2, 3))), (np.zeros(1), np.full((2, 1), np.nan))]


def test_what_was_found_is_not_looked_for_again(tmp_path: Path) -> None:
    asked = []

    def look(seed: int) -> list:
        def find() -> list:
            asked.append(seed)
            return [(row[0] + seed, row[1]) for row in ROWS]

        return kept(tmp_path / "new", "scores", {"seed": seed}, ("losses", "rewards"), find)

    first, again, other = look(0), look(0), look(1)
    assert asked == [0, 1]
    for row, same, shifted in zip(first, again, other, strict=True):
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(row, same, strict=True))
        assert np.array_equal(row[0] + 1, shifted[0])
    assert len(list((tmp_path / "new").iterdir())) == 2  # no partial file is left
