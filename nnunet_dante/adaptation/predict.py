"""Segment any folder of images with an adapted network, the least sure cases first: `nnunet-dante predict`."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import torch
from tqdm import tqdm

from ..compare.plots import draw_masks, label_values
from ..compare.sources import CaseFiles
from ..datasets.gather.examine import examine_case
from ..datasets.gather.found import Found, Layout
from ..datasets.gather.gather import recognise
from ..datasets.gather.roles import words_of
from ..datasets.gather.volumes import PHOTOS
from ..datasets.gather.write import write_images
from ..errors import ConfigurationError, DatasetError
from ..files import atomic_path, csv_text, read_json, write_text_atomically
from ..models.labels import channel_names
from ..training.launch import best_device
from ..types import PathLike
from .confidence import agreement, correlation, on_unseen
from .networks import Networks, Segmenter, open_networks
from .steps import say

TABLE = "confidence.csv"
_RECORD, _WORK = "predict.json", ".unfinished"
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What was segmented.

    masks: folder with CASE.nii.gz, or another ending that the model has. table: CSV file, cases to look at first come
    first. confidence: case -> 0 to 1, nan where nothing tells; in the same order. problems: case -> why it was not
    segmented. tested: how far the confidence follows the true Dice on cases that a fold did not see.
    """

    masks: Path
    table: Path
    confidence: Mapping[str, float]
    problems: Mapping[str, str]
    tested: str

    def __str__(self) -> str:
        lines = [f"Not segmented: {case}: {problem}" for case, problem in self.problems.items()]
        known = [(case, value) for case, value in self.confidence.items() if not math.isnan(value)]
        if known:
            first = ", ".join(f"{case} {value:.2f}" for case, value in list(self.confidence.items())[:_SHOWN])
            lines.append(f"Look at these first (confidence): {first}.")
        return "\n".join([*lines, *([self.tested] if self.tested else []),
                          f"{len(self.confidence)} masks: {self.masks}\nTable: {self.table}"])


def predict(model: PathLike, images: PathLike, masks: PathLike, *, overlays: bool = False,
            configuration: str | None = None, device: str | None = None, trust: bool = False) -> Predicted:
    """Segment images as nnU-Net does, and say for each case how sure the network is.

    The confidence is the agreement (Dice) of the mask with those of other networks of the same adaptation: the donor,
    the network with more or less of what was learned, and those of the folds. They predict without mirroring, so that
    all of them together take about as long as the mask itself. Stopped at any moment, the same call goes on.

    Args:
        model: folder OUT of `adapt`; or a model folder, zip or checkpoint. The folds of a model folder segment
            together, and their agreement is the confidence; a single network has none.
        images: folder of images, in any layout that `nnunet-dante dataset` recognises; masks in it are not used.
        masks: new folder of everything that is written.
        overlays: also draw the mask of each case on its image, as PNG.
        configuration: needed where `model` holds several.
        device: cuda, mps or cpu; default: the best there is.
        trust: read a checkpoint that executes code; only if you know its author.

    Raises:
        DatasetError: there is no image, or no case has the model's channels.
        ConfigurationError: `masks` is not empty, or lies in `images`.
        DonorError: `model` is no model that can be used.

    Example:
        >>> print(predict("OUT", "NEW_IMAGES", "MASKS"))  # doctest: +SKIP
    """
    source, out = Path(images).resolve(), Path(masks).resolve()
    if out == source or source in out.parents:
        raise ConfigurationError(f"-o {out} lies in the folder of the images, where masks would be taken for images. "
                                 "Choose another folder.")
    networks = open_networks(model, configuration=configuration, trust=trust)
    work = _Work(networks, Segmenter(networks.donor, device or best_device()), source, out)
    rows = work.do()
    table = _sorted(rows)
    write_text_atomically(csv_text(table.to_dict("records")), out / TABLE)
    done = table[table["problem"] == ""]
    tested = ""
    if networks.folds and networks.others:
        tested = correlation(on_unseen(networks, work.segmenter))
    if overlays:
        work.draw(done)
    confidence = done["confidence"] if "confidence" in table else [math.nan] * len(done)
    return Predicted(masks=out, table=out / TABLE, confidence=dict(zip(done["case"], confidence)), tested=tested,
                     problems={case: row["problem"] for case, row in rows.items() if row["problem"]})


def _sorted(rows: Mapping[str, Mapping[str, Any]]) -> pandas.DataFrame:
    """Return the rows as a table: cases with a problem, cases without any label, then the least confidence first."""
    known = pandas.DataFrame([row["confidence"] for row in rows.values()], dtype=float)
    table = pandas.concat([pandas.Series(list(rows), name="case", dtype=str), known], axis=1)
    table["problem"] = [row["problem"] for row in rows.values()]
    keys = {"solved": table["problem"] == "", "confidence": table.get("confidence"), "case": table["case"]}
    return table.loc[pandas.DataFrame(keys).sort_values(list(keys), na_position="first").index]


