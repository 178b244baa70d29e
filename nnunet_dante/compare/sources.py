"""What a user can compare (folds, protocols, files of results), and where the files of its cases are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..adapters.strength import stale_masks
from ..datasets.annotated import Undrawn, read_undrawn
from ..datasets.images import is_cut, segmentation_reader
from ..errors import DanteError, ResultError
from ..files import nnunet_folder, read_json
from ..models.checkpoint import load_checkpoint_safely
from .kept import against_donor
from .metrics import score
from .results import CaseScores, RunResult, read_results
from .study import shots_of
from .training_log import training_facts

_PREPROCESSED, _RAW = "nnUNet_preprocessed", "nnUNet_raw"


@dataclass(frozen=True, kw_only=True)
class CaseFiles:
    """Finds the images and masks of a data set's cases.

    dataset: name of the data set, such as "Dataset001_Liver".
    content: content of its dataset.json.
    """

    dataset: str
    content: Mapping[str, Any]

    @property
    def ending(self) -> str:
        """The ending of images and masks, such as ".nii.gz"."""
        return str(self.content["file_ending"])

    @property
    def undrawn(self) -> Undrawn:
        """Case -> the labels that were not drawn in it, which are not scored."""
        folders = (nnunet_folder(variable, self.dataset) for variable in (_PREPROCESSED, _RAW))
        return next((read_undrawn(f) for f in folders if f is not None and (f / "dataset.json").is_file()), {})

    def masks(self, folder: Path) -> dict[str, Path]:
        """Return {case: its mask} of a folder of predictions, without the other files that nnU-Net writes there."""
        return {file.name.removesuffix(self.ending): file for file in sorted(folder.glob(f"*{self.ending}"))}

    def image(self, case: str) -> Path:
        """Return the image of a case's first channel.

        Raises:
            ResultError: it was not found.
        """
        raw = nnunet_folder(_RAW, self.dataset) or Path()
        places = [raw / folder / f"{case}_0000{self.ending}" for folder in ("imagesTr", "imagesTs")]
        if found := next(filter(Path.is_file, [*self._listed(case, "images"), *places]), None):
            return found
        raise ResultError(f"the image of {case} was not found in nnUNet_raw/{self.dataset} ({_setting(_RAW)}).")

    def truth(self, case: str) -> Path:
        """Return the true mask of a case.

        Raises:
            ResultError: it is in none of nnU-Net's folders.
        """
        name = f"{case}{self.ending}"
        places = [folder / below / name for variable, below in (
            (_PREPROCESSED, "gt_segmentations"), (_RAW, "labelsTr"), (_RAW, "labelsTs"))
            if (folder := nnunet_folder(variable, self.dataset))]
        if found := next(filter(Path.is_file, [*places, *self._listed(case, "label")]), None):
            return found
        raise ResultError(f"the truth of {name} is neither in nnUNet_preprocessed/{self.dataset}/gt_segmentations nor "
                          f"in nnUNet_raw/{self.dataset}/labelsTr ({_setting(_PREPROCESSED)}, {_setting(_RAW)}); set "
                          f"the variables as for the training.")

    def _listed(self, case: str, key: str) -> list[Path]:
        """Return the files that "dataset" in dataset.json names; relative paths start at the raw folder."""
        raw = nnunet_folder(_RAW, self.dataset) or Path()
        named = self.content.get("dataset", {}).get(case, {}).get(key, [])
        return [raw / os.path.expandvars(name) for name in ([named] if isinstance(named, str) else named)]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A result and, if they are still there, the folder of its predicted masks and the files of its cases."""

    result: RunResult
    masks: Path | None = None
    files: CaseFiles | None = None


def read_sources(paths: Iterable[Path], *, tolerance_mm: float) -> list[Source]:
    """Read fold folders, protocol folders and files of results.

    Raises:
        ResultError: a path is none of them, or damaged.
    """
    folds: list[tuple[str, Source]] = []
    sources: list[Source] = []
    for path in paths:
        if (path / "runs").is_dir():
            sources += _protocol(path)
        elif path.is_dir():
            folds.append((path.resolve().parent.name, read_fold(path, tolerance_mm=tolerance_mm)))
        else:
            sources += [Source(result=result) for result in read_results(path)]
    return _told_apart(folds) + sources


