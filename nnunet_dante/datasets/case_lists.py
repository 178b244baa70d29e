"""Files in which the user names cases: which belong to one patient, and which are kept for the test."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..files import parse_json, read_text
from ..types import PathLike


def read_groups(path: PathLike) -> dict[str, list[str]]:
    """Return group -> cases from a JSON file {group: [cases]} or a CSV file case,group; a header is skipped.

    Raises:
        ConfigurationError: the file is missing or of another form.
    """
    path, groups = Path(path), {}
    text = _text(path, "--groups")
    if path.suffix.lower() == ".json":
        groups = _json(text)
        if isinstance(groups, dict) and all(isinstance(v, list) for v in groups.values()):
            return {str(group): list(map(str, cases)) for group, cases in groups.items()}
        raise ConfigurationError(f'--groups {path.name} must hold {{"group": ["case", ...], ...}}.')
    for row in _rows(text, path):
        cells = [cell.strip() for cell in row]
        if any(cells) and (len(cells) != 2 or not all(cells)):
            raise ConfigurationError(f"--groups {path.name} holds the line {','.join(row)!r}; each must be case,group. "
                                     "(A JSON file must be named .json.)")
        if any(cells) and [c.lower() for c in cells] != ["case", "group"]:
            groups.setdefault(cells[1], []).append(cells[0])
    return groups


def read_cases(path: PathLike) -> list[str]:
    """Return the cases of a text file with one a line, or of a JSON list.

    Raises:
        ConfigurationError: the file is missing or holds other JSON.
    """
    path = Path(path)
    text = _text(path, "--test")
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    cases = _json(text)
    if isinstance(cases, list) and all(isinstance(c, str) for c in cases):
        return cases
    raise ConfigurationError(f'--test {path.name} must hold a list of cases: ["case", ...].')


def _rows(text: str, path: Path) -> list[list[str]]:
    try:
        return list(csv.reader(text.splitlines()))
    except csv.Error as error:
        raise ConfigurationError(f"--groups {path.name} is no CSV file ({error}); each line must be "
                                 "case,group.") from error


def _text(path: Path, option: str) -> str:
    try:
        return read_text(path, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{option}: {path} cannot be read ({error}); give a text, CSV or JSON "
                                 "file.") from error


def _json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None