class _Work:
    """The segmentation of one folder: its cases, and what has been done."""

    def __init__(self, networks: Networks, segmenter: Segmenter, source: Path, out: Path):
        self.networks, self.segmenter, self.out = networks, segmenter, out
        self.channels = channel_names(segmenter.dataset_json)
        numbered = [f"{n:04d}" for n in range(len(self.channels))]
        self.layout: Layout = recognise(source, channels=[*self.channels, *numbered])
        say(f"Found: {len(self.layout.cases)} cases in {source}; {self.layout.description}.")
        if all(self.keys(case) is None for case in self.layout.cases):
            case = self.layout.cases[0]
            raise DatasetError(f"no case has the channels of the model, which are {', '.join(self.channels)}; "
                               f"{case.name} has {_list(case.images)}. Name the files CASE_0000, CASE_0001, ... in the "
                               "order of the model's channels.")
        self.record = self._open({"model": networks.donor.sha256, "images": str(source)})

    def _open(self, asked: dict[str, str]) -> dict[str, Any]:
        file = self.out / _RECORD
        if file.is_file():
            record: dict[str, Any] = read_json(file)
            if record["asked"] != asked:
                raise ConfigurationError(f"{self.out} holds masks of other images or of another model. Give a new "
                                         "folder with -o.")
            return record
        if self.out.is_dir() and any(self.out.iterdir()):
            raise ConfigurationError(f"{self.out} is not empty. Give a new folder with -o.")
        return {"format": 1, "asked": asked, "cases": {}}

    def keys(self, case: Found) -> list[str] | None:
        """Return the case's channels in the order of the model's; None where they are others."""
        found = sorted(case.images)
        by_name = {key.lower(): key for key in found}
        names = ["_".join(words_of(name)).lower() for name in self.channels]
        if by_name.keys() == set(names) and len(found) == len(names):
            return [by_name[name] for name in names]
        if len(found) == 1:  # a photograph holds its colours in one file
            return found if len(names) == 1 or case.images[found[0]].ending.lower() in PHOTOS else None
        return found if found == [f"{n:04d}" for n in range(len(names))] else None

    def do(self) -> dict[str, dict[str, Any]]:
        """Segment every case that is not done yet, and return case -> what is known of it."""
        done, rows = self.record["cases"], {}
        for case in tqdm(self.layout.cases, desc="segmenting", unit="case", disable=None):
            state = _state(case)
            row = done.get(case.name)
            if row is None or row["problem"] or row["state"] != state or not self._file(case.name).is_file():
                row = {"state": state, **self._segment(case)}
                done[case.name] = row
                write_text_atomically(json.dumps(self.record, indent=1), self.out / _RECORD)
            rows[case.name] = row
        return rows

    def _file(self, case: str) -> Path:
        return self.out / f"{case}{self.segmenter.ending}"

    def _segment(self, case: Found) -> dict[str, Any]:
        """Write the mask of one case; what goes wrong with it becomes its problem, and the others go on."""
        keys, folder = self.keys(case), self.out / _WORK
        facts = examine_case(case, layout=self.layout, labels=None, resample=False, pictures=False)
        number = facts.components if facts.components > 1 else len(case.images)
        if not facts.faults and (keys is None or number != len(self.channels)):
            facts.faults.append(f"it has {number} channels ({_list(case.images)}), the model takes "
                                f"{len(self.channels)} ({', '.join(self.channels)})")
        if facts.faults or keys is None:
            return {"problem": "; ".join(facts.faults), "confidence": {}}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            return self._segmented(case.name, write_images(facts, keys, self.segmenter.ending, folder))
        except DatasetError as error:
            return {"problem": str(error), "confidence": {}}
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _segmented(self, case: str, images: Sequence[Path]) -> dict[str, Any]:
        segmenter = self.segmenter
        try:
            prepared = segmenter.prepare(images)
            mask = segmenter.mask(prepared, self.networks.final)
            found = segmenter.masks_of(prepared, self.networks.others)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever nnU-Net and its image libraries raise on an image that they cannot take
            return {"problem": f"nnU-Net cannot segment it ({type(error).__name__}: {error})", "confidence": {}}
        with atomic_path(self._file(case)) as temporary:
            written = images[0].with_name(f"mask{segmenter.ending}")
            try:
                segmenter.reader.write_seg(mask, str(written), prepared[1])
            except RuntimeError as error:  # SimpleITK's
                raise OSError(errno.EIO, str(error).splitlines()[-1]) from error
            written.replace(temporary)
        said = agreement(mask, found, segmenter) if found else {}
        return {"problem": "", "confidence": {k: None if math.isnan(v) else round(v, 4) for k, v in said.items()}}

    def draw(self, table: pandas.DataFrame) -> None:
        """Draw the mask of each case on its first channel; the names of the files have the order of the table."""
        folder, cases = self.out / "overlays", {case.name: case for case in self.layout.cases}
        shutil.rmtree(folder, ignore_errors=True)
        labels = label_values(CaseFiles(dataset="", content=self.segmenter.dataset_json))
        for place, row in enumerate(tqdm(table.to_dict("records"), desc="drawing", unit="case", disable=None), start=1):
            name, value = row["case"], row.get("confidence", math.nan)
            keys = self.keys(cases[name]) or []
            draw_masks(cases[name].images[keys[0]].load(), {"mask": self._file(name)},
                       folder / f"{place:03d}_{name}.png", labels=labels, title=name,
                       captions={} if math.isnan(value) else {"mask": f"confidence {value:.2f}"})


def _state(case: Found) -> Any:
    """Return sizes and dates of the files of a case, as JSON gives them back; None if one is gone."""
    try:
        return json.loads(json.dumps([part.state() for part in case.images.values()]))
    except OSError:
        return None


def _list(channels: Mapping[str, object]) -> str:
    return ", ".join(sorted(channels)) or "one image"