def read_fold(folder: Path, *, tolerance_mm: float = 2.0) -> Source:
    """Score the validation predictions of a finished fold, and read what its training cost.

    The true masks are in nnUNet_preprocessed/DATASET/gt_segmentations or nnUNet_raw/DATASET/labelsTr. The number of
    training cases is read from splits_final.json, and the seed from shots.json if that file exists.

    folder: TRAINER__PLANS__CONFIGURATION/fold_X.
    tolerance_mm: tolerance of the surface Dice, in mm.

    Raises:
        ResultError: the folder is no finished fold, or one of the files is missing or damaged; the message names it.
    """
    folder = Path(folder).resolve()
    try:
        return _read_fold(folder, tolerance_mm)
    except DanteError:
        raise
    except Exception as error:  # whatever nnU-Net and its image libraries raise on damaged files
        raise ResultError(f"{folder} cannot be compared: one of its files, or of its data set's, is damaged "
                          f"({type(error).__name__}: {str(error)[:300]}). Copy them again.") from error


def _read_fold(folder: Path, tolerance_mm: float) -> Source:
    parts = folder.parent.name.split("__")
    if len(parts) != 3 or not folder.name.startswith("fold_") or not (folder / "checkpoint_final.pth").is_file():
        raise ResultError(f"{folder} is no finished fold of nnU-Net: it must be TRAINER__PLANS__CONFIGURATION/fold_X "
                          f"and hold checkpoint_final.pth. A protocol's folder holds runs/*.json instead.")
    if folder.name == "fold_all":
        raise ResultError(f"{folder} was validated on the cases it was trained on, which says nothing about new ones; "
                          f"compare folds that have validation cases of their own.")
    dataset_json, plans = (_json(folder.parent / name) for name in ("dataset.json", "plans.json"))
    files = CaseFiles(dataset=plans.get("dataset_name") or folder.parent.parent.name, content=dataset_json)
    checkpoint = load_checkpoint_safely(folder / "checkpoint_final.pth")
    donor, stale = (checkpoint.get("dante") or {}).get("donor") or {}, stale_masks(folder, checkpoint)
    adapter, debug = folder / "adapter.safetensors", folder / "debug.json"
    facts = _json(debug) if debug.is_file() else {}
    iterations = str(facts.get("num_iterations_per_epoch", ""))
    result = RunResult(
        experiment=files.dataset, donor=donor.get("source", ""), tolerance_mm=tolerance_mm,
        method=parts[0].removeprefix("nnUNetTrainer") or "nnU-Net", trainer=parts[0],
        **_draw(files.dataset, int(folder.name.removeprefix("fold_")), dataset_json), **training_facts(checkpoint),
        cases=score_masks(folder / "validation", files, plans, tolerance_mm=tolerance_mm),
        against_donor=against_donor(files.masks(folder / "validation"), files.truth, nnunet_folder(_RAW, files.dataset),
                                    dataset_json["labels"], segmentation_reader(plans)),
        adapter_mib=adapter.stat().st_size / 2**20 if adapter.is_file() else None,
        iterations_per_epoch=int(iterations) if iterations.isdigit() else None,
        machine=str(facts.get("gpu_name") or facts.get("device") or ""),
        warning=f"{stale} Predict them again: run the training's command with --val." if stale else "",
        date=date.fromtimestamp((folder / "checkpoint_final.pth").stat().st_mtime).isoformat())
    result = msgspec.convert(msgspec.structs.asdict(result), RunResult)  # the files may hold anything
    return Source(result=result, masks=folder / "validation", files=files)


