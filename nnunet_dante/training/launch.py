"""Run nnU-Net's own training command so that it finds the trainers of this package."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import nnunet_dante

from ..errors import ConfigurationError

VARIABLE = "nnUNet_extTrainer"


def trainers_folder() -> Path:
    """Return the folder with the trainers: inside the installed package, or beside it in a clone of the repository."""
    package = Path(nnunet_dante.__file__).parent
    for folder in (package / "trainers", package.parent / "trainers"):
        if (folder / "nnunet_dante_trainers.py").is_file():
            return folder
    raise ConfigurationError(f"no trainers folder inside or beside {package}; the installation is incomplete: install "
                             f"nnunet-dante again.")


def search_path() -> str:
    """Return the value of nnUNet_extTrainer with this package's folder in front of those that it already holds."""
    ours = str(trainers_folder())
    others = [p for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p and p != ours]
    return os.pathsep.join([ours, *others])


def export_line() -> str:
    """Return a line for the shell; after it, nnU-Net's own commands find the trainers."""
    if os.name == "nt":
        return f'$env:{VARIABLE} = "{search_path()}"'
    return f'export {VARIABLE}="{search_path()}"'


def best_device() -> str:
    """Return the fastest device that torch finds on this machine: cuda, mps or cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def device_option() -> tuple[str, ...]:
    """Return the option `-device` for printed commands; it is empty if torch finds a CUDA GPU on this machine."""
    return () if (device := best_device()) == "cuda" else ("-device", device)


def train_command(dataset: str, configuration: str, fold: str, *, plans: str, trainer: str) -> str:
    """Return the training command to print. `dataset` is the full name, because two data sets may share a number."""
    return shlex.join(["nnunet-dante", "train", dataset, configuration, fold, "-p", plans, "-tr", trainer,
                       *device_option()])


def train(arguments: Sequence[str]) -> None:
    """Run `nnUNetv2_train` with `arguments` in this process, after a check for common mistakes.

    Raises:
        ConfigurationError: an argument, environment variable or file would stop the training; the message says what
            to do.
    """
    os.environ[VARIABLE] = search_path()
    from .checks import check_arguments

    for warning in check_arguments(arguments):
        print(f"! {warning}", file=sys.stderr)
    from nnunetv2.run import run_training

    from .trainers import find_trainer

    run_training.recursive_find_trainer_class_by_name = find_trainer
    sys.argv = ["nnUNetv2_train", *arguments]
    run_training.run_training_entry()
