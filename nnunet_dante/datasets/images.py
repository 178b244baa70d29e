"""The files of a data set's cases, and the readers of nnU-Net that open them."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from ..errors import ConfigurationError, DanteError, TransferError
from ..models.labels import channel_names, file_ending
from ..types import DatasetJson

_BLOCK = 1 << 20
_MAX_RATIO = 1032  # deflate cannot pack better than this


@dataclass(frozen=True, kw_only=True)
class Case:
    """The files of one training case."""

    images: tuple[Path, ...]
    mask: Path


def case_files(raw: Path, dataset_json: DatasetJson) -> dict[str, Case]:
    """Return the files of every training case, in the order of the cases that nnU-Net uses; nothing is opened.

    nnU-Net knows two ways to name them: a "dataset" entry in dataset.json that lists every file, or, without it, the
    files imagesTr/CASE_0000, CASE_0001, ... and labelsTr/CASE. The files of a list need not lie below `raw`.

    Args:
        raw: folder of the data set below nnUNet_raw.
        dataset_json: content of its dataset.json.

    Raises:
        TransferError: the list, or the file ending, is not what nnU-Net expects.
    """
    if "dataset" in dataset_json:
        with reading(raw, "dataset.json"):
            copied = json.loads(json.dumps(dataset_json))  # nnU-Net changes the list that it is given
            listed = get_filenames_of_train_images_and_targets(str(raw), copied)
            return {name: Case(images=tuple(map(Path, files["images"])), mask=Path(files["label"]))
                    for name, files in listed.items()}
    ending = file_ending(dataset_json)
    return {name: Case(images=tuple(paths), mask=raw / "labelsTr" / f"{name}{ending}")
            for name, paths in sorted(image_files(raw / "imagesTr", ending).items())}


def image_files(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Return case -> its files CASE_0000, CASE_0001, ... in `folder`, cases and files in the order of their names."""
    pattern, cases = re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}"), dict[str, list[Path]]()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if found := pattern.fullmatch(path.name):
            cases.setdefault(found[1], []).append(path)
    return cases


@contextlib.contextmanager
def reading(raw: Path, what: str) -> Iterator[None]:
    """Turn whatever is raised while `what` of the data set is read into a TransferError that names it."""
    try:
        yield
    except DanteError:
        raise
    except Exception as error:  # whatever nnU-Net and its image libraries raise on damaged files
        raise TransferError(f"{raw.name}: {what} cannot be read ({type(error).__name__}: {error}). Replace the damaged "
                            "file, or take the case out.") from error


def reader_for(dataset_json: DatasetJson, cases: Mapping[str, Case]) -> type[BaseReaderWriter]:
    """Return the reader that nnU-Net chooses for the data set's files.

    Raises:
        TransferError: no reader opens them, or dataset.json names something that is no reader.
    """
    example = str(next(iter(cases.values())).images[0])
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # nnU-Net prints a traceback for each reader that does not fit
            found = determine_reader_writer_from_dataset_json(dataset_json, example, verbose=False)
    except Exception as error:  # no reader fits, or the name of one is none
        raise TransferError(f"No reader of nnU-Net opens {Path(example).name}: {error}") from error
    if not _is_reader(found):
        raise TransferError(f"overwrite_image_reader_writer of dataset.json is "
                            f"{dataset_json['overwrite_image_reader_writer']!r}, which is no reader of nnU-Net.")
    return found


def opens(reader: str, dataset_json: DatasetJson, case: Case) -> bool:
    """Whether the reader of this name opens image and mask of `case`, with the channels that dataset.json names.

    A file ending is not enough: .tif holds photographs for one reader, and stacks of slices for another.
    """
    try:
        found = recursive_find_reader_writer_by_name(reader)
        if not _is_reader(found) or file_ending(dataset_json).lower() not in found.supported_file_endings:
            return False
        with contextlib.redirect_stderr(io.StringIO()):
            image, _ = found().read_images([str(path) for path in case.images])
            mask, _ = found().read_seg(str(case.mask))
    except Exception:  # whatever a reader raises on a file that it was not made for
        return False
    return len(image) == len(channel_names(dataset_json)) and image.shape[1:] == mask.shape[1:]


def segmentation_reader(plans: Mapping[str, Any]) -> Callable[[Path], tuple[np.ndarray, Sequence[float]]]:
    """Return a function from a file to its mask and its spacing in mm along the mask's axes, by the plans' reader.

    Raises:
        ConfigurationError: the plans name something that is no reader of nnU-Net.
    """
    found = recursive_find_reader_writer_by_name(name := str(plans.get("image_reader_writer")))
    if not _is_reader(found):
        raise ConfigurationError(f"image_reader_writer of the plans is {name!r:.80}, which is no reader of nnU-Net. "
                                 "Use the plans.json that nnU-Net wrote.")
    reader = found()

    def read(file: Path) -> tuple[np.ndarray, Sequence[float]]:
        mask, properties = reader.read_seg(str(file))
        return mask[0], [float(mm) for mm in properties["spacing"]]

    return read


def _is_reader(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, BaseReaderWriter)  # nnU-Net also finds what its modules import


def is_cut(path: Path) -> bool:
    """Whether a .nii or .nii.gz holds less than the image that its header promises.

    SimpleITK reads a shortened .nii.gz without an error, with voxels missing; and it reserves memory for whatever size
    the header states. A gzip file ends with the size of its content: where that is what the header promises, nothing
    else is read.
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
    except Exception:  # whatever nibabel and gzip raise on damaged files; the reader will say more about a wrong header
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
