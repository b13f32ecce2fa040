"""The report of an evaluation: a page, the same in Markdown, and the rows that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lhopt_fused.evaluation.contents import contents
from lhopt_fused.evaluation.document import Block, Picture, html, markdown
from lhopt_fused.evaluation.exchange import rows_text, write_whole
from lhopt_fused.evaluation.rows import Row
from lhopt_fused.evaluation.summary import Overall, overall, summaries
from lhopt_fused.evaluation.task import Size

__all__ = ["write_report"]

_PICTURES: Final = "pictures"
_ROWS: Final = "rows.jsonl"


def write_report(rows: Sequence[Row], size: Size, folder: Path) -> list[Overall]:
    """Write ``report.html``, ``report.md`` with its pictures, and ``rows.jsonl``.

    Each file is written whole or not at all.

    Args:
        rows: of a store.
        size: of the tasks.
        folder: is made where there is none.

    Returns:
        The summary over all tasks; nothing where there are no rows of this size at budget 1.

    Raises:
        OSError: the folder cannot be written to.
    """
    found = [summary for summary in summaries(rows, size) if summary.best]
    if not found:
        return []
    blocks = contents(found, _ROWS)
    for picture in _pictures(blocks):
        write_whole(folder / _PICTURES / picture.name, picture.png)
    kept = sorted((row for summary in found for row in summary.rows), key=lambda row: row.id)
    write_whole(folder / _ROWS, rows_text(kept))
    write_whole(folder / "report.md", markdown(blocks, _PICTURES))
    write_whole(folder / "report.html", html(blocks))
    return overall(found)


def _pictures(blocks: Sequence[Block]) -> list[Picture]:
    found = []
    for block in blocks:
        if isinstance(block, Picture):
            found.append(block)
        elif isinstance(block, Sequence):
            found += block
    return found
