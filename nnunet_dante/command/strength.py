"""The strength of a finished training, looked at, chosen on other cases, or set: `nnunet-dante strength`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from ..adapters.adapter import extract
from ..adapters.strength import at_strength, interpolate, note_strength, stale_masks, trained_weights
from ..datasets.annotated import Undrawn, completed_labels, read_undrawn
from ..datasets.images import image_files
from ..errors import DanteError, StrengthError
from ..files import atomic_path, read_json
from ..models.checkpoint import load_checkpoint_safely, save_atomically
from ..training.launch import train_command
from ..training.strength import (
    balanced_dice,
    best_strength,
    by_origin,
    dice_of_labels,
    of_drawn,
    search,
    start_of,
    summary,
    unseen_cases,
)
from ..types import PathLike, ReadOnlyStateDict

_FINAL, _ADAPTER = "checkpoint_final.pth", "adapter.safetensors"


def set_strength(fold: PathLike, strength: float | None = None, *, cases: PathLike | None = None,
                 plot: PathLike | None = None) -> str:
    """Put a finished training at another strength and return what to tell the user; nothing of the training is lost.

    Args:
        fold: folder fold_X of a training that this package's trainers have finished.
        strength: the strength to set, 0 for the start weights, 1 for all that was learned. None takes the one with
            the highest mean Dice.
        cases: folder with imagesTr and labelsTr of labelled cases that were not trained on. By default what the
            training found on its validation cases holds; if it did not choose, they are predicted now.
        plot: PNG file for the curve of Dice over strength. Given alone, it is drawn of what is known, and nothing else
            is written.

    Raises:
        StrengthError: there is no finished training of this package, its start weights are gone, or no cases are found.
    """
    final = Path(fold) / _FINAL
    if strength is not None and cases is not None:
        raise StrengthError(f"strength {strength:g} and cases to choose it on were both given; give one of them.")
    if not final.is_file():
        raise StrengthError(f"{fold} holds no {_FINAL}; give the folder fold_X of a training that has ended.")
    checkpoint = load_checkpoint_safely(final)
    if not isinstance(checkpoint.get("dante"), dict):
        raise StrengthError(f"{final} is not of a training with one of nnunet-dante's trainers, so what it started "
                            "from is unknown.")
    try:
        if plot is not None and strength is None and cases is None:
            return _drawn(checkpoint["dante"].get("strength") or {}, plot)
        changed, said = _changed(Path(fold), checkpoint, strength, cases)
    except (DanteError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StrengthError(f"{final} is damaged: what it says of its training cannot be used ({type(error).__name__}: "
                            f"{error}). Copy it again.") from error
    if plot is not None:
        draw_curve(changed["dante"]["strength"], plot)
    note_strength(Path(fold), checkpoint)  # before the masks become those of another strength
    save_atomically(changed, final)
    if changed["dante"].get("adapter"):
        extract(final, final.with_name(_ADAPTER))
    if stale := stale_masks(Path(fold), changed):
        said += f"\n{stale} Predict them again: {_validation_command(Path(fold).resolve(), changed)}"
    return said


def _validation_command(fold: Path, checkpoint: Mapping[str, Any]) -> str:
    init = checkpoint["init_args"]
    trainer, _, rest = fold.parent.name.partition("__")  # TRAINER__PLANS__CONFIGURATION
    return train_command(init["plans"]["dataset_name"], init["configuration"], fold.name.removeprefix("fold_"),
                         plans=rest.partition("__")[0], trainer=trainer) + " --val"


def _drawn(facts: Mapping[str, Any], plot: PathLike) -> str:
    """Draw the curve that a checkpoint knows, and return how much it keeps."""
    draw_curve(facts, plot)
    strength, curve = facts["value"], {float(s): float(dice) for s, dice in facts["curve"]}
    return summary(strength, curve, facts["cases"]) if strength in curve else _kept(strength)


def _kept(strength: float) -> str:
    return f"{_FINAL} keeps {100 * strength:.0f} % of what was learned."


def _changed(fold: Path, checkpoint: Mapping[str, Any], strength: float | None,
             cases: PathLike | None) -> tuple[dict[str, Any], str]:
    """Return the checkpoint at the strength that is given or chosen, and a sentence about it."""
    start = start_of(checkpoint, fold=fold, folder=lambda: _folder("nnUNet_preprocessed", checkpoint))
    facts = {k: v for k, v in (checkpoint["dante"].get("strength") or {}).items() if k not in ("value", "trained")}
    training = facts.get("training", facts)  # what the training itself found, whatever was chosen since
    if strength is not None:
        facts = {**training, "rule": "given", "training": training}
        said = _kept(strength)
    else:
        if cases is not None:
            facts = {**_chosen(fold, checkpoint, start, cases), "training": training}
        else:
            facts = dict(training) if training.get("curve") else _chosen(fold, checkpoint, start, None)
        curve = {float(s): float(dice) for s, dice in facts["curve"]}
        strength = best_strength(curve)
        said = summary(strength, curve, facts["cases"])
    return at_strength(checkpoint, strength, start=start, facts=facts), said


def _chosen(fold: Path, checkpoint: Mapping[str, Any], start: ReadOnlyStateDict,
            folder: PathLike | None) -> dict[str, Any]:
    """Predict the cases at each strength of the search and return the facts about them."""
    root = Path(folder or _folder("nnUNet_raw", checkpoint))
    cases = dict(_cases(fold, checkpoint, root, validation=folder is None))
    completed = completed_labels(root, {} if folder else checkpoint["init_args"]["dataset_json"], cases)
    curve = search(_scorer(fold, checkpoint, start, cases, read_undrawn(root), completed))
    if any(map(math.isnan, curve.values())):
        raise StrengthError(f"no label is drawn in the cases {', '.join(sorted(cases))}, so no strength is better than "
                            "another. Give cases with labels.")
    return {"rule": "unseen cases" if folder is None else "other cases", "cases": len(cases),
            "curve": [[strength, dice] for strength, dice in curve.items()]}


def draw_curve(facts: Mapping[str, Any], file: PathLike) -> None:
    """Write a plot of Dice over strength as PNG, from what a checkpoint says of its strength.

    Raises:
        StrengthError: no curve is known, because the strength was given.
    """
    if not (curve := facts.get("curve")):
        raise StrengthError("there is no curve to plot: the strength was given, not chosen. Choose it: nnunet-dante "
                            "strength FOLD_FOLDER")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve), marker="o", color="tab:blue")
    kept = facts["value"]
    axes.axvline(kept, color="tab:orange", linestyle="--")
    left = kept > sum(axes.get_xlim()) / 2  # of the line, so that the words stay inside the axes
    axes.annotate(f"kept: {100 * kept:.0f} %", (kept, axes.get_ylim()[0]), xytext=(-4 if left else 4, 4),
                  textcoords="offset points", color="tab:orange", ha="right" if left else "left")
    axes.set(xlabel="strength (0: start weights, 1: all that was learned)",
             ylabel=f"mean Dice, {unseen_cases(facts['cases'])}")
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _folder(variable: str, checkpoint: Mapping[str, Any]) -> Path:
    if not (root := os.environ.get(variable)):
        raise StrengthError(f"{variable} is not set, and the data set of this training is looked for below it: export "
                            f'{variable}="/folder/{variable}".')
    return Path(root, checkpoint["init_args"]["plans"]["dataset_name"])


def _split(fold: Path, checkpoint: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the training and validation cases of the fold; fold `all` trains on every case."""
    number = fold.resolve().name.removeprefix("fold_")
    file = _folder("nnUNet_preprocessed", checkpoint) / "splits_final.json"
    if not number.isdecimal() or not file.is_file():
        raise StrengthError(f"{fold} was trained on all cases of its data set, or {file}, which names them, is gone. "
                            "Give other labelled cases with --cases.")
    return read_json(file)[int(number)]


