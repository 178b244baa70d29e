"""A report as a list of blocks, which become Markdown here and a web page in `page.py`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = str | int | float | bool | None
MISSING = "-"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table for people (head, rows) and the same as numbers for programs (records), with notes on how to read it.

    name: of its CSV file. title: what it shows and of which data.
    """

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    records: Sequence[Mapping[str, Value]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Heading:
    """Level 2 or 3; the document's title is level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Listing:
    """A bulleted list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A PNG file, relative to the folder of the report, and what it shows."""

    file: str
    caption: str


@dataclass(frozen=True)
class Folded:
    """Blocks that a reader opens by their title."""

    title: str
    blocks: Sequence[Block]


Block: TypeAlias = Table | Heading | Text | Listing | Picture | Folded


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    blocks: Sequence[Block]

    def tables(self) -> Iterator[Table]:
        """Yield its tables, folded ones too."""
        return _tables(self.blocks)


def _tables(blocks: Sequence[Block]) -> Iterator[Table]:
    for block in blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Folded):
            yield from _tables(block.blocks)


def markdown(document: Document) -> str:
    """Return a document as GitHub-flavoured Markdown."""
    return "\n\n".join([f"# {document.title}", *(_markdown(block) for block in document.blocks)]) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Listing):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Picture):
        return f"![{block.caption}]({block.file})\n\n*{block.caption}*"
    if isinstance(block, Folded):
        inner = "\n\n".join(_markdown(part) for part in block.blocks)
        return f"<details><summary>{block.title}</summary>\n\n{inner}\n\n</details>"
    return "\n\n".join([f"**{block.title}**", _rows(block), *(f"*{note}*" for note in block.notes)])


def _rows(table: Table) -> str:
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
                   for row in (table.head, *table.rows)]
    return "\n".join([head, "|---" + "|---:" * (len(table.head) - 1) + "|", *body])


def as_csv(table: Table) -> str:
    """Return a table's records as CSV with a header; what is undefined is empty."""
    stream = io.StringIO()
    names = list(dict.fromkeys(name for record in table.records for name in record))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None or v != v else v for k, v in record.items()} for record in table.records)
    return stream.getvalue()
