"""Which models Dafne may merge: all that descend from one set of weights get the same `model_id`, and no others do."""

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
    """Return a UUID of the settings in which two models must agree before averaging their weights makes sense."""
    return str(uuid.uuid5(_NAMESPACE, json.dumps({key: settings[key] for key in MUST_AGREE}, sort_keys=True)))


def model_id(donor: Donor, settings: Mapping[str, Any], *, base: PathLike | None) -> tuple[str, str]:
    """Return the model id, and in words where it comes from.

    The first of these that there is: the id of `base`; the id of the .model file that the model was imported from; an
    id made from the checkpoint that the transfer started from; an id made from the donor's own checkpoint.

    Raises:
        DafneError: `base` differs in something that must agree (`MUST_AGREE`).
    """
    structure = structure_id(settings)
    if base is not None:
        parent = open_model(base)
        if differing := [key for key in MUST_AGREE if settings[key] != parent.settings.get(key)]:
            raise DafneError(
                f"This model cannot be merged with {Path(base).name}: they differ in {', '.join(differing)} "
                f"({differing[0]}: here {settings[differing[0]]}, there {parent.settings.get(differing[0])}). "
                "Choose the same options as for the base, or leave --base out.")
        return parent.model_id, f"taken over from {Path(base).name}"
    came_back = donor.plans.get("dafne")
    if isinstance(came_back, dict) and came_back.get("structure") == structure:
        return str(came_back["model_id"]), "that of the .model file it was imported from"
    ancestor = donor.started_from
    root = ancestor.get("sha256", donor.sha256)
    same = "the same labels, channels, spacing, orientation and normalisation"
    whose = (f"all models that start from {ancestor['source']} and have {same} have it" if ancestor
             else f"a new one; models that start from this one and have {same} will have it, too")
    return str(uuid.uuid5(_NAMESPACE, root + structure)), whose
