"""Running nnU-Net's own training command with this package's trainers in its search path."""

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
    """Return the folder with the trainer module: inside an installed package, beside it in a source checkout."""
    package = Path(nnunet_dante.__file__).parent
    for folder in (package / "trainers", package.parent / "trainers"):
        if (folder / "nnunet_dante_trainers.py").is_file():
            return folder
    raise ConfigurationError(f"no trainers folder inside or beside {package}; the installation is incomplete: install "
                             f"nnunet-dante again.")


def search_path() -> str:
    """Return nnUNet_extTrainer with this package's folder first, and whatever it held before."""
    ours = str(trainers_folder())
    others = [p for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p and p != ours]
    return os.pathsep.join([ours, *others])


def export_line() -> str:
    """Return the line for the shell that makes nnU-Net's own commands find the trainers."""
    if os.name == "nt":
        return f'$env:{VARIABLE} = "{search_path()}"'
    return f'export {VARIABLE}="{search_path()}"'


def device_option() -> tuple[str, ...]:
    """Return the `-device` words that a printed command needs on this machine; none where torch finds a CUDA GPU."""
    import torch

    if torch.cuda.is_available():
        return ()
    return "-device", "mps" if torch.backends.mps.is_available() else "cpu"


def train_command(dataset: str, configuration: str, fold: str, *, plans: str, trainer: str) -> str:
    """Return the training command as it is printed. `dataset` is the full name, as two data sets may share a number."""
    return shlex.join(["nnunet-dante", "train", dataset, configuration, fold, "-p", plans, "-tr", trainer,
                       *device_option()])


def train(arguments: Sequence[str]) -> None:
    """Run `nnUNetv2_train` with `arguments` in this process, after looking for what commonly goes wrong.

    Raises:
        ConfigurationError: an argument, environment variable or file would stop the training; the message says what
            to do.
    """
    os.environ[VARIABLE] = search_path()
    from .checks import check_arguments

    check_arguments(arguments)
    from nnunetv2.run.run_training import run_training_entry

    sys.argv = ["nnUNetv2_train", *arguments]
    run_training_entry()
