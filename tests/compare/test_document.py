"""document.py and page.py: the same blocks as Markdown, CSV and one web page."""

from __future__ import annotations

import base64
import csv
import html.parser
import io
import math

from nnunet_dante.compare.document import Document, Folded, Heading, Listing, Picture, Table, Text, as_csv, markdown
from nnunet_dante.compare.page import html as page

TABLE = Table(name="t", title="Dice <b>", head=["method", "1"], rows=[["A|B", "0.5"]], notes=["read so"],
              records=[{"method": "A|B", "dice": 0.5, "low": math.nan}, {"method": "C", "dice": math.inf, "more": None}])
DOCUMENT = Document("Title & more", [
    Heading("Part"), Text("Words."), Listing(["one", "two"]), TABLE, Picture("plots/p.png", "a picture"),
    Folded("Open me", [Heading("Inside", 3), TABLE])])


def test_markdown_escapes_bars_and_folds():
    text = markdown(DOCUMENT)
    assert "| method | 1 |\n|---|---:|\n| A\\|B | 0.5 |" in text
    assert "<details><summary>Open me</summary>" in text and "### Inside" in text
    assert "![a picture](plots/p.png)" in text and "- one\n- two" in text and text.startswith("# Title & more\n")


def test_folded_tables_are_found():
    assert list(DOCUMENT.tables()) == [TABLE, TABLE]


def test_csv_has_every_column_and_leaves_what_is_undefined_empty():
    rows = list(csv.DictReader(io.StringIO(as_csv(TABLE))))
    assert rows == [{"method": "A|B", "dice": "0.5", "low": "", "more": ""},
                    {"method": "C", "dice": "inf", "low": "", "more": ""}]


class Tags(html.parser.HTMLParser):
    """Open tags must close in order, and nothing may come from elsewhere."""

    void = {"meta", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_escaped_and_needs_nothing_else(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "p.png").write_bytes(b"picture")
    text = page(DOCUMENT, tmp_path)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.links == ["data:image/png;base64," + base64.b64encode(b"picture").decode()]
    assert "Dice &lt;b&gt;" in text and "<title>Title &amp; more</title>" in text
    assert "http" not in text and "@import" not in text and 'name="viewport"' in text
