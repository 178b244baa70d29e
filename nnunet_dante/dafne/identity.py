"""Which models may be merged: the same `model_id` for all descendants of one set of weights, and for no others."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DafneError
from ..nnunet.checkpoint import load_checkpoint_safely
from ..nnunet.donor import Donor
from ..types import PathLike
from .model_file import open_model

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "model.nnunet-dante")
_MUST_AGREE = ("architecture", "spacing_mm", "transpose", "normalization", "orientation", "as_shown", "channels",
               "labels", "region_order")


def structure_id(settings: Mapping[str, Any]) -> str:
    """UUID of all that must agree for two sets of weights to be averaged and still mean something."""
    return str(uuid.uuid5(_NAMESPACE, json.dumps({key: settings[key] for key in _MUST_AGREE}, sort_keys=True)))


def model_id(donor: Donor, source: Path, settings: Mapping[str, Any], *, base: PathLike | None) -> tuple[str, str]:
    """Return the model_id and where it is from.

    In this order: that of `base`; that of the .model file which was imported, learned on or not; one made from the
    checkpoint that a transfer started from; one made from the donor's own checkpoint.

    Raises:
        DafneError: `base` differs in what must agree.
    """
    structure = structure_id(settings)
    if base is not None:
        parent = open_model(base)
        if differing := [key for key in _MUST_AGREE if settings[key] != parent.settings.get(key)]:
            raise DafneError(
                f"This model cannot be merged with {Path(base).name}: they differ in {', '.join(differing)} "
                f"({differing[0]}: here {settings[differing[0]]}, there {parent.settings.get(differing[0])}). "
                "Choose the same options as for the base, or leave --base out.")
        return parent.model_id, f"inherited from {Path(base).name}"
    came_back = donor.plans.get("dafne")
    if isinstance(came_back, dict) and came_back.get("structure") == structure:
        return str(came_back["model_id"]), "that of the .model file it was imported from"
    ancestor = _start(donor, source)
    root = ancestor.get("sha256", donor.sha256)
    whose = f"shared by all descendants of {ancestor['source']}" if ancestor else "its own; descendants will share it"
    return str(uuid.uuid5(_NAMESPACE, root + structure)), whose


def _start(donor: Donor, source: Path) -> dict[str, str]:
    """Provenance of the donor that a transfer started this model from; {} if it started otherwise."""
    path = source / f"fold_{donor.fold}" / donor.checkpoint_name if source.is_dir() else source
    if not donor.plans.get("dante") or path.suffix != ".pth" or not path.is_file():
        return {}
    block = load_checkpoint_safely(path).get("dante")
    if not isinstance(block, dict) or block.get("start_source") != "transfer":
        return {}
    return block["donor"] if isinstance(block.get("donor"), dict) and "sha256" in block["donor"] else {}
