"""Write the data set into a temporary folder beside its place, and rename it at the end."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas

from ...errors import DatasetError
from ...files import cannot_write, csv_text
from ...types import DatasetJson
from .examine import Facts
from .labels import Labels
from .masks import as_mask, read_label_map
from .preview import page
from .volumes import PHOTOS, write_volume


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is written.

    target: the new folder. ending: of all images and masks. channels: names in order; keys: the same in the source.
    """

    target: Path
    ending: str
    keys: Sequence[str]
    labels: Labels
    dataset_json: DatasetJson
    facts: Sequence[Facts]
    table: pandas.DataFrame
    copy: bool
    resample: bool
    keep_values: bool


def choose_ending(facts: Sequence[Facts]) -> str:
    """Return the ending of all files of the data set: that of the source where nnU-Net reads it, for most files.

    Raises:
        DatasetError: no format holds the images.
    """
    endings = [part.ending for f in facts for part in f.case.images.values() if f.as_is[0]]
    photos = any(part.ending.lower() in PHOTOS for f in facts for part in f.case.images.values())
    flat = all(f.header is not None and len(f.header.size) == 2 for f in facts)
    small = all(f.voxel_type.endswith(("8-bit unsigned integer", "16-bit unsigned integer")) for f in facts)
    if photos and flat and small:
        return max(endings, key=endings.count) if endings else ".png"
    if any(f.components > 1 for f in facts):
        raise DatasetError("The colour images cannot be stored without loss: PNG holds 8 and 16 bits of 2D images. "
                           "Give each colour as a channel of its own, in files NAME_0000, NAME_0001, NAME_0002.")
    endings = [e for e in endings if e not in PHOTOS]
    return max(endings, key=endings.count) if endings else ".nii.gz"


def write(job: Job, progress: Callable[[Iterable[Facts]], Iterable[Facts]] = iter) -> None:
    """Write images, masks, dataset.json, groups.csv, cases.csv and the preview; whole or not at all.

    Raises:
        DatasetError: a file of the source has changed since it was examined.
        StorageError: the disk is full, or the folder cannot be written to.
    """
    target = job.target
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for old in target.parent.glob(f".{target.name}.*.tmp"):  # of runs that were killed
        shutil.rmtree(old, ignore_errors=True)
    try:
        for folder in ("imagesTr", "labelsTr", "preview"):
            (temporary / folder).mkdir(parents=True)
        for facts in progress(job.facts):
            _write_case(job, facts, temporary)
        pictures = [f.case.name for f in job.facts if f.picture]
        for name, text in {
                "dataset.json": json.dumps(job.dataset_json, indent=2, ensure_ascii=False), "groups.csv": _groups(job),
                "cases.csv": csv_text(job.table.to_dict("records")),
                "preview.html": page(target.name, job.table, job.labels.numbers, pictures)}.items():
            (temporary / name).write_text(text, encoding="utf-8")
        temporary.rename(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary)


def write_images(facts: Facts, keys: Sequence[str], ending: str, folder: Path, *, copy: bool = False) -> list[Path]:
    """Write the images of a case as CASE_0000, CASE_0001, ... and return the files; what nnU-Net can read is linked.

    keys: the channels in order, as `facts.case.images` names them.

    Raises:
        DatasetError: a file of the source has changed since it was examined.
        StorageError: an image cannot be written.
    """
    case, files = facts.case, []
    if facts.states != {part: part.state() for part in case.parts}:
        raise DatasetError(f"Files of case {case.name} changed after they were checked. Wait until they are written, "
                           "and run the command again.")
    for number, key in enumerate(keys):
        part = case.images[key]
        files.append(folder / f"{case.name}_{number:04d}{ending}")
        if facts.as_is[0] and part.ending == ending and part.whole is not None:
            _place(part.whole, files[-1], copy=copy)
        else:
            write_volume(part.load(), files[-1])
    return files


def _write_case(job: Job, facts: Facts, folder: Path) -> None:
    case = facts.case
    trains = bool(case.masks)
    images = folder / ("imagesTr" if trains else "imagesTs")
    images.mkdir(exist_ok=True)
    write_images(facts, job.keys, job.ending, images, copy=job.copy)
    if not trains:
        return
    destination = folder / "labelsTr" / f"{case.name}{job.ending}"
    part = next(iter(case.masks.values()))
    if facts.as_is[1] and part.ending == job.ending and part.whole is not None:
        _place(part.whole, destination, copy=job.copy)
    else:
        image = case.images[job.keys[0]].load()
        found = read_label_map(case, job.labels, image, resample=job.resample, known_values=job.keep_values)
        write_volume(as_mask(found, image), destination)
    if facts.picture:
        (folder / "preview" / f"{case.name}.jpg").write_bytes(facts.picture)


def _place(source: Path, destination: Path, *, copy: bool) -> None:
    """Link the file, or copy it where asked or where the file systems take no link."""
    source = source.resolve()
    if not copy:
        with suppress(OSError):
            destination.hardlink_to(source)
            return
        with suppress(OSError):
            destination.symlink_to(source)
            return
    shutil.copyfile(source, destination)


def _groups(job: Job) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["case", "group"])
    rows.writerows([f.case.name, f.case.patient] for f in job.facts if f.case.masks)
    return text.getvalue()
