"""`nnunet-dante dataset`: find the cases in a folder, say what was found, check everything, and write the data set."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas
from tqdm import tqdm

from ...errors import ConfigurationError, DatasetError
from ...types import DatasetJson, PathLike
from ..checks import shorten
from ..shots import read_groups
from .dafne import find_dafne, with_legends
from .dicom import find_dicom
from .examine import Facts, examine, looks_like_ct
from .found import Found, Layout, files_below
from .labels import Labels, choose_labels, parse_labels
from .nnunet import find_described
from .pairs import find_pairs
from .patients import group_patients
from .preview import table
from .slicer import with_segments
from .write import Job, choose_ending, write

_SHOWN = 12  # faults printed in full; the others are counted
_COLOURS = ("R", "G", "B")


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """The data set that was made, or that would be made.

    folder: where it lies. dataset_json: its content. facts: what every case holds. written: False after a dry run.
    """

    folder: Path
    dataset_json: DatasetJson
    facts: tuple[Facts, ...]
    written: bool


def gather(source: PathLike, number: int, name: str, *, output: PathLike | None = None, labels: Sequence[str] = (),
           channels: Sequence[str] = (), masks: Sequence[str] = (), without: Sequence[str] = (),
           groups: PathLike | None = None, resample_masks: bool = False, mask_axes: str | None = None,
           orientation: str | None = None, copy: bool = False, dry_run: bool = False,
           say: Callable[[str], object] = print,
           show: Callable[[Sequence[Facts]], object] | None = None) -> Gathered:
    """Make an nnU-Net data set of the images and masks in a folder; nothing in that folder is changed.

    Args:
        source: the folder.
        number: of the data set, 1 to 999.
        name: of the data set, in letters, digits, - and _.
        output: the folder in which Dataset123_Name is made. Default: nnUNet_raw.
        labels: NAME=VALUE for values in the masks, NAME for masks of their own, or the path of a table.
        channels: names of the channels in their order, such as CT; nnU-Net normalises by them.
        masks: patterns for the paths of masks below the source, where names do not tell them.
        without: cases to leave out.
        groups: file that says which cases are of one patient; see `read_groups`.
        resample_masks: bring masks on another grid of the same space to the grid of their image.
        mask_axes: "screen" or "xyz": the order of axes in Dafne's masks, where shapes do not tell it.
        orientation: where rows, columns and slices lead in files of Dafne or Dante without affine, such as PLS.
        copy: copy files instead of linking them.
        dry_run: find and check, but write nothing.
        say: receives what was found, line by line.
        show: receives what every case holds, with its picture, also where cases have faults.

    Raises:
        DatasetError: no case was found, or cases have faults; the message names all of them and what to do.
        ConfigurationError: number, name or channels cannot be used.
        StorageError: the data set cannot be written.
    """
    source = Path(source)
    target = _target(number, name, output)
    given = parse_labels(labels)
    layout = recognise(source, masks=masks, labels=[label for label, _ in given], mask_axes=mask_axes,
                       orientation=orientation)
    if not any(case.masks for case in layout.cases):
        raise DatasetError(f"{source} holds {len(layout.cases)} images, but no mask that belongs to one of them, so "
                           "nothing can be trained. Masks are known by their names (P01.nii.gz and P01_seg.nii.gz), "
                           "their folder (images/ and labels/), or --masks PATTERN. Images without masks can only be "
                           "segmented: nnunet-dante predict.")
    say(f"Found: {layout.description}.")
    for note in layout.notes:
        say(f"Note: {note}.")
    layout = replace(layout, cases=_without(layout.cases, without))
    cases, notes = group_patients(layout.cases, None if groups is None else read_groups(groups))
    layout = replace(layout, cases=cases)
    chosen = _labels(layout, given)
    _describe(layout, chosen, notes, say)
    facts = examine(layout, chosen, resample=resample_masks, pictures=not dry_run or show is not None,
                    progress=partial(tqdm, total=len(cases), desc="reading", unit="case", disable=None))
    if show is not None:
        show(facts)
    keys, named = _channels(layout, facts, channels, say)
    overview = table(facts, named)
    _say_findings(facts, overview, say)
    _refuse_faults(facts)
    ending = choose_ending(facts)
    content = _dataset_json(layout, chosen, named, facts, ending)
    say(_plan(facts, ending, target, copy))
    if not dry_run and target.resolve() != source.resolve():
        if target.exists():
            raise DatasetError(f"{target} is there already. Choose another number or name, or take that folder away.")
        write(Job(target=target, ending=ending, keys=keys, labels=chosen, dataset_json=content, facts=facts,
                  table=overview, copy=copy, resample=resample_masks, keep_values=layout.dataset_json is not None),
              partial(tqdm, desc="writing", unit="case", disable=None))
        say(f"Written: {target}. Look at {target / 'preview.html'} before you train.")
    return Gathered(folder=target, dataset_json=content, facts=tuple(facts), written=not dry_run)


def _target(number: int, name: str, output: PathLike | None) -> Path:
    if not 1 <= number <= 999 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigurationError(f"-d {number} -n {name!r}: a data set has a number from 1 to 999, and a name of "
                                 "letters, digits, - and _, such as -d 123 -n Mine.")
    root = output or os.environ.get("nnUNet_raw")  # noqa: SIM112 nnU-Net spells it so
    if not root:
        raise ConfigurationError("The environment variable nnUNet_raw is not set, and -o names no folder. Give the "
                                 "folder in which the data set is to be made: -o FOLDER.")
    target = Path(root) / f"Dataset{number:03d}_{name}"
    if others := [p.name for p in Path(root).glob(f"Dataset{number:03d}_*") if p.name != target.name]:
        raise ConfigurationError(f"The number {number} is taken by {shorten(others)} in {root}. Choose another.")
    return target


def recognise(source: Path, *, masks: Sequence[str] = (), labels: Sequence[str] = (), mask_axes: str | None = None,
              orientation: str | None = None, channels: Sequence[str] = ()) -> Layout:
    """Return the cases in a folder, and how they lie there. The options are those of `gather`.

    channels: last words of the images' names that tell their channel, where no mask tells which words those are.

    Raises:
        DatasetError: the folder holds no image that can be read.
    """
    if not source.is_dir():
        raise DatasetError(f"{source} is no folder. Give the folder that holds the images.")
    layout = find_described(source)
    if layout is None:
        files = list(files_below(source))
        layout = (find_dafne(files, mask_axes=mask_axes, orientation=orientation)
                  or find_dicom(files, masks=masks, labels=labels)
                  or find_pairs(files, masks=masks, labels=labels, channels=channels))
        if layout is not None:
            layout = replace(layout, cases=with_segments(with_legends(layout.cases, mask_axes)))
    if layout is None or not layout.cases:
        raise DatasetError(f"{source} holds no image that can be read: .nii.gz, .nii, .nrrd, .mha, .mhd, .png, .tif, "
                           ".jpg.")
    return layout


def _without(cases: Sequence[Found], names: Sequence[str]) -> list[Found]:
    wanted = {n for text in names for n in text.split(",") if n}
    if unknown := sorted(wanted - {c.name for c in cases}):
        raise DatasetError(f"--without names {shorten(unknown)}, which is no case. The cases are "
                           f"{shorten([c.name for c in cases])}.")
    left = [c for c in cases if c.name not in wanted]
    if not any(c.masks for c in left):
        raise DatasetError("--without leaves out every case with a mask; at least one must stay.")
    return left


def _labels(layout: Layout, given: Sequence[tuple[str, int | None]]) -> Labels:
    if layout.dataset_json is None:
        return choose_labels(layout, given)
    if given:
        raise DatasetError(f"--labels: the source is an nnU-Net data set, whose dataset.json names its labels "
                           f"({', '.join(layout.dataset_json['labels'])}). Leave --labels out, or correct that file.")
    numbers = {n: v for n, v in layout.dataset_json["labels"].items() if isinstance(v, int) and v}
    return Labels(numbers, {v: n for n, v in numbers.items()}, "dataset.json")


def _describe(layout: Layout, labels: Labels, notes: Sequence[str], say: Callable[[str], object]) -> None:
    with_mask = [c for c in layout.cases if c.masks]
    say(f"Cases: {len(with_mask)} with masks ({shorten([c.name for c in with_mask])}), of "
        f"{len({c.patient for c in with_mask})} patients.")
    if unseen := [c.name for c in layout.cases if not c.masks]:
        say(f"Without mask: {len(unseen)} ({shorten(unseen)}). They will go to imagesTs; no training sees them.")
    say(f"Labels, from {labels.origin}: " + ", ".join(f"{n} = {v}" for n, v in labels.numbers.items()) + ".")
    if left := sorted({m for c in with_mask for m in c.masks if m and m not in labels.numbers}):
        say(f"Note: masks that --labels does not name are left out: {shorten(left)}.")
    for note in notes:
        say(f"Note: {note}.")


def _channels(layout: Layout, facts: Sequence[Facts], given: Sequence[str],
              say: Callable[[str], object]) -> tuple[list[str], list[str]]:
    """Return the keys of the channels in the source, in order, and their names in the data set."""
    keys = list(layout.channels or sorted(facts[0].case.images))
    wanted = [name for text in given for name in text.split(",") if name]
    colours = facts[0].components
    count = colours if colours > 1 else len(keys)
    if wanted and len(wanted) != count:
        raise ConfigurationError(f"--channels names {', '.join(wanted)}, but a case has {count} channels"
                                 f"{': ' + ', '.join(keys) if count > 1 else ''}. Name each of them once.")
    if {k.lower() for k in keys} == {w.lower() for w in wanted} and colours == 1:
        order = [w.lower() for w in wanted]
        keys = sorted(keys, key=lambda key: order.index(key.lower()))
    named = wanted or (list(_COLOURS[:colours]) if colours > 1 else [k or "image" for k in keys])
    say("Channels: " + ", ".join(f"{n}" + (f" (files {k})" if k and k != n else "") for n, k in zip(
        named, keys if colours == 1 else [""] * colours)) + ".")
    if not wanted and layout.channels is None and "ct" not in map(str.lower, named) and sum(
            looks_like_ct(facts)) > len(facts) / 2:
        say("Note: the images look like CT (values of air near -1000). nnU-Net normalises CT in a way of its own, by "
            "the channel's name: if they are CT, give --channels CT.")
    return keys, named


def _say_findings(facts: Sequence[Facts], overview: pandas.DataFrame, say: Callable[[str], object]) -> None:
    for kind in ("shape", "orientation"):
        if kind in overview:  # a case was read
            say(f"{kind.capitalize()}: {shorten([f'{v} ({n})' for v, n in overview[kind].value_counts().items()])}.")
    odd = [f"{name} in {what}" for name, what in zip(overview["case"], overview["unusual"]) if what]
    warned = [f"{f.case.name}: {warning}" for f in facts for warning in f.warnings]
    for kind, lines in (("Unusual", odd), ("Warning", warned)):
        for line in lines[:_SHOWN]:
            say(f"{kind}: {line}.")
        if len(lines) > _SHOWN:
            say(f"{kind}: {len(lines) - _SHOWN} more; cases.csv of the data set will name all of them.")


def _refuse_faults(facts: Sequence[Facts]) -> None:
    bad = [f for f in facts if f.faults]
    if bad:
        lines = [f"{f.case.name}: {fault}." for f in bad for fault in f.faults]
        more = [f"... and {len(lines) - _SHOWN} more."] if len(lines) > _SHOWN else []
        raise DatasetError("\n".join([f"{len(bad)} of {len(facts)} cases cannot be used:", *lines[:_SHOWN], *more,
                                      "Correct them, or leave them out: --without "
                                      + ",".join(f.case.name for f in bad[:50])]))
    if not any(n for f in facts for n in f.volumes.values()) and any(f.volumes for f in facts):
        raise DatasetError("No mask has any foreground, so nothing can be trained. Are these the right masks?")


def _dataset_json(layout: Layout, labels: Labels, channels: Sequence[str], facts: Sequence[Facts],
                  ending: str) -> DatasetJson:
    training = sum(bool(f.case.masks) for f in facts)
    if layout.dataset_json is not None:
        kept = {k: v for k, v in layout.dataset_json.items() if k != "dataset"}  # its files lie in the folders now
        return kept | {"numTraining": training, "file_ending": ending}
    return {"channel_names": {str(i): name for i, name in enumerate(channels)},
            "labels": {"background": 0, **labels.numbers}, "numTraining": training, "file_ending": ending,
            "converted_by": "nnunet-dante dataset"}


def _plan(facts: Sequence[Facts], ending: str, target: Path, copy: bool) -> str:
    parts = [(f.as_is[0], p) for f in facts for p in f.case.images.values()] + [
        (f.as_is[1], next(iter(f.case.masks.values()))) for f in facts if f.case.masks]
    kept = sum(as_is and p.ending == ending for as_is, p in parts)
    return (f"{target}: {kept} files will be {'copied' if copy else 'linked'} as they are, {len(parts) - kept} "
            f"will be written as {ending} without loss.")
