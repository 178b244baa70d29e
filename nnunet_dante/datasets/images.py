"""The image files of a data set against its dataset.json: whole, readable, with its channels and label values."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from ..errors import DanteError, TransferError
from ..models.labels import channel_names
from ..types import DatasetJson
from .compressed import is_cut

_MAX_MASKS_READ = 50  # reading masks finds wrong label numbers before training does; hundreds would take minutes
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """The files of one training case."""

    images: tuple[Path, ...]
    mask: Path


def image_files(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Return case -> its files CASE_0000, CASE_0001, ... in `folder`, both in order of the names."""
    pattern, cases = re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}"), dict[str, list[Path]]()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if found := pattern.fullmatch(path.name):
            cases.setdefault(found[1], []).append(path)
    return cases


def check_channels(raw: Path, content: DatasetJson, cases: dict[str, Case]) -> None:
    """Refuse images that are cut off, or of another number of channels than dataset.json names.

    Raises:
        TransferError: names the files.
    """
    if cut := [path.name for case in cases.values() for path in (*case.images, case.mask) if is_cut(path)]:
        raise TransferError(f"{raw.name}: {len(cut)} image files were cut off: {', '.join(cut[:_SHOWN])}. Copy them "
                            "again, or take the cases out; nnU-Net would read them with voxels missing.")
    named, counts = channel_names(content), {name: len(case.images) for name, case in cases.items()}
    first = next(iter(cases))
    # Files are not channels: one RGB image has three. So one case is read, and the others must have as many files.
    with reading(raw, first):
        images, _ = reader_for(content, cases)().read_images([str(p) for p in cases[first].images])
    if len(images) != len(named):
        raise TransferError(f"{raw.name}: dataset.json names {len(named)} channels ({', '.join(named)}), but case "
                            f"{first} has {len(images)} in {counts[first]} files. Correct channel_names or the files "
                            "(_0000, _0001, ...).")
    if odd := [f"{name} ({n})" for name, n in counts.items() if n != counts[first]]:
        raise TransferError(f"{raw.name}: case {first} has {counts[first]} image files, but {', '.join(odd[:_SHOWN])} "
                            "not; every case needs all channels.")


@contextlib.contextmanager
def reading(raw: Path, what: str) -> Iterator[None]:
    """Make whatever reading `what` of the data set raises a TransferError that names it."""
    try:
        yield
    except DanteError:
        raise
    except Exception as error:  # whatever nnU-Net and its image libraries raise on damaged files
        raise TransferError(f"{raw.name}: {what} cannot be read ({type(error).__name__}: {error}). Replace the damaged "
                            "file, or take the case out.") from error


def reader_for(content: DatasetJson, cases: dict[str, Case]) -> type:
    """Return nnU-Net's choice of reader for the data set's files.

    Raises:
        TransferError: none opens them, or dataset.json names another class.
    """
    example = str(next(iter(cases.values())).images[0])
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # nnU-Net prints a traceback for each reader that does not fit
            found = determine_reader_writer_from_dataset_json(content, example, verbose=False)
    except Exception as error:  # no reader fits, or the name of one is none
        raise TransferError(f"No reader of nnU-Net opens {Path(example).name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, BaseReaderWriter)):
        raise TransferError(f"overwrite_image_reader_writer of dataset.json is "
                            f"{content['overwrite_image_reader_writer']!r}, which is no reader of nnU-Net.")
    return found


def check_masks(cases: dict[str, Case], content: DatasetJson) -> list[str]:
    """Refuse masks with values that dataset.json does not name; return what to know about labels that none holds.

    Raises:
        TransferError: names the mask and the values.
    """
    manager = LabelManager(content["labels"], content.get("regions_class_order"))
    allowed = {*map(int, manager.all_labels), *([] if manager.ignore_label is None else [manager.ignore_label])}
    reader, used = reader_for(content, cases)(), set()
    for case in list(cases.values())[:_MAX_MASKS_READ]:
        with reading(case.mask.parent, case.mask.name):
            values = {float(v) for v in np.unique(reader.read_seg(str(case.mask))[0])}
        if unknown := sorted(values - allowed):
            raise TransferError(f"Mask {case.mask.name} holds the values {[f'{v:g}' for v in unknown][:5]}, which "
                                f"dataset.json does not name; it has {content['labels']}. Add the labels, or correct "
                                "the masks.")
        used |= values
    unused = sorted(v for v in manager.foreground_labels if v not in used)
    if len(cases) > _MAX_MASKS_READ or not unused:
        return []
    names = [n for n, v in content["labels"].items() if set(np.ravel(v)) <= set(unused)]
    return [f"no case holds {', '.join(names)}: what the donor knows of it may be forgotten"] if names else []
