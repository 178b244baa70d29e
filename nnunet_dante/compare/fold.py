"""A finished training in nnU-Net's results folder, read as the result of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.compressed import is_cut
from ..datasets.segmentation import segmentation_reader
from ..errors import DanteError, ResultError
from ..files import read_json
from ..models.checkpoint import load_checkpoint_safely
from .metrics import score
from .results import CaseScores, RunResult
from .training_log import read_training_log

_PREPROCESSED, _RAW = "nnUNet_preprocessed", "nnUNet_raw"


def read_fold(folder: Path, *, tolerance_mm: float = 2.0) -> RunResult:
    """Score the validation predictions of TRAINER__PLANS__CONFIGURATION/fold_X and read what its training cost.

    The truth is nnUNet_preprocessed/DATASET/gt_segmentations or nnUNet_raw/DATASET/labelsTr. Training cases and seed
    are those of the fold in splits_final.json and, where there is one, shots.json.

    Raises:
        ResultError: the folder is no finished fold, or truth or predictions are missing or damaged; says which.
    """
    folder = Path(folder).resolve()
    try:
        return _read_fold(folder, tolerance_mm)
    except DanteError:
        raise
    except Exception as error:  # whatever nnU-Net and its image libraries raise on damaged files
        raise ResultError(f"{folder} cannot be compared: one of its files, or of its data set's, is damaged "
                          f"({type(error).__name__}: {str(error)[:300]}). Copy them again.") from error


def _read_fold(folder: Path, tolerance_mm: float) -> RunResult:
    parts = folder.parent.name.split("__")
    if len(parts) != 3 or not folder.name.startswith("fold_") or not (folder / "checkpoint_final.pth").is_file():
        raise ResultError(f"{folder} is no finished fold of nnU-Net: it must be TRAINER__PLANS__CONFIGURATION/fold_X "
                          f"and hold checkpoint_final.pth. A protocol's folder holds runs/*.json instead.")
    if folder.name == "fold_all":
        raise ResultError(f"{folder} was validated on the cases it was trained on, which says nothing about new ones; "
                          f"compare folds with a validation set of their own.")
    dataset_json, plans = (_json(folder.parent / name) for name in ("dataset.json", "plans.json"))
    dataset = plans.get("dataset_name") or folder.parent.parent.name
    log = read_training_log(folder)
    dante = load_checkpoint_safely(folder / "checkpoint_final.pth").get("dante") or {}
    adapter, debug = folder / "adapter.safetensors", folder / "debug.json"
    facts = _json(debug) if debug.is_file() else {}
    iterations = str(facts.get("num_iterations_per_epoch", ""))
    return RunResult(
        experiment=dataset, donor=(dante.get("donor") or {}).get("source", ""), tolerance_mm=tolerance_mm,
        method=parts[0].removeprefix("nnUNetTrainer") or "nnU-Net", trainer=parts[0],
        **_draw(dataset, int(folder.name.removeprefix("fold_")), dataset_json),
        cases=_scores(folder, dataset, dataset_json, plans, tolerance_mm), start_dice=log.start_dice,
        curve=log.mean_dice.tolist(), seconds=log.seconds.tolist(), stages=log.stages,
        trained_parameters=dante.get("trainable_parameters"), total_parameters=dante.get("total_parameters"),
        adapter_mib=adapter.stat().st_size / 2**20 if adapter.is_file() else None,
        iterations_per_epoch=int(iterations) if iterations.isdigit() else None,
        machine=str(facts.get("gpu_name") or facts.get("device") or ""),
        date=date.fromtimestamp((folder / "checkpoint_final.pth").stat().st_mtime).isoformat())


def nnunet_folder(variable: str, dataset: str) -> Path | None:
    """Return a data set's folder below the folder that an environment variable of nnU-Net names, if it exists."""
    if Path(dataset).name != dataset:  # plans name it, and must not lead elsewhere
        return None
    folder = Path(os.environ.get(variable, ""), dataset)
    return folder if os.environ.get(variable) and folder.is_dir() else None


def _draw(dataset: str, fold: int, dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return shots, all and seed of a fold."""
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


def _scores(folder: Path, dataset: str, dataset_json: Mapping[str, Any], plans: Mapping[str, Any],
            tolerance_mm: float) -> CaseScores:
    ending = dataset_json["file_ending"]
    predictions = sorted((folder / "validation").glob(f"*{ending}"))
    if not predictions:
        raise ResultError(f"{folder / 'validation'} holds no predictions *{ending}; let nnU-Net write them: "
                          f"nnUNetv2_train with the same arguments and --val.")
    read, scores = segmentation_reader(plans), {}
    for prediction in predictions:
        files = truth_file(dataset, prediction.name), prediction
        if cut := [file for file in files if is_cut(file)]:
            raise ResultError(f"{cut[0]} was cut off; copy it again, or let nnU-Net predict again with --val.")
        (truth, spacing_mm), (mask, _) = map(read, files)
        if mask.shape != truth.shape:
            raise ResultError(f"{prediction} has shape {mask.shape}, its truth {truth.shape}; the labels were changed "
                              f"after the training: predict again.")
        scores[prediction.name.removesuffix(ending)] = score(
            np.rint(truth).astype(int), np.rint(mask).astype(int), labels=dataset_json["labels"],
            spacing_mm=spacing_mm, tolerance_mm=tolerance_mm)
    return scores


def truth_file(dataset: str, name: str) -> Path:
    """Return the mask of a training case.

    Raises:
        ResultError: it is in neither of nnU-Net's folders.
    """
    for variable, below in ((_PREPROCESSED, "gt_segmentations"), (_RAW, "labelsTr")):
        folder = nnunet_folder(variable, dataset)
        if folder is not None and (folder / below / name).is_file():
            return folder / below / name
    raise ResultError(f"the truth of {name} is neither in nnUNet_preprocessed/{dataset}/gt_segmentations nor in "
                      f"nnUNet_raw/{dataset}/labelsTr ({_setting(_PREPROCESSED)}, {_setting(_RAW)}); set the variables "
                      f"as for the training.")


def _setting(variable: str) -> str:
    return f"{variable} is {os.environ.get(variable, '')!r}"


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise ResultError(f"{file} cannot be read ({error}); nnU-Net writes it when a training starts.") from error
