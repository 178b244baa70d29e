"""Look for common mistakes before `nnUNetv2_train` starts, because nnU-Net answers them with a traceback.

Only what certainly fails is refused. Everything else is left to nnU-Net.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import nnunetv2

from ..datasets.fingerprint import is_older
from ..datasets.images import case_files
from ..errors import ConfigurationError, DanteError
from ..files import NNUNET_FOLDERS, counted, nnunet_folder, read_json
from ..models.overrides import SEARCH_PATH
from ..models.settings import read_dante_block
from ..versions import torchvision_version

DEFAULT_PLANS = "nnUNetPlans"
_PREFIX = "nnUNetTrainer"


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """Check that a training with these arguments of `nnUNetv2_train` can start, and return warnings.

    Raises:
        ConfigurationError: it cannot; the message says what is wrong, what is there, and which command helps.
    """
    parser = argparse.ArgumentParser("nnunet-dante train", add_help=False, exit_on_error=False)
    for name in ("dataset", "configuration", "fold"):
        parser.add_argument(name)
    parser.add_argument("-tr", default="nnUNetTrainer")
    parser.add_argument("-p", default=DEFAULT_PLANS)
    parser.add_argument("-pretrained_weights")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-num_gpus")
    for name in ("--c", "--val", "--val_best", "--npz", "--disable_checkpointing"):
        parser.add_argument(name, action="store_true")
    if len(arguments) < 3 or {"-h", "--help"} & set(arguments):
        return []  # nnU-Net prints its own usage
    try:
        given, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return []
    _check_device(given.device)
    _check_folders()
    trainer = _trainer(given.tr)
    folder = _dataset_folder(given.dataset)
    plans = _plans(folder, given.p)
    _check_start(given, trainer, folder, plans)
    configuration = _configuration(given.configuration, plans)
    _check_preprocessed(folder, given, configuration)
    _check_fold(given.fold)
    if configuration.get("previous_stage"):
        _check_previous_stage(given, folder, plans, configuration)
    return list(_stale_data(folder / str(configuration.get("data_identifier"))))


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        other = "mps" if torch.backends.mps.is_available() else "cpu"
        raise ConfigurationError(f"torch finds no CUDA GPU on this machine, and nnU-Net trains on one by default: add "
                                 f"-device {other}.")


def _check_folders() -> None:
    for name in NNUNET_FOLDERS[1:]:
        if not os.environ.get(name):
            raise ConfigurationError(f'The environment variable {name} is not set; nnU-Net needs it: export '
                                     f'{name}="/folder/{name}". `nnunet-dante doctor` checks all of them.')


def _folder(name: str) -> Path:
    return Path(os.environ[name])


def _trainer(name: str) -> Any:
    from . import trainers

    try:
        found = trainers.find_trainer(name)
    except (RuntimeError, AssertionError):  # no such class, or one that is no trainer
        known = {*trainers.TRAINERS, *_classes_of_nnunet()}
        by_word = {_word(trainer): trainer for trainer in sorted(known)}
        near = [_word(name)] if _word(name) in by_word else get_close_matches(_word(name), by_word, cutoff=0.5)
        meant = f"Did you mean {' or '.join(by_word[word] for word in near)}? " if near else ""
        raise ConfigurationError(f"There is no trainer {name!r}. {meant}Trainers of your own must be in a folder of "
                                 f"nnUNet_extTrainer, {os.environ[SEARCH_PATH]}.") from None
    if found.__module__ == trainers.__name__:  # nnU-Net finds its own ones before it needs torchvision
        torchvision_version()
    return found


def _word(trainer: str) -> str:
    """Return what tells a trainer from the others, whether or not its letters are capital."""
    return trainer.lower().removeprefix(_PREFIX.lower())


def _classes_of_nnunet() -> Iterable[str]:
    for file in Path(nnunetv2.__path__[0], "training", "nnUNetTrainer").rglob("*.py"):
        yield from re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)


def _dataset_folder(dataset: str) -> Path:
    """Return the data set's folder in nnUNet_preprocessed; a number is looked up as in nnU-Net."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    root = _folder("nnUNet_preprocessed")
    there = ", ".join(sorted(p.name for p in root.glob("Dataset*"))) or "none"
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        reason = str(error).split(". ")[0]
        raise ConfigurationError(f"nnU-Net does not know which data set {dataset!r} is: {reason}. Give its full name; "
                                 f"preprocessed are: {there}.") from None
    if not (root / name).is_dir():
        raise ConfigurationError(f"{root} holds no {name}; it holds: {there}. Run `nnunet-dante transfer MODEL -d "
                                 f"{name} --preprocess` first.")
    return root / name


