"""What a checkpoint says about its own making, under its key "dante"."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .. import __version__
from ..methods import ParameterEfficient
from ..peft.inject import factors, settings

if TYPE_CHECKING:
    from .trainer import DanteMixin


def provenance(trainer: DanteMixin) -> dict:
    """Return method, donor, label map, score before training, cost and, for methods of few numbers, the adapter.

    Everything is a number, string, list, dict or tensor, so the checkpoint loads with weights_only=True.
    """
    method, entry = trainer.run_method, trainer.start_entry or {}
    block = {
        "format": 1,
        "version": __version__,
        "method": type(method).__name__,
        "options": dataclasses.asdict(method),
        "start_source": trainer.start_source,
        "start_dice": trainer.start_dice,
        "start_weights": entry.get("sha256"),
        "donor": entry.get("donor"),
        "label_map": entry.get("label_map"),
        "trainable_parameters": trainer.audit.trainable,
        "total_parameters": trainer.audit.total,
        **trainer.steps,
        "cases": trainer.cases,
        "penalty": None if trainer.start_penalty is None else trainer.start_penalty.state(),
        "adapter": None,
    }
    if isinstance(method, ParameterEfficient):
        network = trainer.bare_network
        block |= {"base_sha256": trainer.base_sha256,
                  "adapter": {"base": trainer.base, "updates": settings(network),
                              "factors": {k: v.cpu().clone() for k, v in factors(network).items()}}}
    return block
