"""Completed masks: what a case does not say about a label, the donor's own prediction on its image says.

So a network learns a new label and keeps the donor's, although nobody drew the donor's in the new cases. These are
pseudo-labels of the old network, as in Learning without Forgetting (Li and Hoiem 2016), but hard and on disk: the
completed masks are a data set of their own, which can be looked at, corrected and versioned, and which stock nnU-Net
trains. The data set holds, beside nnU-Net's own files:

    donorTr/CASE        the donor's prediction, in the donor's numbers; a stopped run goes on with cases that lack it.
                        `compare` uses it to say what a label lost or gained
    pictures/CASE.png   the image, and on it the drawn labels, the donor's prediction and the completed mask
    completed.json      who completed what, from which masks; dataset.json is written last
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from .. import __version__
from ..datasets.annotated import ANNOTATED, COMPLETED, RECORD, REHEARSED, read_completed, without_cases
from ..datasets.checks import misplaced, shorten
from ..datasets.dataset import Target, open_target
from ..datasets.images import Case, reading
from ..errors import ConfigurationError, TransferError
from ..files import counted, write_text_atomically
from ..models.checkpoint import file_sha256
from ..models.donor import Donor
from ..models.labels import channel_names
from ..models.network import build_network
from ..types import PathLike
from .match import match_names
from .picture import case_picture
from .rehearse import Rehearsal, find_rehearsal
from .union import ALL, Tally, Union, join_labels, translate


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What `complete` did; part of the report of a transfer.

    drawn, donors: label -> voxels of the completed masks, by source. claimed: label of the donor -> your label ->
    voxels that the donor predicts as the one and you drew as the other.
    """

    source: str
    dataset: str
    folds: int
    cases: int
    kept: tuple[str, ...]
    drawn: dict[str, int]
    donors: dict[str, int]
    claimed: dict[str, dict[str, int]]
    implausible: tuple[str, ...]
    rehearsed: int = 0
    share: float = 0.0

    def lines(self) -> Iterator[str]:
        """Yield the text of the report: voxels by label and source."""
        yield (f"{self.dataset}: the masks of {counted(self.cases, 'case')} of {self.source}, completed with "
               f"predictions of the donor ({counted(self.folds, 'fold')}). Look at the pictures in it")
        width = max(map(len, (*self.drawn, "label")))
        yield f"{'label':<{width}} {'voxels drawn':>14} {'of the donor':>14}"
        for name, drawn in self.drawn.items():
            lost = {other: voxels for other, voxels in self.claimed.get(name, {}).items() if voxels}
            yield (f"{name:<{width}} {drawn:>14} {self.donors[name]:>14}"
                   + (f"   ({sum(lost.values())} more lie where you drew {', '.join(lost)})" if lost else ""))
        if self.rehearsed:
            yield (f"{self.rehearsed} labelled cases of the donor's own data are rehearsed: {self.share:.0%} of the "
                   "training patches come from them")


