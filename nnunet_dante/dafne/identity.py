"""Which models may be merged: the same `model_id` for all descendants of one set of weights, and for no others."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DafneError
from ..models.donor import Donor
from ..types import PathLike
from .model_file import open_model

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "model.nnunet-dante")
MUST_AGREE = ("architecture", "spacing_mm", "transpose", "normalization", "orientation", "as_shown", "channels",
               "labels", "region_order")


def structure_id(settings: Mapping[str, Any]) -> str:
    """UUID of all that must agree for two sets of weights to be averaged and still mean something."""
    return str(uuid.uuid5(_NAMESPACE, json.dumps({key: settings[key] for key in MUST_AGREE}, sort_keys=True)))


def model_id(donor: Donor, settings: Mapping[str, Any], *, base: PathLike | None) -> tuple[str, str]:
    """Return the model_id and where it is from.

    In this order: that of `base`; that of the .model file which was imported, learned on or not; one made from the
    checkpoint that a transfer started from; one made from the donor's own checkpoint.

    Raises:
        DafneError: `base` differs in what must agree.
    """
    structure = structure_id(settings)
    if base is not None:
        parent = open_model(base)
        if differing := [key for key in MUST_AGREE if settings[key] != parent.settings.get(key)]:
            raise DafneError(
                f"This model cannot be merged with {Path(base).name}: they differ in {', '.join(differing)} "
                f"({differing[0]}: here {settings[differing[0]]}, there {parent.settings.get(differing[0])}). "
                "Choose the same options as for the base, or leave --base out.")
        return parent.model_id, f"inherited from {Path(base).name}"
    came_back = donor.plans.get("dafne")
    if isinstance(came_back, dict) and came_back.get("structure") == structure:
        return str(came_back["model_id"]), "that of the .model file it was imported from"
    ancestor = donor.started_from
    root = ancestor.get("sha256", donor.sha256)
    whose = f"shared by all descendants of {ancestor['source']}" if ancestor else "its own; descendants will share it"
    return str(uuid.uuid5(_NAMESPACE, root + structure)), whose
