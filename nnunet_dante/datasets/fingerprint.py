"""nnU-Net's fingerprint of a data set (spacings, sizes, intensities), extracted anew when the files have changed.

nnU-Net keeps a fingerprint until it is told to `--clean`. Here a record beside it says which files it was made from. A
fingerprint without such a record (nnU-Net's own, or of version 0.1.0) is taken if nothing contradicts it: as many cases
and channels, spacings as in the headers, and no file newer than it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

from ..errors import TransferError
from ..files import read_json, write_text_atomically
from ..models.labels import channel_names
from ..types import DatasetJson
from .images import Case
from .orientation import read_header

INTENSITY = "foreground_intensity_properties_per_channel"


def fingerprint(name: str, folder: Path, dataset_json: DatasetJson, cases: Mapping[str, Case], *,
                num_processes: int | None = None) -> dict[str, Any]:
    """Return nnU-Net's fingerprint of the data set `name`; extract it where it is missing, damaged or out of date.

    Args:
        name: the data set's folder name below nnUNet_raw.
        folder: its folder below nnUNet_preprocessed; dataset_fingerprint.json and the record of its files lie there.
        dataset_json, cases: what nnUNet_raw holds now.
        num_processes: for the extraction; default: nnU-Net's.

    Raises:
        TransferError: nnU-Net cannot extract it, or an image holds NaN or infinite voxels.
    """
    path, record = folder / "dataset_fingerprint.json", folder / "dataset_fingerprint_files.json"
    files = _digest_of_files(dataset_json, cases)
    found = _read(path)
    if found is None or not _is_current(found, path, record, files, dataset_json, cases):
        try:
            DatasetFingerprintExtractor(name, num_processes or default_num_processes).run(overwrite_existing=True)
            found = read_json(path)
        except Exception as error:  # whatever a reader raises on a damaged image
            raise TransferError(f"nnU-Net could not extract the fingerprint of {name} "
                                f"({type(error).__name__}: {error}). `nnUNetv2_extract_fingerprint -d "
                                f"{name[7:].split('_')[0]} --verify_dataset_integrity` finds the case.") from error
        write_text_atomically(json.dumps({"format": 1, "files": files, "fingerprint": _sha256(path)}), record)
    statistics = [v for channel in found[INTENSITY].values() for v in channel.values()]
    if not np.isfinite(np.asarray(statistics, float)).all():
        raise TransferError(f"The intensity statistics of {name} are not finite: an image holds NaN or "
                            "infinite voxels, or no mask has foreground. Correct the images and delete "
                            f"{path.name} in nnUNet_preprocessed.")
    return found


def newest_change(cases: Mapping[str, Case]) -> float:
    """Return when an image or mask was changed last, in seconds since 1970."""
    return max(path.stat().st_mtime for case in cases.values() for path in (*case.images, case.mask))


def is_older(data: Path, cases: Mapping[str, Case]) -> bool:
    """Whether the preprocessed data in a folder were written before an image or mask of the cases was changed."""
    written = [file.stat().st_mtime for file in data.iterdir()]
    return bool(written) and newest_change(cases) > min(written)


def _is_current(found: Mapping[str, Any], path: Path, record: Path, files: str, dataset_json: DatasetJson,
                cases: Mapping[str, Case]) -> bool:
    channels = {str(i) for i in range(len(channel_names(dataset_json)))}
    if len(found["spacings"]) != len(cases) or set(found[INTENSITY]) != channels:
        return False
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = read_json(record)
        if known["fingerprint"] == _sha256(path):
            return bool(known["files"] == files)
    return newest_change(cases) <= path.stat().st_mtime and _spacings_agree(found["spacings"], cases)


def _spacings_agree(spacings: list[list[float]], cases: Mapping[str, Case]) -> bool:
    """Compare with the headers. Readers order axes in different ways, so each image's spacings are sorted first."""
    for spacing, case in zip(spacings, cases.values()):
        header = read_header(case.images[0])
        if header is not None and len(header.size) == 3 and not np.allclose(
                sorted(spacing), sorted(header.spacing_mm), rtol=1e-3):
            return False
    return True


def _digest_of_files(dataset_json: DatasetJson, cases: Mapping[str, Case]) -> str:
    listing = [(path.name, path.stat().st_size, path.stat().st_mtime_ns)
               for case in cases.values() for path in (*case.images, case.mask)]
    return hashlib.sha256(json.dumps([list(cases), channel_names(dataset_json), listing]).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        content = read_json(path)
        sizes = [np.asarray(content[key], float) for key in ("spacings", "shapes_after_crop")]
        statistics = [float(v) for channel in content[INTENSITY].values() for v in channel.values()]
        cropped = content.get("median_relative_size_after_cropping", 1.0)
        plausible = all(s.ndim == 2 and s.shape[1] == 3 and np.isfinite(s).all() and (s > 0).all() for s in sizes)
        if statistics and plausible and isinstance(cropped, float | int):
            return content
    return None
