"""A report as one web page that needs nothing else: pictures are inside, it fits a phone and a printer."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .document import Block, Document, Folded, Heading, Listing, Picture, Table, Text

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 0 auto;
       padding: 1rem; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.2; margin: 1.6em 0 .5em; }
h1 { margin-top: .5em; } h2 { border-bottom: 2px solid #0072B2; padding-bottom: .2em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
.caption { font-weight: 600; font-size: .85rem; margin: 1em 0 .2em; }
th, td { padding: .25em .6em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tbody tr:hover td { background: #f2f7fb; }
.note { font-size: .85rem; color: #555; margin: .3em 0; max-width: 50rem; }
figure { margin: 1em 0; } img { max-width: 100%; height: auto; } figcaption { font-size: .85rem; color: #555; }
details { margin: .6em 0; padding: .2em .8em; border-left: 3px solid #ccc; } summary { cursor: pointer; }
@media print { .scroll { overflow: visible; } }
"""


def html(document: Document, folder: Path) -> str:
    """Return a document as HTML; pictures are read from `folder` and put inside."""
    body = "\n".join(_html(block, folder) for block in document.blocks)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(document.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body><h1>{escape(document.title)}</h1>\n{body}\n</body></html>\n")


def _html(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Listing):
        return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Picture):
        image = base64.b64encode((folder / block.file).read_bytes()).decode()
        return (f'<figure><img src="data:image/png;base64,{image}" alt="{escape(block.caption)}">'
                f"<figcaption>{escape(block.caption)}</figcaption></figure>")
    if isinstance(block, Folded):
        inner = "\n".join(_html(part, folder) for part in block.blocks)
        return f"<details><summary>{escape(block.title)}</summary>\n{inner}\n</details>"
    return _table(block)


def _table(table: Table) -> str:
    rows = "\n".join(_row(row, "td") for row in table.rows)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (f'<p class="caption">{escape(table.title)}</p><div class="scroll"><table><thead>{_row(table.head, "th")}'
            f"</thead><tbody>\n{rows}\n</tbody></table></div>{notes}")


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