def _cases(fold: Path, checkpoint: Mapping[str, Any], root: Path, *, validation: bool) -> Iterator[tuple[str, tuple]]:
    """Yield the name, image files and mask of each case in a folder to choose on, or only of the validation cases."""
    ending = checkpoint["init_args"]["dataset_json"]["file_ending"]
    own = "nnUNet_raw" in os.environ and root.resolve() == _folder("nnUNet_raw", checkpoint).resolve()
    split = _split(fold, checkpoint) if own else {"train": [], "val": []}
    there = [(case, (files, root / "labelsTr" / f"{case}{ending}"))
             for case, files in image_files(root / "imagesTr", ending).items()
             if (root / "labelsTr" / f"{case}{ending}").is_file() and case not in split["train"]
             and (not validation or case in split["val"])]
    if not there:
        raise StrengthError(f"{root} holds no labelled cases to choose on: it needs imagesTr/CASE_0000{ending} and "
                            f"labelsTr/CASE{ending}" + (" of cases that were not trained on" if own else "")
                            + ". Give cases that were not trained on with --cases.")
    yield from there


def _scorer(fold: Path, checkpoint: Mapping[str, Any], start: ReadOnlyStateDict, cases: Mapping[str, tuple],
            undrawn: Undrawn, completed: Undrawn) -> Any:
    """Return strength -> mean Dice over cases and labels of nnU-Net's prediction, without mirroring."""
    trained = trained_weights(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = nnUNetPredictor(use_mirroring=False, device=device, allow_tqdm=False,
                                perform_everything_on_device=device.type == "cuda")
    predictor.initialize_from_trained_model_folder(str(fold.parent), (fold.name.removeprefix("fold_"),), _FINAL)
    reader, labels = predictor.plans_manager.image_reader_writer_class(), predictor.label_manager

    def score(strength: float) -> float:
        predictor.list_of_parameters = [interpolate(start, trained, strength)]
        dice = []
        for case, (images, mask) in cases.items():
            data, properties = reader.read_images([str(file) for file in images])
            predicted = predictor.predict_single_npy_array(data, properties, None, None, False)
            found = of_drawn(dice_of_labels(reader.read_seg(str(mask))[0][0], predicted, labels),
                             predictor.dataset_json, undrawn.get(case, ()))
            dice.append(by_origin(found, predictor.dataset_json, completed[case]))
        return balanced_dice(dice)[0]

    return score
