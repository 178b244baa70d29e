"""files.py: a stopped write leaves what was there."""

from __future__ import annotations

import os
import tracemalloc

import pytest

from nnunet_dante.files import (
    MAX_JSON_BYTES,
    atomic_path,
    bounded,
    csv_text,
    printable,
    read_json,
    write_text_atomically,
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text_atomically("old", tmp_path / "f.txt")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "f.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "f.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_folders_are_made_and_the_new_file_replaces_the_old(tmp_path):
    for text in ("old", "neu: ä"):
        write_text_atomically(text, tmp_path / "a" / "f.txt")
    assert (tmp_path / "a" / "f.txt").read_text(encoding="utf-8") == "neu: ä"


@pytest.mark.parametrize(("text", "match"), [
    ("[" * 100_000, "nested too deeply"), ("[" * 70 + "]" * 70, "nested too deeply"), ("{", "delimiter|property name"),
    ("1" + "0" * 100, "bits"), ("1" + "0" * 5000, "digits"), ('"\\ud800"', "surrogates"), ("\x00", "Expecting value"),
    ("[" + "0," * 2**22 + "0]", "too many")])
def test_json_beyond_bounds_is_a_value_error(tmp_path, text, match):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_json(tmp_path / "a.json")


def test_json_is_read_from_regular_files_of_moderate_size_only(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, null, "ä", NaN]}')
    assert read_json(tmp_path / "a.json")["a"][2] == "ä"
    with (tmp_path / "big.json").open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="bytes"):
        read_json(tmp_path / "big.json")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing", "."):
        with pytest.raises(OSError, match="no regular file"):
            read_json(tmp_path / name)


def test_the_walk_itself_takes_no_memory():
    content = [[0] * 2**19] * 9
    tracemalloc.start()
    with pytest.raises(ValueError, match="too many"):
        bounded(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**16


def test_what_is_no_json_value_is_returned():
    marker = object()
    assert bounded({"a": [1, (2.0, None), {marker}], b"b": True}) == [marker]


def test_names_of_foreign_files_cannot_steer_a_terminal():
    assert printable("liver\nä \x1b[2J \u202e") == "liver\nä \\x1b[2J \\u202e"


def test_tables_have_as_many_digits_as_mean_something_and_no_nan():
    rows = [{"case": "007", "dice": 0.8123456789012345, "n": 12345678}, {"case": "b", "dice": float("nan"), "new": None}]
    assert csv_text(rows) == "case,dice,n,new\n007,0.812346,12345678,\nb,,,\n"
