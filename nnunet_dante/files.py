"""Files that are whole or not there, written under a temporary name, then renamed; foreign content within bounds."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from .errors import StorageError

MAX_JSON_BYTES = 32 << 20  # a dataset.json that lists 100,000 cases by name has about 10 MB
NNUNET_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")  # the variables that name them
_MAX_DEPTH = 64
_MAX_SIZE = 1 << 26
_MAX_BITS = 256  # numpy keeps generator states of 128 bits; a float holds up to 1024


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; it replaces `path` at the end, or vanishes on an error.

    Raises:
        StorageError: the file cannot be written; `path` is what it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())  # a full disk may show only now, and a rename must not overtake the content
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises its own over it
        if not isinstance(cause, OSError):
            raise
        raise cannot_write(path, cause) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def cannot_write(path: str | Path, error: OSError) -> StorageError:
    """Return the error for a file that cannot be written: which, why, how much room there is, what to do."""
    path = Path(path)
    folder = next((parent for parent in path.parents if parent.is_dir()), None)
    free = f", {shutil.disk_usage(folder).free / 2**20:.0f} MiB free" if folder else ""
    return StorageError(f"{path} cannot be written ({error.strerror or error}{free}); what was there before still is. "
                        "Make room, make the folder writable or choose another, then run the same command again.")


def nnunet_folder(variable: str, dataset: str) -> Path | None:
    """Return a data set's folder below the folder in an environment variable of nnU-Net; None if it does not exist."""
    root = os.environ.get(variable)
    if not root or Path(dataset).name != dataset:  # the name comes from a file, and must not lead to another folder
        return None
    return folder if (folder := Path(root, dataset)).is_dir() else None


def write_text_atomically(text: str, path: str | Path) -> None:
    """Write UTF-8 text so that a reader sees the old file or the whole new one."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header; floats have six digits, None and nan are empty."""
    rows, text = list(rows), io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(chain.from_iterable(rows))), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({name: _digits(value) if isinstance(value, float) else value for name, value in row.items()})
    return text.getvalue()


def _digits(value: float) -> float | str:
    return "" if math.isnan(value) else float(f"{value:.6g}")


def read_text(path: str | Path, *, encoding: str = "utf-8") -> str:
    """Return the text of a regular file of at most `MAX_JSON_BYTES`.

    Raises:
        OSError: there is no such regular file.
        ValueError: it is larger, or in another encoding.
    """
    path = Path(path)
    if not path.is_file():  # a pipe or device might never end
        raise FileNotFoundError(f"no regular file at {path}")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"it has {size} bytes, more than {MAX_JSON_BYTES}")
    return path.read_text(encoding=encoding)


def read_json(path: str | Path) -> Any:
    """Return what a JSON file of unknown origin holds, within the bounds of `read_text` and `bounded`.

    Raises:
        OSError: there is no such regular file.
        ValueError: it is no JSON, or beyond bounds: every other error that its content can lead to.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Return the content of JSON text within the bounds of `bounded`.

    Raises:
        ValueError: it is no JSON, or beyond bounds.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    bounded(content)
    return content


def bounded(content: object) -> list[object]:
    """Walk through nested dicts, lists and tuples; return what in them is no JSON value, such as tensors.

    A pickle can hold itself, or one list of lists many times over: then a few bytes take for ever to walk, copy or
    print. So this counts what printing would cost.

    Raises:
        ValueError: nested more than 64 deep, more than 2**22 entries or 2**26 characters, a number of more than 256
            bits, or text that is not Unicode.
    """
    others, size = list[object](), 0
    path: list[Iterator[object]] = [iter((content,))]  # an iterator a level, so that the walk itself needs no memory
    while path:
        try:
            value = next(path[-1])
        except StopIteration:
            path.pop()
            continue
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            path.append(chain(value, value.values()) if isinstance(value, dict) else iter(value))
            size += 16 * len(value)
        elif isinstance(value, (str, bytes)):
            size += len(value if isinstance(value, bytes) else value.encode())  # UnicodeEncodeError is a ValueError
        elif isinstance(value, int):
            if value.bit_length() > _MAX_BITS:
                raise ValueError(f"it holds a number of {value.bit_length()} bits")
        elif not (value is None or isinstance(value, float)):
            others.append(value)
        if size > _MAX_SIZE or len(path) > _MAX_DEPTH + 1:
            raise ValueError("its entries are too many" if size > _MAX_SIZE else "it is nested too deeply")
    return others


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 file" and "2 files"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Return `text` with control characters but line feeds escaped: names in foreign files must steer no terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
