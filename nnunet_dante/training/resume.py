"""What --c needs: a refusal where something has changed since the checkpoint, and the state of the random numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..errors import ConfigurationError
from ..methods import Method
from ..types import Plans

_DATASET_KEYS = ("labels", "regions_class_order", "channel_names", "modality", "file_ending")


def refuse_changes(checkpoint: Mapping[str, Any], file: str | Path, *, method: Method, plans: Plans,
                   dataset_json: Mapping[str, Any], steps: Mapping[str, int], cases: Mapping[str, str],
                   mirroring_axes: tuple[int, ...] | None) -> None:
    """Refuse to continue `checkpoint` with other options, start weights, plans, labels or cases than its own.

    nnU-Net reads all of these anew from the disk, without a look at the checkpoint's. More epochs are refused, too:
    learning rate, stages and size prior are functions of their number, so the epochs behind would have been others.
    A checkpoint of another package is not looked at. steps: "iterations" and "val_iterations" of an epoch. cases: what
    `describe_cases` returns for "training" and "validation". mirroring_axes: None for none, as nnU-Net has it.

    Raises:
        ConfigurationError: something differs; the message says what.
    """
    if not (dante := checkpoint.get("dante")):
        return
    then = checkpoint["init_args"]
    lines = [*_method(dante, method),
             *(f"{name} was {dante[name]}, is {now}" for name, now in steps.items() if dante.get(name, now) != now),
             *_mirroring(checkpoint.get("inference_allowed_mirroring_axes"), mirroring_axes),
             *_plans(then["plans"], plans, then["configuration"]),
             *(f"the {use} cases were {before}, are {cases.get(use)}"
               for use, before in (dante.get("cases") or {}).items() if cases.get(use) != before),
             *(f"{key} of dataset.json was {then['dataset_json'].get(key)}, is {dataset_json.get(key)}"
               for key in _DATASET_KEYS if then["dataset_json"].get(key) != dataset_json.get(key))]
    if lines:
        raise ConfigurationError(
            f"{Path(file).name} cannot be continued: since its training began, {'; '.join(lines)}. Put it back as it "
            f"was (nnunet-dante transfer writes it into the plans), or train anew without --c. --val still validates "
            f"it, and a finished model can be the MODEL of another transfer.")


def describe_cases(cases: Iterable[str]) -> str:
    """Return the number of cases and a hash of their names, which may be those of patients."""
    names = sorted(cases)
    return f"{len(names)} (sha256 of their names {hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]})"


def _method(dante: Mapping[str, Any], method: Method) -> Iterator[str]:
    if dante["method"] != type(method).__name__:
        yield f"the method was {dante['method']}, is {type(method).__name__}"
        return
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    for name, now in dataclasses.asdict(method).items():  # an option that came later was not there: its default then
        if (before := dante.get("options", {}).get(name, defaults[name])) != now:
            yield f"{name} was {before!r}, is {now!r}"


def _mirroring(then: tuple[int, ...] | None, now: tuple[int, ...] | None) -> Iterator[str]:
    if tuple(then or ()) != tuple(now or ()):
        yield (f"the mirroring axes were {then or 'none'}, are {now or 'none'} (versions up to 0.1.0 always mirrored "
               f"along all axes: transfer with --mirroring all continues their trainings)")


def _plans(then: Plans, now: Plans, configuration: str) -> Iterator[str]:
    skipped = ("configurations", "dante", "continue_training")
    yield from (f"{key} of the plans has changed" for key in sorted(then.keys() | now.keys())
                if key not in skipped and then.get(key) != now.get(key))
    old, new = (PlansManager(p).get_configuration(configuration).configuration for p in (then, now))
    yield from (f"{key} of configuration {configuration} was {old.get(key)}, is {new.get(key)}"
                for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))
    start = [p.get("dante", {}).get("start_weights", {}).get(configuration, {}) for p in (then, now)]
    if start[0].get("sha256") != start[1].get("sha256"):
        donors = [f"{entry.get('donor', {}).get('source', 'none')} (sha256 {str(entry.get('sha256'))[:12]})"
                  for entry in start]
        yield f"the start weights were {donors[0]}, are {donors[1]}"


def random_state() -> dict:
    """Return the state of Python's, numpy's and torch's generators (the GPUs' too)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss),
                  float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict) -> None:
    """Set all generators to a `random_state()`; GPUs only where their number is the same as then."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
