"""Where weights come from: load the start weights of a transfer, and describe a training for its checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import __version__
from ..adapters.file import are_tensors
from ..errors import ConfigurationError
from ..methods import ParameterEfficient
from ..models.checkpoint import file_sha256, load_checkpoint_safely
from ..models.labels import channel_names, head_names
from ..peft.added_modules import is_added
from ..peft.inject import factors, settings
from ..types import DatasetJson

if TYPE_CHECKING:
    from .trainer import DanteMixin


def provenance(trainer: DanteMixin) -> dict:
    """Return the block "dante" of a checkpoint: method, donor, label map, score before training, cost, and adapter.

    It holds only numbers, strings, lists, dicts and tensors, so that the checkpoint can be read with weights_only=True.
    """
    method, entry = trainer.run_method, trainer.start_entry or {}
    block = {
        "format": 1,
        "version": __version__,
        "method": type(method).__name__,
        "options": dataclasses.asdict(method),
        "start_source": trainer.start_source,
        "start_dice": trainer.start_dice,
        "stages": [(stage.first_epoch, stage.trainable) for stage in trainer.training_plan.schedule.stages],
        "start_weights": entry.get("sha256"),
        "donor": entry.get("donor"),
        "label_map": entry.get("label_map"),
        "trainable_parameters": trainer.audit.trainable,
        "total_parameters": trainer.audit.total,
        "peak_memory_mib": trainer.memory.peak_mib(),
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


def refuse_other_names(entry: dict, dataset_json: DatasetJson) -> None:
    """Refuse a data set whose labels or channels differ, in number or order, from those of the start weights.

    The rows of the head are in the order of the labels. If two names were exchanged, the weights would still fit, but
    each organ would start from the weights of the other.

    entry: "start_weights" of the plans for the configuration.

    Raises:
        ConfigurationError: they differ.
    """
    for what, key, now in (("labels", "label_map", head_names(dataset_json)),
                           ("channels", "channel_map", channel_names(dataset_json))):
        if (then := entry.get(key)) and list(then) != list(dict.fromkeys(now)):
            raise ConfigurationError(f"dataset.json has the {what} {', '.join(now)}; the start weights are for "
                                     f"{', '.join(then)}. Put dataset.json back as it was, or run `nnunet-dante "
                                     f"transfer` again.")


def load_start_weights(network: nn.Module, folder: Path, entry: dict) -> None:
    """Load start weights into a network.

    network: the network that the plans describe; it is changed in place.
    folder: the folder of the data set in nnUNet_preprocessed.
    entry: "start_weights" of the plans for the configuration; it names the file.

    Raises:
        ConfigurationError: the file is missing, is not the one for which the plans were written, or does not fit.
    """
    file = folder / entry["file"]
    if not file.is_file():
        raise ConfigurationError(f"the plans name the start weights {entry['file']!r}, but {folder} does not hold "
                                 f"them; run `nnunet-dante transfer` again.")
    if (found := file_sha256(file)) != entry["sha256"]:
        raise ConfigurationError(f"{file} has sha256 {found[:12]}..., the plans were written for "
                                 f"{entry['sha256'][:12]}...; run `nnunet-dante transfer` again.")
    weights: Any = load_checkpoint_safely(file).get("network_weights")
    if not are_tensors(weights):
        raise ConfigurationError(f"{file} holds no network_weights; run `nnunet-dante transfer` again.")
    if foreign := [key for key in weights if is_added(key) and key not in network.state_dict()]:
        trainer = entry["donor"]["trainer"]
        raise ConfigurationError(f"{file.name} holds modules that this network lacks, such as {foreign[0]}; its donor "
                                 f"was trained with {trainer}. Train with -tr {trainer}.")
    try:
        network.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:  # torch splits names at their dots
        raise ConfigurationError(f"{file} does not fit the network that the plans describe: {error}. Do not edit the "
                                 f"architecture after a transfer; run `nnunet-dante transfer` again.") from error
