"""One way in: how hostile files for it are made, how they are read, and what a correct result is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """The folders of one case: valid files, where the hostile one lies, where output goes, what must not appear."""

    samples: Path
    case: Path
    out: Path
    canary: Path


Make = Callable[[Place, Random], None]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One way in. make: random damage. attacks: crafted files, by name. read: returns what was read, as a digest.

    exact: the format has checksums, so whatever is read must be what was written. writes: `read` writes into `out`,
    where an error must leave nothing.
    """

    name: str
    make: Make
    read: Callable[[Place], str | None]
    attacks: Callable[[Place], dict[str, Callable[[], None]]] = lambda place: {}
    exact: bool = False


def digest(value: Any) -> str:
    """One hash for all that nested dicts and lists hold, tensors by their numbers."""
    found = hashlib.sha256()
    _feed(value, found)
    return found.hexdigest()


def _feed(value: Any, found: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _feed(key, found)
            _feed(item, found)
    elif isinstance(value, (list, tuple)):
        found.update(f"{len(value)}[".encode())
        for item in value:
            _feed(item, found)
    elif isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        found.update(f"{type(value).__name__}{value!r};".encode(errors="surrogatepass"))
