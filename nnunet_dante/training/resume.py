"""For --c: refuse to continue a training if something has changed, and store the state of the random numbers."""

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

    nnU-Net reads all of these again from the disk and does not compare them with the checkpoint. Another number of
    epochs is refused, too: learning rate, stages and size prior depend on it, so the epochs that are already done would
    have been different. Checkpoints of other packages are not checked.

    Args:
        checkpoint: content of the checkpoint.
        file: its file, for the message.
        method, plans, dataset_json: those of the training now.
        steps: {"iterations", "val_iterations"} of an epoch now.
        cases: what `describe_cases` returns now for "training" and "validation".
        mirroring_axes: axes of mirroring now; None for none, as in nnU-Net.

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
             *_cases(dante.get("cases") or {}, cases),
             *(f"{key} of dataset.json was {then['dataset_json'].get(key)}, is {dataset_json.get(key)}"
               for key in _DATASET_KEYS if then["dataset_json"].get(key) != dataset_json.get(key))]
    if lines:
        raise ConfigurationError(
            f"{Path(file).name} cannot be continued: since its training began, {'; '.join(lines)}. Undo this change "
            f"(nnunet-dante transfer writes options into the plans), or start a new training without --c. --val still "
            f"validates the checkpoint, and a finished model can be the MODEL of another transfer.")


def describe_cases(cases: Iterable[str]) -> str:
    """Return the number of cases and a hash of their names, which may be those of patients."""
    names = sorted(cases)
    return f"{len(names)} (sha256 of their names {hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]})"


def _method(dante: Mapping[str, Any], method: Method) -> Iterator[str]:
    if dante["method"] != type(method).__name__:
        yield f"the method was {dante['method']}, is {type(method).__name__}"
        return
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    for name, now in dataclasses.asdict(method).items():  # in an older checkpoint, a newer option has its default
        if name != "recompute" and (before := dante.get("options", {}).get(name, defaults[name])) != now:
            yield f"{name} was {before!r}, is {now!r}"


def _cases(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for use in {**then, **now} if then else {}:  # version 0.1.0 did not say
        if then.get(use) != now.get(use):
            yield f"the {use} cases were {then.get(use, 'none')}, are {now.get(use, 'none')}"


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
    """Return the state of the random number generators of Python, numpy and torch, also on GPUs."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss),
                  float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_random_state(state: dict) -> None:
    """Set all generators to the result of `random_state()`; those of GPUs only if there are as many GPUs as then."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    if state.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())
