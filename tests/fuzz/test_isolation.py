"""isolation.py: a reader that is not safe is caught, whichever way it is not."""

from __future__ import annotations

import os
import pickle
import sys
import time
from pathlib import Path

import pytest

from fuzz import isolation
from fuzz.crafted import bomb
from fuzz.reader import Place, Reader
from nnunet_dante.errors import DanteError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and counts of a process are Linux's")


def outcome(tmp_path: Path, read, make=lambda place, rng: None, expected: str | None = None) -> tuple[str, str]:
    found = isolation.run_case(Reader(name="unsafe", make=make, read=read), tmp_path, None, "seed", expected)
    return found.kind, found.detail


def hostile_pickle(place: Place, _) -> None:
    (place.case / "a.pkl").write_bytes(pickle.dumps(bomb(place.canary)))


def half_written(place: Place) -> None:
    (place.out / "result.json").write_text("{")
    raise DanteError("too late")


def not_renamed(place: Place) -> str:
    (place.out / ".result.json.1.tmp").write_text("{}")
    return ""


def asks_for_too_much(_: Place) -> None:
    try:
        bytearray(1 << 34)
    except MemoryError as error:
        raise DanteError("damaged") from error


def refuses(_: Place) -> None:
    raise DanteError("damaged")


@pytest.mark.parametrize(("read", "said"), [
    (lambda place: pickle.loads((place.case / "a.pkl").read_bytes()) and "", "code ran, or a file was written outside"),
    (lambda place: (place.out.parent / "escaped").write_text("x") and "", "escaped"),
    (half_written, "left ['result.json'] behind"), (not_renamed, "left ['.result.json.1.tmp'] behind"),
    (lambda _: str(len(b"1" * (300 << 20))), "MiB (failure: read something else"), (asks_for_too_much, "too much memory"),
    (lambda _: 1 / 0, "ZeroDivisionError"), (lambda _: sys.exit(0), "SystemExit"),
    (lambda _: os._exit(0), "crashed with exit status 0"), (lambda _: os.abort(), "crashed with exit status -6"), (lambda _: "other", "something else")])
def test_an_unsafe_reader_is_caught(tmp_path, read, said):
    kind, detail = outcome(tmp_path, read, hostile_pickle, expected="what was written")
    assert kind == "failure" and said in detail


@pytest.mark.parametrize("read", [lambda _: [None for _ in iter(int, 1)], lambda _: time.sleep(99)])
def test_a_reader_that_never_ends_is_stopped(tmp_path, monkeypatch, read):
    monkeypatch.setattr(isolation, "SECONDS", 1)
    monkeypatch.setattr(isolation, "WAITED", 2)
    assert outcome(tmp_path, read) == ("failure", "took more than 1 s")


@pytest.mark.parametrize(("read", "expected"), [(refuses, ("error", "DanteError: damaged")), (lambda _: "same", ("read", ""))])
def test_a_safe_reader_passes(tmp_path, read, expected):
    assert outcome(tmp_path, read, hostile_pickle, expected="same") == expected


def test_damage_that_cannot_be_made_is_no_case(tmp_path):
    assert outcome(tmp_path, refuses, lambda place, rng: 1 / 0)[0] == "skipped"
