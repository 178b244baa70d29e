"""Check the files of a data set against its dataset.json and against each other, before anything is written.

nnU-Net has a check of its own (`--verify_dataset_integrity`). It reads every image, in processes that it starts, prints
what it finds, and does not know of cut files, of other endings, or of how images lie. What is checked here can be seen
in names and headers; the voxels are read of one image and of the masks alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from ..errors import TransferError
from ..files import counted
from ..models.labels import channel_names, file_ending
from ..types import DatasetJson
from .annotated import Undrawn, check_drawn
from .images import Case, is_cut, reading
from .orientation import Header, read_header

_MAX_MASKS_READ = 50  # reading masks finds wrong label numbers before training does; hundreds would take minutes
_SHOWN = 3


def check_channels(raw: Path, dataset_json: DatasetJson, cases: Mapping[str, Case],
                   reader: type[BaseReaderWriter]) -> None:
    """Refuse images that were cut off, and cases whose channels are not those of dataset.json.

    Raises:
        TransferError: names the files.
    """
    if cut := [path.name for case in cases.values() for path in (*case.images, case.mask) if is_cut(path)]:
        raise TransferError(f"{raw.name}: {counted(len(cut), 'image file')} cut off: {shorten(cut)}. Copy them "
                            "again, or take the cases out; nnU-Net would read them with voxels missing.")
    named, counts = channel_names(dataset_json), {name: len(case.images) for name, case in cases.items()}
    first = next(iter(cases))
    # Files are not channels: one RGB image has three. So one case is read, and the others must have as many files.
    with reading(raw, first):
        images, _ = reader().read_images([str(p) for p in cases[first].images])
    if len(images) != len(named):
        raise TransferError(f"{raw.name}: dataset.json names {len(named)} channels ({', '.join(named)}), but case "
                            f"{first} has {len(images)} in {counts[first]} files. Correct channel_names or the files "
                            "(_0000, _0001, ...).")
    if odd := [f"{name} ({n})" for name, n in counts.items() if n != counts[first]]:
        raise TransferError(f"{raw.name}: case {first} has {counts[first]} image files, but {shorten(odd)} "
                            "not; every case needs all channels.")


def check_masks(cases: Mapping[str, Case], dataset_json: DatasetJson, reader: type[BaseReaderWriter],
                undrawn: Undrawn = MappingProxyType({})) -> list[str]:
    """Refuse masks with values that dataset.json does not name, or with labels that were not drawn in their case.

    Returns a warning about labels that no mask holds.

    Raises:
        TransferError: names the mask and the values.
    """
    manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    allowed = {*map(int, manager.all_labels), *([] if manager.ignore_label is None else [manager.ignore_label])}
    read, used = reader().read_seg, set[float]()
    for name, case in list(cases.items())[:_MAX_MASKS_READ]:
        with reading(case.mask.parent, case.mask.name):
            values = {float(v) for v in np.unique(read(str(case.mask))[0])}
        if unknown := sorted(values - allowed):
            raise TransferError(f"Mask {case.mask.name} holds the values {[f'{v:g}' for v in unknown][:5]}, which "
                                f"dataset.json does not name; it has {dataset_json['labels']}. Add the labels, or "
                                "correct the masks.")
        check_drawn(np.array(sorted(values)), dataset_json, undrawn.get(name, ()), case.mask.name)
        used |= values
    unused = sorted(v for v in manager.foreground_labels if v not in used)
    if len(cases) > _MAX_MASKS_READ or not unused:
        return []
    if len(unused) == len(manager.foreground_labels):
        raise TransferError(f"No mask of the {counted(len(cases), 'case')} holds a label: all voxels are background. "
                            "Are these the right masks?")
    names = [n for n, v in dataset_json["labels"].items() if set(np.ravel(v)) <= set(unused)]
    return [f"no case holds {', '.join(names)}: what the donor knows of it may be forgotten"] if names else []


def check_geometry(raw: Path, cases: Mapping[str, Case]) -> list[str]:
    """Refuse masks and channels of another size than the first channel; return a warning about other places in space.

    nnU-Net trains on the voxels as stored, so a mask with another affine is taken as if it lay where the image lies.
    Files whose headers SimpleITK cannot read are passed over; their reader will say what is wrong.

    Raises:
        TransferError: names the cases whose sizes differ.
    """
    found = _headers(cases)
    sizes = [f"{name} ({' and '.join(dict.fromkeys(' x '.join(map(str, h.size)) for h in headers))})"
             for name, headers in found.items()
             if any(len(h.size) == len(headers[0].size) and h.size != headers[0].size for h in headers)]
    if sizes:
        raise TransferError(f"{raw.name}: mask and images of {counted(len(sizes), 'case')} differ in size: "
                            f"{shorten(sizes)} voxels. Every mask needs the voxels of its images.")
    places = _misplaced(found)
    return [f"mask and images lie at different places in space (origin, spacing or direction) in {len(places)} of "
            f"{len(cases)} cases: {shorten(places)}. nnU-Net takes the voxels as they are stored, so check with a "
            "viewer that each mask covers its structure"] if places else []


def misplaced(cases: Mapping[str, Case]) -> list[str]:
    """Return the cases whose mask and images lie at different places in space by their headers."""
    return _misplaced(_headers(cases))


def _headers(cases: Mapping[str, Case]) -> dict[str, list[Header]]:
    return {name: [h for path in (*case.images, case.mask) if (h := read_header(path)) is not None]
            for name, case in cases.items()}


def _misplaced(found: Mapping[str, list[Header]]) -> list[str]:
    return [name for name, headers in found.items() if not all(same_place(headers[0], h) for h in headers)]


def same_place(one: Header, other: Header) -> bool:
    """Whether two volumes of as many axes have the same spacing, origin and directions."""
    return len(one.size) != len(other.size) or all(
        np.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(
            (one.spacing_mm, one.origin_mm, one.directions), (other.spacing_mm, other.origin_mm, other.directions)))


def stray_files(raw: Path, dataset_json: DatasetJson, cases: Mapping[str, Case]) -> Iterator[str]:
    """Yield a warning about images and masks that belong to no case, so that training never sees them."""
    if "dataset" in dataset_json:  # it lists the files of the cases, which may lie anywhere
        return
    ending = file_ending(dataset_json)
    known = {path for case in cases.values() for path in (*case.images, case.mask)}
    endings = {e for reader in LIST_OF_IO_CLASSES for e in reader.supported_file_endings}
    for folder in ("imagesTr", "labelsTr"):
        found = sorted((raw / folder).iterdir()) if (raw / folder).is_dir() else []
        strays = [p for p in found if p not in known and p.name.lower().endswith(tuple(endings))]
        if other := [p.name for p in strays if not p.name.endswith(ending)]:
            yield (f"{folder} holds {counted(len(other), 'file')} with another ending than {ending}, the file_ending "
                   f"of dataset.json: {shorten(other)}. nnU-Net does not read them; convert them if they are cases")
        if lost := [p.name for p in strays if p.name.endswith(ending)]:
            yield (f"{folder} holds {counted(len(lost), 'file')} without a case: {shorten(lost)}. " +
                   ("Images are named CASE_0000, CASE_0001, ..." if folder == "imagesTr"
                    else "A mask needs the images CASE_0000, ... in imagesTr"))


def shorten(names: Sequence[str]) -> str:
    """Return the first names as text, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
