"""The page reads below its roots, and nowhere else."""

from __future__ import annotations

import pytest

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.ui.roots import Roots


@pytest.fixture
def roots(tmp_path):
    for folder in ("root/a/b", "root/.hidden/x", "root/c", "other/secret", "root2"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "root" / "short").symlink_to(tmp_path / "root" / "a" / "b")
    return Roots.given([tmp_path / "root"])


@pytest.mark.parametrize("text", ["../other", "a/../../other", "/", "/etc/passwd", "link", "link/secret", "../root2", "~root", "a\0b",
                                  "/" + "x" * 5000, "~nobody-at-all/x"])
def test_what_lies_outside_is_refused(roots, text):
    with pytest.raises(ConfigurationError, match="lies outside|is no path"):
        roots.path(text)


def test_what_lies_inside_is_found(roots, tmp_path):
    for text in ("a/b", str(tmp_path / "root" / "a" / "b"), "a/../a/b", "short", "  a/b "):
        assert roots.path(text) == tmp_path / "root" / "a" / "b"
    assert roots.path("new/run") == tmp_path / "root" / "new" / "run", "it need not exist yet"


@pytest.mark.parametrize("text", ["", "  ", None])
def test_an_empty_field_is_not_the_first_root(roots, text):
    with pytest.raises(ConfigurationError, match="is empty: give the models folder"):
        roots.filled(text, "the models folder")
    assert roots.filled(" a ", "the models folder") == roots.path("a")


def test_hidden_folders_are_not_sent(roots):
    assert roots.path(".hidden/x").name == "x"
    with pytest.raises(ConfigurationError):
        roots.path(".hidden/x", hidden=False)


def test_folders_to_choose_from(roots):
    assert [folder.name for folder in roots.inside("")] == ["a", "c", "short"], "no hidden ones, and no link that leads out"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        roots.inside("not/there")


def test_files_are_found_but_not_behind_links(roots, tmp_path):
    for place in ("root/a/b", "other", "root/.hidden"):
        (tmp_path / place / "adapt.json").write_text("{}")
    assert list(roots.holding("adapt.json")) == [tmp_path / "root" / "a" / "b"]


def test_roots_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "not there"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path.parent))
    assert Roots.given([]).folders == (tmp_path, tmp_path.parent)
    with pytest.raises(ConfigurationError, match="--root .*not there is no folder"):
        Roots.given([tmp_path / "not there"])
