"""NIfTI images that were cut off: SimpleITK reads a shortened .nii.gz without a word, with voxels missing."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel

_BLOCK = 1 << 20
_MAX_RATIO = 1032  # of what deflate unpacks to, to its packed size


def is_cut(path: Path) -> bool:
    """Whether a .nii or .nii.gz does not hold the whole image of its header, for which a reader would make room.

    A gzip file ends with the size of its content; where that is what the header promises, nothing else is read.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        return False
    try:
        image: Any = nibabel.load(path)
        promised = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
        if path.suffix == ".nii" or promised > _MAX_RATIO * path.stat().st_size:
            return promised > path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(-4, 2)
            if int.from_bytes(stream.read(4), "little") == promised % (1 << 32):
                return False
        return _unpacked_size(path) < promised
    except Exception:  # whatever nibabel and gzip raise on damaged files; the reader will say more of a wrong header
        return False


def _unpacked_size(path: Path) -> int:
    size = 0
    try:
        with gzip.open(path) as stream:
            while block := stream.read(_BLOCK):
                size += len(block)
    except (EOFError, OSError, zlib.error):
        return -1
    return size