def _plans(folder: Path, name: str) -> dict[str, Any]:
    file = folder / f"{name}.json"
    if not file.is_file():
        raise ConfigurationError(f"{folder.name} has no plans {name!r}; it has: {_plans_there(folder)}. Choose with "
                                 f"-p, or write plans with `nnunet-dante transfer MODEL -d {folder.name}`.")
    try:
        plans = read_json(file)
        if not isinstance(plans["configurations"], dict):
            raise TypeError("its configurations are no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{file} cannot be read as plans ({error!r}). Run `nnunet-dante transfer` again, or "
                                 "give other plans with -p.") from error
    return plans


def _plans_there(folder: Path) -> str:
    names = [file.stem for file in sorted(folder.glob("*.json")) if '"configurations"' in file.read_text("utf-8")]
    return ", ".join(names) or "none"


def _check_start(given: argparse.Namespace, trainer: Any, folder: Path, plans: dict[str, Any]) -> None:
    """Refuse plans without start weights if the trainer fine-tunes."""
    method = getattr(trainer, "method", None)
    if not getattr(method, "uses_start_weights", False) or given.pretrained_weights or given.c or given.val:
        return
    if given.configuration not in (found := read_dante_block(plans)["start_weights"]):
        said = f"for {', '.join(found)} only" if found else "for no configuration"
        raise ConfigurationError(f"{given.tr} fine-tunes, and the plans {given.p!r} hold start weights {said}. "
                                 f"{folder.name} has the plans {_plans_there(folder)}: choose with -p, or run "
                                 f"`nnunet-dante transfer MODEL -d {folder.name} -c {given.configuration}` and train "
                                 f"with -p nnUNetDantePlans.")


def _configuration(name: str, plans: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of the plans, with the entries that it inherits."""
    known = plans["configurations"]
    if name not in known:
        raise ConfigurationError(f"The plans {plans.get('plans_name')!r} hold no configuration {name!r}; they hold "
                                 f"{', '.join(known)}.")
    own = known[name]
    return {**(_configuration(own["inherits_from"], plans) if own.get("inherits_from") else {}), **own}


def _check_preprocessed(folder: Path, given: argparse.Namespace, configuration: dict[str, Any]) -> None:
    data = folder / str(configuration.get("data_identifier"))
    if not _cases(data):
        raise ConfigurationError(f"{data} holds no preprocessed cases. Run `nnUNetv2_preprocess -d {folder.name} "
                                 f"-plans_name {given.p} -c {given.configuration}` first.")


def _stale_data(data: Path) -> Iterator[str]:
    """Yield warnings if the images and masks in nnUNet_raw, where they are there, are not those of the data."""
    raw = nnunet_folder("nnUNet_raw", data.parent.name)
    try:
        cases = case_files(raw, read_json(raw / "dataset.json")) if raw else {}
        older = bool(cases) and is_older(data, cases)
    except (DanteError, OSError, ValueError, TypeError, KeyError):  # a training does not need them
        return
    if older:
        yield f"images or masks in {raw} were changed after {data.name} was preprocessed: preprocess again"
    if new := sorted(cases.keys() - _cases(data)):
        yield f"{data.name} lacks {counted(len(new), 'case')} of {raw}, such as {new[0]}: preprocess again"


def _cases(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.pkl")} if folder.is_dir() else set()


def _check_fold(fold: str) -> None:
    if fold != "all" and not fold.isdecimal():
        raise ConfigurationError(f"The fold is {fold!r}; it must be a number, or the word all.")


def _check_previous_stage(given: argparse.Namespace, folder: Path, plans: dict[str, Any],
                          configuration: dict[str, Any]) -> None:
    """Refuse to train a cascade's second stage if it lacks the first stage's prediction of a case."""
    stage = configuration["previous_stage"]
    made = Path(_folder("nnUNet_results"), folder.name, f"{given.tr}__{given.p}__{stage}", "predicted_next_stage",
                given.configuration)
    needed = _cases(folder / str(configuration.get("data_identifier")))
    if (splits := folder / "splits_final.json").is_file() and given.fold != "all":
        folds = read_json(splits)
        if int(given.fold) < len(folds):
            needed = {*folds[int(given.fold)]["train"], *folds[int(given.fold)]["val"]}
    if missing := needed - {file.stem for file in made.glob("*")}:
        raise ConfigurationError(f"{given.configuration} is the second stage of a cascade: it reads predictions of "
                                 f"{stage}, which {len(missing)} of {len(needed)} cases lack. A fold predicts its own "
                                 f"validation cases, so train every fold of {stage} with the same -tr {given.tr} and "
                                 f"-p {given.p}; they are written into {made}.")
