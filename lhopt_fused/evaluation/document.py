"""A report as a list of blocks, and these as Markdown or as one page of HTML."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Block", "Cell", "Heading", "Notes", "Picture", "Table", "Text", "html", "markdown"]


@dataclass(frozen=True)
class Heading:
    """A title; the first of a document is of level 1."""

    text: str
    level: int = 2

    @property
    def anchor(self) -> str:
        """What links to it are called, as GitHub makes them."""
        return re.sub(r"[^\w\- ]", "", self.text.lower()).replace(" ", "-")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notes:
    """Terms and what they mean."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cell:
    """What is in a table.

    Attributes:
        text: a number or a word.
        to: the heading that it leads to, if any.
        rows: rows of the store that are named after the text.
    """

    text: str = ""
    to: Heading | None = None
    rows: Sequence[int] = ()


@dataclass(frozen=True)
class Table:
    """Lines of cells.

    Attributes:
        headings: of the columns; the first column is of words, the others of numbers.
        lines: as many cells each.
        folded: what to open it by, where it is only for the page; Markdown leaves it out.
        ids: of the rows of the store that its lines are, so that numbers lead there.
    """

    headings: Sequence[str]
    lines: Sequence[Sequence[Cell]]
    folded: str = ""
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        name: of its file.
        title: what it shows.
        png: its bytes.
    """

    name: str
    title: str
    png: bytes

    @property
    def encoded(self) -> str:
        """In base 64."""
        return base64.b64encode(self.png).decode()


Block = Heading | Text | Notes | Table | Picture | Sequence[Picture]


def markdown(blocks: Sequence[Block], pictures: str) -> str:
    """A document as Markdown.

    Args:
        blocks: of the document.
        pictures: the folder of its pictures, as links name it.
    """
    parts = [_part(block, pictures) for block in blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _part(block: Block, pictures: str) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + " " + block.text
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Notes):
        return "\n".join(f"- **{term}**: {meaning}" for term, meaning in block.items)
    if isinstance(block, Picture):
        return f"![{block.title}]({pictures}/{block.name})"
    if isinstance(block, Table):
        return "" if block.folded else _table(block)
    return "\n".join(_part(picture, pictures) for picture in block)


def _table(table: Table) -> str:
    rule = ["---"] + ["---:"] * (len(table.headings) - 1)
    lines = [[_cell(cell) for cell in line] for line in table.lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (table.headings, rule, *lines))


def _cell(cell: Cell) -> str:
    text = f"[{cell.text}](#{cell.to.anchor})" if cell.to is not None else cell.text
    return " ".join([text, *map(str, cell.rows)]) if text else " ".join(map(str, cell.rows))


def html(blocks: Sequence[Block]) -> str:
    """A document as one page that needs nothing else."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lhopt_fused.evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    kinds = [_kind(block) for block in blocks]
    titles = [block.text for block in blocks if isinstance(block, Heading)]
    return environment.get_template("page.html").render(
        title=titles[0] if titles else "", blocks=list(zip(kinds, blocks, strict=True))
    )


def _kind(block: Block) -> str:
    return "pictures" if isinstance(block, Sequence) else type(block).__name__.lower()
