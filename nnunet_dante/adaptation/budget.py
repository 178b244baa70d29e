"""How long a training may be: measure a training step, and divide the time that the user gives."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigurationError
from ..files import read_json
from ..models.memory import PeakMemory
from ..training.launch import VARIABLE, search_path
from ..training.trainers import end_loaders, find_trainer

EPOCHS = 50
MOST_STEPS = 25_000  # of a training with the trainers' own numbers
FEWEST_STEPS = 50
_VALIDATION_SHARE = 0.2  # validation steps per training step
_TRAINING_SHARE = 0.8  # of the budget; the rest is for choosing the strength, validation and the report
_SHORTEST_EPOCH = 10  # steps; an epoch has a fixed cost besides
_DISTANCE, _FASTEST = 4.0, 0.003  # steps times learning rate; a learning rate (benchmarks/hippocampus/rates.toml)
_MEASURED_SECONDS, _MOST_MEASURED = 10.0, 30


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long every training is; the names are those of the trainers' options."""

    epochs: int
    iterations: int
    val_iterations: int


def measure(dataset: str, configuration: str, plans: str, trainer: str, fold: str, device: str) -> None:
    """Print the cost of a training step and the trainer's learning rate as JSON; takes some seconds, leaves no files.

    The step is one of the last epoch, when methods that open the network in stages train all of it. Another name of the
    plans keeps it away from the results of real trainings.
    """
    os.environ[VARIABLE] = search_path()
    folder = Path(os.environ["nnUNet_preprocessed"], dataset)  # noqa: SIM112 - nnU-Net's name
    training = find_trainer(trainer)(
        plans=read_json(folder / f"{plans}.json") | {"plans_name": f"{plans}Measured", "continue_training": False},
        configuration=configuration, fold=fold if fold == "all" else int(fold),
        dataset_json=read_json(folder / "dataset.json"), device=torch.device(device))
    training.initialize()
    training.num_val_iterations_per_epoch = 1
    try:
        training.on_train_start()
        training.current_epoch = training.num_epochs - 1
        memory = PeakMemory(training.device)
        training.on_train_epoch_start()
        times: list[float] = []
        while len(times) < 3 or (sum(times) < _MEASURED_SECONDS and len(times) < _MOST_MEASURED):
            began = time.perf_counter()
            training.train_step(next(training.dataloader_train))
            times.append(time.perf_counter() - began)
    finally:
        end_loaders(training)
        shutil.rmtree(training.output_folder_base, ignore_errors=True)
    usual = sorted(times[1:])[len(times[1:]) // 2]  # the first step loads libraries
    print(json.dumps({"step_seconds": usual, "mib": memory.peak_mib(), "lr": training.initial_lr}))


def minutes(text: str) -> float:
    """Return a time such as "30min", "2h" or "90s" in minutes.

    Raises:
        ConfigurationError: the text is no such time.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(h|min|s)", text.strip())
    if not found or not (value := float(found[1]) * {"h": 60, "min": 1, "s": 1 / 60}[found[2]]):
        raise ConfigurationError(f"--budget is {text!r}; give a time such as 30min, 2h or 90s.")
    return value


def length_for(minutes: float, trainings: int, *, step_seconds: float, start_seconds: float) -> Length:
    """Return the length of each of `trainings` trainings that together fit into a number of minutes.

    step_seconds: time of one training step. start_seconds: time until the first step of a training.

    Raises:
        ConfigurationError: the time is too short for any training worth the name; says how much is needed.
    """
    step = step_seconds * (1 + _VALIDATION_SHARE / 2)  # a validation step goes forward only
    steps = int((_TRAINING_SHARE * 60 * minutes / trainings - start_seconds) / step)
    if steps < FEWEST_STEPS:
        needed = trainings * (start_seconds + FEWEST_STEPS * step) / 60 / _TRAINING_SHARE
        raise ConfigurationError(
            f"--budget {minutes:g}min leaves {max(0, steps)} steps for each of {trainings} trainings, with "
            f"{step_seconds:.2g} s a step and {start_seconds:.0f} s to start; fewer than {FEWEST_STEPS} teach nothing. "
            f"Give at least {math.ceil(needed)}min, or use a faster device.")
    steps = min(steps, MOST_STEPS)
    iterations = max(_SHORTEST_EPOCH, math.ceil(steps / EPOCHS))
    return Length(epochs=steps // iterations, iterations=iterations,
                  val_iterations=max(1, round(_VALIDATION_SHARE * iterations)))


def faster_rate(length: Length) -> float:
    """Return the learning rate that trainings of this length need, if the trainer's own one is lower.

    AdamW moves a weight by about the learning rate in each step, so that few steps with the usual 0.001 lead nowhere.
    From 4000 steps on it is 0.001; below, steps times rate stays the same, until the rate is 0.003.
    """
    return min(_FASTEST, _DISTANCE / (length.epochs * length.iterations))


def minutes_for(length: Length, trainings: int, *, step_seconds: float, start_seconds: float) -> float:
    """Return about how many minutes trainings of this length take together; the inverse of `length_for`."""
    seconds = length.epochs * step_seconds * (length.iterations + length.val_iterations / 2)
    return trainings * (start_seconds + seconds) / 60 / _TRAINING_SHARE


def memory_in_words(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return in words the most memory of a training, and how it is known; "" where it is unknown.

    entries: of the record, with "gib"; those with "mib" say whether it was measured (None: nnU-Net's estimate).
    """
    known = [entry["gib"] for entry in entries if entry.get("gib") is not None]
    estimated = any("mib" in entry and entry["mib"] is None for entry in entries)
    what = "by nnU-Net's estimate" if estimated else "measured"
    return f", {max(known):.2g} GiB of memory for the network ({what}, without the libraries)" if known else ""
