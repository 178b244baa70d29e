"""The demo's images: one spine in CT and one in T2-weighted MR, taken out of a wheel that pip downloads.

Source: `sample_ct` and `sample_mri` of the PyPI package tptbox 1.1.0 (TPTBox, Apache-2.0). The package is neither
installed nor imported: a wheel is a zip file, and four small images are read out of it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..errors import DanteError

WHEEL = "tptbox-1.1.0-py3-none-any.whl"
WHEEL_SHA256 = "975a68f4117ab81fcc2d819d6127f301b1cc50210e08e73df1b9a818ee3be984"
REQUIREMENT = "tptbox==1.1.0"
FILES = (
    "sub-ct_label-22_ct.nii.gz",
    "sub-ct_seg-subreg_label-22_msk.nii.gz",
    "sub-mri_label-6_T2w.nii.gz",
    "sub-mri_seg-subreg_label-6_msk.nii.gz",
)
_ADVICE = (f"With a network connection run 'pip download --no-deps {REQUIREMENT}', then pass the folder that holds "
           f"{WHEEL} (or the images unpacked from it) with --data")


class DemoDataError(DanteError):
    """The demo's images cannot be found, downloaded or verified."""


def user_cache() -> Path:
    """The folder where this user's programs keep what can be downloaded again.

    Raises:
        RuntimeError: if the system knows no home folder.
    """
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "nnunet_dante"


def writable_cache(fallback: Path) -> Path:
    """`user_cache()` where it can be written, else `fallback`; the folder exists afterwards."""
    try:
        cache = user_cache()
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
    except (OSError, RuntimeError):
        pass  # no home folder, or one that is read-only: containers often have neither
    fallback.mkdir(parents=True, exist_ok=True)
    return fallback


def fetch_images(target: Path, *, data: Path | None = None, cache: Path | None = None) -> dict[str, Path]:
    """Put the four images of `FILES` below `target`; returns file name -> path.

    Args:
        data: A folder that already holds the images, or the wheel; nothing is downloaded then.
        cache: Where the wheel is kept between runs (default: the user's cache folder).

    Raises:
        DemoDataError: offline, wrong checksum, or `data` without the files.
    """
    target.mkdir(parents=True, exist_ok=True)
    if data is not None:
        found = _find(data)
        if WHEEL not in found:
            return found
        wheel = found[WHEEL]
    else:
        wheel = download_wheel(cache or writable_cache(target))
    _verify(wheel)
    with zipfile.ZipFile(wheel) as archive:
        members = {Path(name).name: name for name in archive.namelist()}
        for name in FILES:
            (target / name).write_bytes(archive.read(members[name]))
    return {name: target / name for name in FILES}


def download_wheel(cache: Path) -> Path:
    """The verified wheel in `cache`, downloaded there once through pip.

    Raises:
        DemoDataError: if pip cannot download it, or its SHA-256 is not `WHEEL_SHA256`.
    """
    wheel = cache / WHEEL
    if wheel.exists() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1",
                   "--timeout", "15", "--disable-pip-version-check", "--dest", folder, REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        fresh = Path(folder) / WHEEL
        if result.returncode != 0 or not fresh.exists():
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise DemoDataError(f"The demo's images ({REQUIREMENT}) could not be downloaded: pip said {reason!r}. "
                                f"{_ADVICE}.")
        _verify(fresh)
        fresh.replace(wheel)
    return wheel


def _find(data: Path) -> dict[str, Path]:
    """The wheel alone if `data` holds it, else all of `FILES`, at any depth."""
    files = {path.name: path for path in sorted(data.rglob("*")) if path.name in {*FILES, WHEEL}}
    missing = [name for name in FILES if name not in files]
    if not missing:
        return {name: files[name] for name in FILES}
    if WHEEL in files:
        return {WHEEL: files[WHEEL]}
    raise DemoDataError(f"--data {data} lacks {', '.join(missing)}. {_ADVICE}.")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _verify(wheel: Path) -> None:
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise DemoDataError(f"{wheel} is not the expected file: its SHA-256 is {found}, allowed is {WHEEL_SHA256}. "
                            f"Delete it and try again. {_ADVICE}.")
