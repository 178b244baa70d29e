"""The "dante" block of a plans file: where a training starts, and the numbers it overrides.

    {"format": 1, "version": "...",
     "start_weights": {configuration: {"file", "sha256", "donor": {...}, "label_map", "channel_map",
                                       "mirroring_axes"}},
     "overrides": {"epochs", "iterations", "val_iterations", "lr", "rank", "alpha"}}   # only those given
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..errors import ConfigurationError
from ..types import Plans

FORMAT = 1
OVERRIDES = {"epochs": int, "iterations": int, "val_iterations": int, "lr": float, "rank": int, "alpha": float}


def new_dante_block(configuration: str, entry: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the block for one configuration's start weights."""
    return {"format": FORMAT, "version": __version__, "start_weights": {configuration: dict(entry)},
            "overrides": checked_overrides(overrides)}


def checked_overrides(overrides: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the given numbers (None counts as not given), positive and of the right kind.

    Raises:
        ConfigurationError: an unknown name or a value out of range.
    """
    checked: dict[str, int | float] = {}
    for name, value in overrides.items():
        if name not in OVERRIDES:
            raise ConfigurationError(f"Override {name!r} is unknown; allowed are {sorted(OVERRIDES)}.")
        if value is None:
            continue
        kind = OVERRIDES[name]
        valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
        if not valid or kind(value) != value:
            raise ConfigurationError(f"Override {name} is {value!r}; it must be a positive "
                                     f"{'whole number' if kind is int else 'number'}.")
        checked[name] = kind(value)
    return checked


def read_dante_block(plans: Plans) -> dict[str, Any]:
    """Return the plans' "dante" block, validated; without one, empty "start_weights" and "overrides".

    Raises:
        ConfigurationError: the block is damaged or of a newer format.
    """
    block = plans.get("dante")
    if block is None:
        return {"format": FORMAT, "version": __version__, "start_weights": {}, "overrides": {}}
    if not isinstance(block, dict) or block.get("format") != FORMAT:
        found = block.get("format") if isinstance(block, dict) else block
        raise ConfigurationError(f'The "dante" block of plans {plans.get("plans_name")!r} has format {found!r}; this '
                                 f"version ({__version__}) reads format {FORMAT}. Install a newer nnunet-dante, or run "
                                 "`nnunet-dante transfer` again.")
    entries = block.get("start_weights", {})
    parts = (entries, *(entries.values() if isinstance(entries, dict) else ()), block.get("overrides", {}),
             block.get("options", {}))
    if not all(isinstance(part, dict) for part in parts):
        raise ConfigurationError(f'The "dante" block of plans {plans.get("plans_name")!r} is damaged. Run '
                                 "`nnunet-dante transfer` again, into plans of another name (-p).")
    for configuration, entry in entries.items():
        file, sha256 = str(entry.get("file", "")), str(entry.get("sha256", ""))
        # Plans travel inside checkpoints: a file name from elsewhere must not lead out of the data set's folder.
        if not re.fullmatch(r"[^/\\]+\.pth", file) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ConfigurationError(f'The "dante" block names the start weights {file!r} (sha256 {sha256!r}) for '
                                     f"{configuration!r}; it needs a .pth file name without folders and 64 hex digits.")
    return {**block, "start_weights": entries, "overrides": checked_overrides(block.get("overrides", {}))}