def complete(donors: Sequence[Donor], target: Target, *, keep: Sequence[str] = (ALL,),
             into: str | None = None, rehearse: PathLike | None = None,
             share: float = 0.25) -> tuple[Target, Completion]:
    """Write the completed data set of `target`, or go on writing it, and return it.

    Args:
        donors: the donor in all the folds that predict.
        target: the data set whose masks are completed.
        keep: names of the donor's labels to keep, or ALL.
        into: name of the completed data set; by default the next free number and the name of `target` + "Completed".
        rehearse: folder with imagesTr and labelsTr of the donor's own data, from which `share` of the training patches
            is to come. The masks are in the donor's numbers.

    Raises:
        ConfigurationError, TransferError: the donor cannot read the images, no label is kept, a mask does not lie
            where its image lies, two labels claim the same voxels, or the completed data set exists and differs. It is
            then no finished data set, or what it was.
    """
    channels = readable_channels(donors[0], target)
    union = join_labels(target.dataset_json, donors[0].dataset_json, cases=target.own, undrawn=target.undrawn,
                        keep=keep)
    if odd := misplaced(target.cases):
        raise TransferError(f"{target.name}: mask and images of {counted(len(odd), 'case')} do not lie on one grid: "
                            f"{shorten(odd)}. The donor's labels would be put in the wrong place. Correct origin, "
                            "spacing and direction of the masks, or resample them to their images.")
    rehearsal = Rehearsal() if rehearse is None else find_rehearsal(rehearse, share, donor=donors[0], target=target,
                                                                    union=union)
    folder = completed_folder(target, into)
    reader = recursive_find_reader_writer_by_name(target.reader(str(donors[0].plans.get("image_reader_writer"))))()
    files = _Files(folder, reader, str(target.dataset_json["file_ending"]))
    record = {"format": 1, "version": __version__, "source": target.name, "donor": [d.provenance() for d in donors],
              "labels": union.labels, "completed": {case: sorted(union.completed[case]) for case in target.own},
              "masks": {case: file_sha256(target.cases[case].mask) for case in target.own},
              "donor_values": {union.names[new]: old for old, new in union.theirs.items()},
              "rehearsed": {case: file_sha256(files.mask) for case, files in rehearsal.cases.items()},
              "share": rehearsal.share}
    _begin(folder, record)
    predict(donors, {case: target.cases[case] for case in target.own}, files, channels)
    tally = _merge(target, union, files)
    _add_rehearsed(rehearsal, union, files)
    _finish(target, union, rehearsal, folder)
    return open_target(folder.name), Completion(
        source=target.name, dataset=folder.name, folds=len(donors), cases=len(target.own), kept=union.kept,
        drawn=tally.drawn, donors=tally.donors, claimed=tally.claimed, implausible=tuple(tally.implausible()),
        rehearsed=len(rehearsal.cases), share=rehearsal.share)


def readable_channels(donor: Donor, target: Target) -> list[int]:
    """Return the number of the target's channel for each channel that the donor reads.

    Raises:
        TransferError: the target lacks a channel that the donor reads, or the donor cannot predict by itself.
    """
    if donor.encoder_only:
        raise TransferError(f"The donor {donor.source} is an encoder without a decoder, so it cannot predict masks. "
                            "Leave out --keep-labels.")
    if PlansManager(donor.plans).get_configuration(donor.configuration).previous_stage_name is not None:
        raise TransferError(f"The donor's configuration {donor.configuration} is the second stage of a cascade, which "
                            "cannot predict by itself. Keep labels with its first stage, or with 3d_fullres: -c.")
    names, own = channel_names(donor.dataset_json), channel_names(target.dataset_json)
    positions = match_names(names, own)
    if missing := [name for name, i in zip(names, positions) if i is None]:
        raise TransferError(f"The donor cannot read these images: it needs the channels {', '.join(names)}, and "
                            f"{target.name} has {', '.join(own)}. If {missing[0]} is there under another name, give it "
                            "the donor's name: with --channels of `dataset` or `adapt`, or in dataset.json.")
    return [i for i in positions if i is not None]


def completed_folder(target: Target, into: str | None) -> Path:
    """Return where the completed data set of `target` lies or will lie.

    Raises:
        ConfigurationError: `into` is no name of a data set, or its number belongs to another one.
    """
    root, title = target.raw.parent, f"{target.name.partition('_')[2] or target.name}Completed"
    if into is None:
        for folder in sorted(root.glob(f"Dataset*_{title}")):
            if read_completed(folder).get("source") == target.name:
                return folder
        number = int((re.match(r"Dataset(\d+)", target.name) or [0, 0])[1]) + 1
        while (root / (name := f"Dataset{number:03d}_{title}")).exists() or {*find_candidate_datasets(number)} - {name}:
            number += 1
        return root / name
    found = re.fullmatch(r"Dataset(\d{3,})_\w+", into)
    if not found:
        raise ConfigurationError(f"--into is {into!r}; nnU-Net's data sets are named like Dataset124_MineCompleted.")
    if others := sorted({*find_candidate_datasets(int(found[1]))} - {into}):
        raise ConfigurationError(f"--into {into}: the number {found[1]} belongs to {others[0]}. Take a number that no "
                                 "data set has.")
    return root / into


