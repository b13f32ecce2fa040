"""The commands around stores: ``lhopt eval export``, ``lhopt eval merge`` and ``lhopt report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.table import Table

from lhopt_fused.evaluation.messages import bad_input, console, names, say

if TYPE_CHECKING:
    from lhopt_fused.evaluation.rows import Row
    from lhopt_fused.evaluation.task import Size

__all__ = ["export", "merge", "report", "say_report"]

_SHOWN: Final = (
    *("optimizer", "wins: default", "wins: tuned", "wins: control", "speed-up: tuned"),
    *("by the clock", "score"),
)

Source = Annotated[
    Path,
    typer.Argument(help="A store, a folder with one, or a file of `lhopt eval export`."),
]


def export(store: Source, file: Annotated[Path, typer.Argument(help="Is written anew.")]) -> None:
    """Write the rows of a store as text, a line each: to commit with results, and to merge."""
    from lhopt_fused.evaluation.exchange import read_rows, rows_text, write_whole
    from lhopt_fused.evaluation.summary import latest

    with bad_input():
        rows = read_rows(store)
        kept = latest(rows)
        write_whole(file, rows_text(kept))
    say(f"{len(kept)} rows in {file}")
    if len(kept) < len(rows):
        say(
            f"{len(rows) - len(kept)} rows of other data or versions than the last of their task "
            "are left out: they cannot be compared with these"
        )


def merge(
    store: Annotated[Path, typer.Argument(help="The store that takes them; may be new.")],
    sources: Annotated[
        list[Path], typer.Argument(help="Stores, folders, or files of `lhopt eval export`.")
    ],
) -> None:
    """Take over the rows of other stores and files; a run that is there already counts once."""
    from lhopt_fused.evaluation.exchange import STORE_NAME, read_rows
    from lhopt_fused.evaluation.store import Store

    with bad_input():
        found = [(source, read_rows(source)) for source in sources]
        target = Store(store / STORE_NAME if store.is_dir() else store)
        for source, rows in found:
            merged = target.merge(rows, source)
            say(f"{source}: {merged.new} runs taken over, {merged.known} were there already")
            if merged.different:
                say(
                    f"{merged.different} of these have another loss there, as other processors "
                    "round otherwise; those that were here stay"
                )


def report(
    store: Source,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the report; the one that the store is in if not given."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Names with commas between; or all.")] = "all",
    size: Annotated[str, typer.Option(help="small, full, or all.")] = "all",
) -> None:
    """Write what a store says: a page of HTML, the same in Markdown, pictures and rows."""
    from lhopt_fused.evaluation.exchange import read_rows
    from lhopt_fused.evaluation.task import SIZES

    with bad_input():
        rows = read_rows(store)
        chosen = names("--tasks", tasks, sorted({row.spec.task for row in rows}))
        kept = [row for row in rows if row.spec.task in chosen]
        sizes = names("--size", size, list(SIZES))
        there = [one for one in sizes if any(row.spec.size == one for row in kept)]
        folder = out or (store if store.is_dir() else store.parent)
        for one in there:
            say_report(kept, one, folder if len(there) == 1 else folder / one)
    if not there:
        say(f"There are no such runs in {store} yet")


def say_report(rows: list[Row], size: Size, folder: Path) -> None:
    """Write the report of rows of one size, and print its table over all tasks.

    Raises:
        OSError: the folder cannot be written to.
    """
    from lhopt_fused.evaluation.contents import OVERALL_HEADINGS, overall_cells
    from lhopt_fused.evaluation.report import write_report

    results = write_report(rows, size, folder)
    if not results:
        say(f"There are no runs of these tasks of size {size} in the store yet")
        return
    shown = [OVERALL_HEADINGS.index(heading) for heading in _SHOWN]
    table = Table(box=None, pad_edge=False)
    for heading in _SHOWN:
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for result in results:
        cells = overall_cells(result)
        table.add_row(*(cells[index] for index in shown))
    console.print(table)
    say(f"Report: {folder / 'report.html'}, {folder / 'report.md'}")
