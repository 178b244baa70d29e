"""Which models may be merged: the same `model_id` for all descendants of one set of weights, and for no others."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DafneError
from ..models.checkpoint import file_sha256, load_checkpoint_safely
from ..models.donor import Donor, unpack, unpacks_to_model
from ..types import PathLike
from .model_file import open_model

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "model.nnunet-dante")
MUST_AGREE = ("architecture", "spacing_mm", "transpose", "normalization", "orientation", "as_shown", "channels",
               "labels", "region_order")


def structure_id(settings: Mapping[str, Any]) -> str:
    """UUID of all that must agree for two sets of weights to be averaged and still mean something."""
    return str(uuid.uuid5(_NAMESPACE, json.dumps({key: settings[key] for key in MUST_AGREE}, sort_keys=True)))


def model_id(donor: Donor, source: Path, settings: Mapping[str, Any], *, base: PathLike | None,
             trust: bool = False) -> tuple[str, str]:
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
    ancestor = _start(donor, source, trust)
    root = ancestor.get("sha256", donor.sha256)
    whose = f"shared by all descendants of {ancestor['source']}" if ancestor else "its own; descendants will share it"
    return str(uuid.uuid5(_NAMESPACE, root + structure)), whose


def _start(donor: Donor, source: Path, trust: bool) -> dict[str, str]:
    """Provenance of the donor that a transfer started this model from; {} if it started otherwise."""
    if not donor.plans.get("dante"):
        return {}
    if source.is_file() and unpacks_to_model(source):
        with tempfile.TemporaryDirectory() as folder:
            unpack(source, Path(folder), checkpoint=donor.checkpoint_name)
            return _start(donor, Path(folder), trust)
    for path in [source] if source.is_file() else sorted(source.rglob(donor.checkpoint_name)):
        if file_sha256(path) == donor.sha256:  # a folder or zip may hold several folds and configurations
            block = load_checkpoint_safely(path, trust=trust).get("dante")
            known = isinstance(block, dict) and block.get("start_source") == "transfer" and block.get("donor")
            return known if isinstance(known, dict) and "sha256" in known else {}
    return {}
