"""The "dante" block of a plans file: where a training starts, and the numbers and options it overrides.

    {"format": 1, "version": "...",
     "start_weights": {configuration: {"file", "sha256", "donor": {...}, "label_map", "channel_map",
                                       "inverted_channels", "mirroring_axes", "network_trainer"}},
     "overrides": {"epochs", "iterations", "val_iterations", "lr", "rank", "alpha"},   # only those given
     "options": {...}}                                                                  # the others, only if given

Options stand apart because version 0.1.0 refuses overrides that it does not know; it reads these plans without them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..errors import ConfigurationError
from ..types import Plans
from .overrides import OVERRIDES, checked_overrides, known_overrides

FORMAT = 1


def new_dante_block(configuration: str, entry: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the block for one configuration's start weights."""
    return with_overrides({"format": FORMAT, "version": __version__, "start_weights": {configuration: dict(entry)}},
                          checked_overrides(overrides))


def with_overrides(block: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the block with exactly these overrides."""
    options = {name: value for name, value in overrides.items() if name not in OVERRIDES}
    block = {name: value for name, value in block.items() if name != "options"}
    return {**block, "overrides": {name: value for name, value in overrides.items() if name in OVERRIDES},
            **({"options": options} if options else {})}


def read_dante_block(plans: Plans) -> dict[str, Any]:
    """Return the plans' "dante" block, validated; without one, empty "start_weights" and "overrides".

    Its "overrides" hold the options, too. Names that no method of this version has are kept, unchecked: they may belong
    to a later version, or to a method of the user's own.

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
        axes = entry.get("mirroring_axes")  # None: unknown
        if axes is not None and not (isinstance(axes, list) and all(axis in (0, 1, 2) for axis in axes)):
            raise ConfigurationError(f'The "dante" block allows the mirroring axes {axes!r:.80} for {configuration!r}; '
                                     "possible are 0, 1 and 2. Run `nnunet-dante transfer` again.")
        file, sha256 = str(entry.get("file", "")), str(entry.get("sha256", ""))
        # Plans travel inside checkpoints: a file name from elsewhere must not lead out of the data set's folder.
        if not re.fullmatch(r"[^/\\]+\.pth", file) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ConfigurationError(f'The "dante" block names the start weights {file!r} (sha256 {sha256!r}) for '
                                     f"{configuration!r}; it needs a .pth file name without folders and 64 hex digits.")
    overrides = {**block.get("options", {}), **block.get("overrides", {})}
    unknown = {name: value for name, value in overrides.items() if name not in known_overrides()}
    known = checked_overrides({name: value for name, value in overrides.items() if name not in unknown})
    return {**{name: value for name, value in block.items() if name != "options"}, "start_weights": entries,
            "overrides": known | unknown}