def _draw(dataset: str, fold: int, dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields "shots", "all" and "seed" of a fold's result."""
    preprocessed = nnunet_folder(_PREPROCESSED, dataset)
    if preprocessed is None or not (preprocessed / "splits_final.json").is_file():
        raise ResultError(f"nnUNet_preprocessed/{dataset}/splits_final.json was not found ({_setting(_PREPROCESSED)}), "
                          f"so the number of training cases is unknown; set the variable as for the training.")
    splits = _json(preprocessed / "splits_final.json")
    if fold >= len(splits):
        raise ResultError(f"fold {fold} is not in {preprocessed / 'splits_final.json'}, which holds folds 0 to "
                          f"{len(splits) - 1}; the split was changed after the training.")
    train, val = splits[fold]["train"], splits[fold]["val"]
    known = {"shots": len(train), "all": len({*train, *val}) == dataset_json.get("numTraining"), "seed": fold}
    if (shots := preprocessed / "shots.json").is_file():
        for drawn in _json(shots)["folds"]:
            if drawn["fold"] == fold and sorted(drawn["train"]) == sorted(train):
                known |= {"all": drawn["all"], "seed": drawn["seed"]}
    return known


def score_masks(folder: Path, files: CaseFiles, plans: Mapping[str, Any], *, tolerance_mm: float) -> CaseScores:
    """Score every predicted mask in a folder against the true mask of its case.

    Raises:
        ResultError: the folder holds no mask, a file was cut off, or a mask has another shape than its truth.
    """
    predictions = files.masks(folder)
    if not predictions:
        raise ResultError(f"{folder} holds no predictions *{files.ending}; let nnU-Net write them: nnUNetv2_train with "
                          f"the same arguments and --val.")
    read, undrawn, scores = segmentation_reader(plans), files.undrawn, {}
    for case, prediction in predictions.items():
        pair = files.truth(case), prediction
        if cut := [file for file in pair if is_cut(file)]:
            raise ResultError(f"{cut[0]} was cut off; copy it again, or let nnU-Net predict again with --val.")
        (truth, spacing_mm), (mask, _) = map(read, pair)
        if mask.shape != truth.shape:
            raise ResultError(f"{prediction} has shape {mask.shape}, its truth {truth.shape}; the labels were changed "
                              f"after the training: predict again.")
        labels = {name: v for name, v in files.content["labels"].items() if name not in undrawn.get(case, ())}
        scores[case] = score(np.rint(truth).astype(int), np.rint(mask).astype(int), tolerance_mm=tolerance_mm,
                             labels=labels, spacing_mm=spacing_mm)
    return scores


def _protocol(folder: Path) -> list[Source]:
    """Return the runs of a protocol, with their masks and data sets if these are still there."""
    models = {model.name.split("__")[1]: model for model in (folder / "nnUNet_results").glob("*/*__*__*")}
    sources: list[Source] = []
    for file in sorted((folder / "runs").glob("*.json")):
        model, masks = models.get(file.stem.replace("__", "-")), folder / "predictions" / file.stem
        files = None
        if model is not None and (model / "dataset.json").is_file():
            files = CaseFiles(dataset=model.parent.name, content=_json(model / "dataset.json"))
        sources += [Source(result=result, masks=masks if masks.is_dir() else None, files=files)
                    for result in read_results(file)]
    if not sources:
        raise ResultError(f"{folder / 'runs'} holds no results; run the protocol first: nnunet-dante benchmark.")
    return sources


def _told_apart(folds: Sequence[tuple[str, Source]]) -> list[Source]:
    """Return the sources; where several would have the same name, the method names plans and configuration.

    folds: (name of the model folder, source) of each fold.
    """
    def key(source: Source) -> tuple:
        return source.result.experiment, source.result.method, shots_of(source.result), source.result.seed

    counts = Counter(key(source) for _, source in folds)
    doubled = {key(source)[:2] for _, source in folds if counts[key(source)] > 1}
    told = []
    for model, source in folds:
        if key(source)[:2] in doubled:
            _, plans, configuration = model.split("__")
            source = replace(source, result=msgspec.structs.replace(
                source.result, method=f"{source.result.method} ({plans}, {configuration})"))
        told.append(source)
    return told


def _setting(variable: str) -> str:
    return f"{variable} is {os.environ.get(variable, '')!r}"


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise ResultError(f"{file} cannot be read ({error}); nnU-Net writes it when a training starts.") from error
