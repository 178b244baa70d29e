"""What the values of masks mean, from `--labels`, from a table, or from a file of the source; it is never guessed."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DatasetError
from ...files import parse_json, read_text
from .found import INTEGERS, Found, Layout

_BACKGROUND, _IGNORE = "background", "ignore"
_TABLES = "a CSV file with name and value, a JSON object {name: value}, or an ITK-SNAP label file"


@dataclass(frozen=True)
class Labels:
    """The labels of the new data set.

    numbers: label -> its value in the new masks, 1 and up. legend: value in a source's mask -> label, or background.
    origin: where the names come from.
    """

    numbers: Mapping[str, int]
    legend: Mapping[int, str]
    origin: str

    def of(self, case: Found) -> dict[int, int]:
        """Return value in the case's mask of integers -> value in the new mask."""
        legend = self.legend if case.legend is None else case.legend
        return {value: self.numbers.get(name, 0) for value, name in legend.items()
                if name in self.numbers or name == _BACKGROUND}


def parse_labels(texts: Sequence[str]) -> list[tuple[str, int | None]]:
    """Return the labels of `--labels` in their order, each with its value in the masks, or None for a name alone.

    texts: NAME=VALUE, NAME, several of them with commas between, or the path of a table.

    Raises:
        DatasetError: a text is none of these.
    """
    found: list[tuple[str, int | None]] = []
    for text in texts:
        if Path(text).suffix and Path(text).is_file():
            found += [(name, value) for value, name in read_legend(Path(text)).items()]
            continue
        for word in filter(None, (w.strip() for w in text.split(","))):
            name, equals, value = word.rpartition("=")
            if equals and not (name.strip() and value.strip().isdecimal()):
                raise DatasetError(f"--labels {word!r}: write NAME=VALUE with a whole number, such as liver=1, a NAME "
                                   f"where each label has a file of its own, or the path of {_TABLES}.")
            found.append((name.strip(), int(value)) if equals else (word, None))
    return found


def read_legend(path: Path) -> dict[int, str]:
    """Return value -> label from a table; the value 0 is left out.

    Raises:
        DatasetError: the file is no such table.
    """
    try:
        text = read_text(path, encoding="utf-8-sig")
        rows = _json_rows(parse_json(text)) if path.suffix.lower() == ".json" else _text_rows(text)
    except (OSError, ValueError) as error:
        raise DatasetError(f"The labels in {path} cannot be read ({error}); give {_TABLES}.") from error
    if not rows:
        raise DatasetError(f"{path} names no label; give {_TABLES}.")
    return {value: name for value, name in rows if value}


def _json_rows(content: Any) -> list[tuple[int, str]]:
    content = content.get("labels", content) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    return [(int(k), str(v)) if str(k).isdecimal() else (int(v), str(k)) for k, v in content.items()]


def _text_rows(text: str) -> list[tuple[int, str]]:
    if snap := re.findall(r'^\s*(\d+)(?:\s+[\d.]+){3,6}\s+"(.*)"\s*$', text, re.MULTILINE):  # ITK-SNAP
        return [(int(value), name) for value, name in snap]
    rows = []
    for row in csv.reader(text.splitlines(), delimiter="\t" if "\t" in text else ";" if ";" in text else ","):
        cells = [cell.strip() for cell in row]
        numbers = [cell for cell in cells[:2] if cell.isdecimal()]
        if len(cells) >= 2 and numbers:
            rows.append((int(numbers[0]), cells[1] if cells[0] == numbers[0] else cells[0]))
    return rows


def choose_labels(layout: Layout, given: Sequence[tuple[str, int | None]]) -> Labels:
    """Return the labels of the data set, from what the user gave or what the source says.

    Raises:
        DatasetError: nothing names the values of the masks, or a name of the user belongs to no mask.
    """
    named = list(dict.fromkeys(label for case in layout.cases for label in case.masks if label != INTEGERS))
    with_integers = [case for case in layout.cases if INTEGERS in case.masks]
    legends = list(dict.fromkeys(name for case in with_integers for name in (case.legend or {}).values()))
    if given:
        legend = {value: name for name, value in given if value is not None}
        return Labels(_numbered([name for name, _ in sorted(given, key=lambda g: (g[1] is None, g[1] or 0))]
                                if with_integers else [name for name, _ in given]), legend, "--labels")
    if with_integers and not legends and not layout.legend:
        raise DatasetError("The masks hold their labels as whole numbers, and no file says what the numbers mean. Name "
                           "them: --labels NAME=1,NAME=2 or --labels TABLE.csv (columns name and value).")
    legend = dict(layout.legend or {})
    names = [legend[value] for value in sorted(legend)] + legends + sorted(named)
    origin = layout.legend_from or ("the legends beside the masks" if legends else "the names of the mask files")
    return Labels(_numbered(names), legend, origin)


def _numbered(names: Sequence[str]) -> dict[str, int]:
    """Number the labels from 1 in their order; nnU-Net wants the ignore label last."""
    names = [n for n in dict.fromkeys(names) if n.lower() not in (_BACKGROUND, _IGNORE)] + (
        [_IGNORE] if any(n.lower() == _IGNORE for n in names) else [])
    return {name: number for number, name in enumerate(names, 1)}
