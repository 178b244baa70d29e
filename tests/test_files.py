"""files.py: a stopped write leaves what was there."""

from __future__ import annotations

import pytest

from nnunet_dante.files import atomic_path, write_text_atomically


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