@dataclass(frozen=True)
class _Files:
    """Where the masks of a completed data set lie, and how they are read and written."""

    folder: Path
    reader: Any
    ending: str

    def of(self, kind: str, case: str) -> Path:
        return self.folder / kind / f"{case}{self.ending}"

    def read(self, file: Path) -> tuple[np.ndarray, dict[str, Any]]:
        """Return an integer mask (*space) and its properties."""
        with reading(file.parent, file.name):
            mask, properties = self.reader.read_seg(str(file))
        return np.rint(mask[0]).astype(np.int64), properties

    def write(self, mask: np.ndarray, file: Path, properties: dict[str, Any]) -> None:
        """Write a mask whole or not at all. The temporary name keeps the ending, by which writers know the format."""
        temporary = self.folder / f"unfinished{self.ending}"
        kind = np.uint8 if mask.max(initial=0) < 256 else np.uint16
        self.reader.write_seg(mask.astype(kind), str(temporary), properties)
        temporary.replace(file)


def _begin(folder: Path, record: Mapping[str, Any]) -> None:
    """Compare with what is there: an unfinished data set goes on, a finished one must be this one."""
    if folder.is_dir():
        before, finished = read_completed(folder), (folder / "dataset.json").is_file()
        differing = _differences(before, record)
        if not before or finished and differing:
            raise ConfigurationError(
                f"{folder.name} exists, and " + ("was not written by `transfer --keep-labels`" if not before else
                                                 f"was completed otherwise: {'; '.join(differing)}")
                + ". It is left alone, as its masks may have been corrected. Give another name with --into, or delete "
                  "the folder.")
        for name in (["imagesTr", "labelsTr"] if differing else []) + ["donorTr"] * (
                before.get("donor") != record["donor"]):
            shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("imagesTr", "labelsTr", "donorTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_text_atomically(json.dumps(record, indent=1), folder / RECORD)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in what an earlier record differs; cases that were added since are no difference."""
    kinds = {"source": "from", "donor": "by another donor:", "labels": "with the labels",
             "rehearsed": "with the rehearsed cases", "share": "with the share"}
    lines = [f"{what} {before.get(key)!r:.80}" for key, what in kinds.items() if before.get(key) != now[key]]
    for key, what in (("masks", "from other masks"), ("completed", "with other labels")):
        old = before.get(key) or {}
        if changed := [case for case in old if old[case] != now[key].get(case)]:
            lines.append(f"{what} in {shorten(changed)}")
    return lines


def predict(donors: Sequence[Donor], cases: Mapping[str, Case], files: _Files, channels: Sequence[int]) -> None:
    """Let the donor predict the cases that have no prediction yet, as nnU-Net does with all its folds."""
    todo = {name: case for name, case in cases.items() if not files.of("donorTr", name).is_file()}
    if not todo:
        return
    donor, device = donors[0], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    manager, axes = PlansManager(donor.plans), donor.mirroring_axes or None
    network = build_network(donor.plans, donor.dataset_json, donor.configuration, trainer_name=donor.network_trainer,
                            trust=donor.trust, deep_supervision=False)
    with contextlib.redirect_stdout(io.StringIO()):  # without a GPU, nnU-Net prints that it does without
        predictor = nnUNetPredictor(use_mirroring=axes is not None, device=device, allow_tqdm=False,
                                    perform_everything_on_device=device.type == "cuda")
    predictor.manual_initialization(network, manager, manager.get_configuration(donor.configuration),
                                    [d.weights for d in donors], donor.dataset_json, donor.trainer_name, axes)
    for name, case in tqdm(todo.items(), desc="The donor predicts", unit="case", file=sys.stderr):
        with reading(case.images[0].parent, f"case {name}"):
            image, properties = files.reader.read_images([str(path) for path in case.images])  # (channels, *space)
        mask = predictor.predict_single_npy_array(image[list(channels)], properties, None, None, False)
        files.write(mask, files.of("donorTr", name), properties)


def _merge(target: Target, union: Union, files: _Files) -> Tally:
    """Write the completed masks that are missing, with links to their images; return the counts over all cases."""
    tally = Tally(union)
    for name in target.own:
        case, file, donors = target.cases[name], files.of("labelsTr", name), files.of("donorTr", name)
        drawn, properties = files.read(case.mask)
        _check_values(drawn, union.mine.keys(), case.mask, "dataset.json")
        predicted = files.read(donors)[0]
        if predicted.shape != drawn.shape:
            raise TransferError(f"{target.name}: the mask of {name} has {drawn.shape} voxels, its image "
                                f"{predicted.shape}. Both must lie on one grid.")
        mask = tally.join(name, drawn, predicted, voxel_mm3=float(np.prod(properties["spacing"])))
        link_images(case.images, files, name)
        if not file.is_file():  # one that is there may have been corrected since
            case_picture(name, case, files.reader, {
                "drawn by you": translate(drawn, union.mine), "of the donor": translate(predicted, union.theirs),
                "completed": mask}, files.folder / "pictures" / f"{name}.png", labels=union.names,
                         spacing_mm=properties["spacing"])
            files.write(mask, file, properties)
    tally.refuse_claims()
    return tally


def _check_values(mask: np.ndarray, known: Collection[int], file: Path, whose: str) -> None:
    if unknown := sorted({*np.unique(mask).tolist()} - {*known}):
        raise TransferError(f"Mask {file.name} holds the values {unknown[:5]}, for which {whose} has no label; it has "
                            f"{sorted(known)}. Add the labels, or correct the mask.")


def _add_rehearsed(rehearsal: Rehearsal, union: Union, files: _Files) -> None:
    for name, case in rehearsal.cases.items():
        link_images(case.images, files, name)
        if not (file := files.of("labelsTr", name)).is_file():
            drawn, properties = files.read(case.mask)
            _check_values(drawn, rehearsal.values, case.mask, "the donor")
            files.write(translate(drawn, union.theirs), file, properties)


def link_images(images: Sequence[Path], files: _Files, name: str) -> None:
    """Put links to a case's images into imagesTr; copies, where the file system or its owner allows no links."""
    for number, image in enumerate(images):
        link = files.of("imagesTr", f"{name}_{number:04d}")
        if link.exists():
            continue
        link.unlink(missing_ok=True)  # a link that leads nowhere any more
        try:
            link.symlink_to(image.resolve())
        except OSError:
            shutil.copy(image, link)


def _finish(target: Target, union: Union, rehearsal: Rehearsal, folder: Path) -> None:
    """Write dataset.json, after which the data set counts as finished."""
    content = dict(without_cases(target.dataset_json))
    content |= {"labels": union.labels, "numTraining": len(target.own) + len(rehearsal.cases),
                COMPLETED: sorted(frozenset().union(*union.completed.values()))}
    undrawn = {**union.undrawn, **(dict.fromkeys(rehearsal.cases, rehearsal.undrawn) if rehearsal.undrawn else {})}
    if undrawn:
        content[ANNOTATED] = {case: [name for name in union.names.values() if name not in labels]
                              for case, labels in sorted(undrawn.items())}
    if rehearsal.cases:
        content[REHEARSED] = {"share": rehearsal.share, "cases": sorted(rehearsal.cases)}
    if (groups := target.raw / "groups.csv").is_file():  # which cases are of one patient
        shutil.copy(groups, folder)
    write_text_atomically(json.dumps(content, indent=2), folder / "dataset.json")
