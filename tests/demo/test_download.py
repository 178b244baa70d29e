"""download.py: the images come from a verified wheel or from the user's folder, or the error says what to do."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from nnunet_dante.demo import data as download
from nnunet_dante.demo.data import FILES, WHEEL, DemoDataError, download_wheel, fetch_images, user_cache


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel of the right name with four one-line files, and the checksum to match."""
    path = tmp_path / "source" / WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in FILES:
            archive.writestr(f"TPTBox/tests/sample/{name}", f"content of {name}")
    monkeypatch.setattr(download, "WHEEL_SHA256", download._sha256(path))
    return path


def pip_that(copies: Path | None, monkeypatch) -> list[list[str]]:
    """Replace pip: it copies `copies` to where it is asked to download, or fails as it does offline."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if copies is not None:
            Path(command[command.index("--dest") + 1], WHEEL).write_bytes(copies.read_bytes())
        return subprocess.CompletedProcess(command, 0 if copies else 1, "", "WARNING: x\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_the_images_are_read_out_of_a_wheel_that_is_downloaded_once(wheel, tmp_path, monkeypatch):
    calls = pip_that(wheel, monkeypatch)
    cache = tmp_path / "cache"
    cache.mkdir()
    for attempt in ("first", "second"):
        files = fetch_images(tmp_path / attempt, cache=cache)
        assert {name: path.read_text() for name, path in files.items()} == {n: f"content of {n}" for n in FILES}
    assert len(calls) == 1
    assert {"--no-deps", download.REQUIREMENT} <= set(calls[0])


def test_offline_the_error_says_what_pip_said_and_how_to_go_on(tmp_path, monkeypatch):
    pip_that(None, monkeypatch)
    with pytest.raises(DemoDataError, match=r"no network.*pip download --no-deps tptbox==1\.1\.0.*--data"):
        download_wheel(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_wheel_with_another_checksum_is_refused_and_not_kept(wheel, tmp_path, monkeypatch):
    pip_that(wheel, monkeypatch)
    monkeypatch.setattr(download, "WHEEL_SHA256", "0" * 64)
    cache = tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(DemoDataError, match="SHA-256"):
        download_wheel(cache)
    assert not list(cache.iterdir())


def test_a_damaged_wheel_in_the_cache_is_downloaded_again(wheel, tmp_path, monkeypatch):
    calls = pip_that(wheel, monkeypatch)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / WHEEL).write_bytes(b"half a file")
    assert download_wheel(cache).read_bytes() == wheel.read_bytes()
    assert len(calls) == 1


def test_a_folder_of_the_user_needs_no_pip(wheel, tmp_path, monkeypatch):
    calls = pip_that(None, monkeypatch)
    folder = tmp_path / "mine" / "deeper"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("mine")
    assert fetch_images(tmp_path / "a", data=tmp_path / "mine") == {name: folder / name for name in FILES}
    assert fetch_images(tmp_path / "b", data=wheel.parent)[FILES[0]].read_text() == f"content of {FILES[0]}"
    assert not calls


def test_a_folder_without_the_images_is_refused_by_name(tmp_path):
    (tmp_path / FILES[0]).touch()
    with pytest.raises(DemoDataError, match=FILES[1]):
        fetch_images(tmp_path / "out", data=tmp_path)


def test_the_cache_is_the_users_and_the_output_folder_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "nnunet_dante"
    (tmp_path / "xdg").touch()  # a file where the folder should be
    assert download.writable_cache(tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out").is_dir()
