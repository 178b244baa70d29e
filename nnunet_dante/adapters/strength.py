"""The strength of an update: how much of what a training changed stays in the network.

For every strength s from 0 to 1, `start + s (trained - start)` is a network as valid as its two ends (WiSE-FT, Wortsman
2022, arXiv 2109.01903): s = 0 is the start, s = 1 the trained network, both bit for bit.

A checkpoint with another strength than 1 still holds the trained weights, so that the strength can be changed later.
Weights that can be computed from factors (LoRA, DoRA, ConvAdapter) are not stored twice. Tensors that were trained in
full are stored under "dante" -> "strength" -> "trained".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import StrengthError
from ..files import read_json, write_text_atomically
from ..models.checkpoint import alias_sets, replaced, unique_tensors, weights_sha256
from ..peft.update import interpolated
from ..types import ReadOnlyStateDict, StateDict
from .adapter import updated_weight


def interpolate(start: ReadOnlyStateDict, trained: ReadOnlyStateDict, strength: float) -> StateDict:
    """Return the network between two networks with the same keys.

    Every floating-point tensor becomes start + strength * (trained - start), computed in float32: weights, biases,
    running statistics of BatchNorm, rows of new labels and added modules alike. Rows of new labels start where the
    transfer put them, added modules start without effect, so both ends stay what they are. Integer tensors (BatchNorm's
    counter of batches) are not interpolated: they are the start's at strength 0, else the trained network's. Keys that
    share one tensor still do.

    Args:
        start: state dict before the training.
        trained: state dict after it.
        strength: 0 returns `start`, 1 returns `trained`, both bit for bit; above 1 extrapolates.

    Raises:
        StrengthError: the strength is negative or no finite float32, or keys or shapes differ.
    """
    if not 0 <= strength <= torch.finfo(torch.float32).max:
        raise StrengthError(f"strength is {strength!r}; give 0 for the start, 1 for all that was learned, "
                            "or a number between.")
    if wrong := sorted(start.keys() ^ trained.keys()) or [k for k in start if start[k].shape != trained[k].shape]:
        raise StrengthError(f"start and trained weights are of different networks: {len(wrong)} tensors differ in name "
                            f"or shape, first {wrong[0]!r}. Give the start weights of this very training.")
    between: StateDict = {}
    for key, names in alias_sets(trained).items():
        between |= dict.fromkeys(names, interpolated(start[key], trained[key], strength))
    return {key: between[key] for key in trained}


def start_weights(checkpoint: Mapping[str, Any]) -> StateDict | None:
    """Return the weights before the training, if the checkpoint holds them: those of methods that train few numbers do.

    Raises:
        StrengthError: the checkpoint does not hold the start that it names.
    """
    dante = checkpoint.get("dante") or {}
    if not (adapter := dante.get("adapter")):
        return None
    weights = replaced(checkpoint["network_weights"], adapter["base"])
    if weights_sha256(weights) != dante.get("base_sha256"):
        raise StrengthError("the checkpoint does not hold the start weights that it names; it was changed after its "
                            "training. Use a copy from before.")
    return weights


def trained_weights(checkpoint: Mapping[str, Any]) -> StateDict:
    """Return the weights at the end of the training, whatever the strength of the checkpoint is."""
    weights, dante = checkpoint["network_weights"], checkpoint.get("dante") or {}
    if not (kept := dante.get("strength")) or kept["value"] == 1:
        return dict(weights)
    full = dict(kept["trained"])
    if adapter := dante.get("adapter"):
        full |= {name: updated_weight(adapter["base"][name], name, _at(settings, 1), adapter["factors"])
                 for name, settings in adapter["updates"].items()}
    return replaced(weights, full)


def at_strength(checkpoint: Mapping[str, Any], strength: float, *, start: ReadOnlyStateDict | None = None,
                facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a checkpoint of this package at another strength; its adapter keeps its factors and gets the strength.

    Args:
        checkpoint: content of a checkpoint, at any strength.
        strength: 0 for the start, 1 for all that was learned.
        start: the weights before the training; needed where the checkpoint does not hold them.
        facts: JSON values that say how the strength was chosen; stored beside it.

    Raises:
        StrengthError: the start is missing or belongs to another network, or as for `interpolate`.
    """
    if start is None and (start := start_weights(checkpoint)) is None:
        raise StrengthError("the weights before the training are needed to change its strength, and this checkpoint "
                            "does not hold them. Keep the start weights that `nnunet-dante transfer` wrote.")
    trained = trained_weights(checkpoint)
    dante = dict(checkpoint["dante"])
    updates: dict[str, Any] = {}
    if adapter := dante.get("adapter"):
        updates = {name: _at(settings, strength) for name, settings in adapter["updates"].items()}
        dante["adapter"] = {**adapter, "updates": updates}
    full = {} if strength == 1 else {name: tensor for name, tensor in unique_tensors(trained).items()
                                     if name not in updates and not torch.equal(tensor, start[name])}
    dante["strength"] = {**(facts or {}), "value": float(strength), "trained": full}
    return {**checkpoint, "network_weights": interpolate(start, trained, strength), "dante": dante}


def note_strength(fold: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write into nnU-Net's summary of a validation at which strength its masks were predicted, if it does not say so.

    fold: folder fold_X. checkpoint: content of the checkpoint that predicted the masks.
    """
    file = fold / "validation" / "summary.json"
    with suppress(OSError, ValueError, TypeError):  # without a summary that can be read, nothing is known of the masks
        content = {"dante": {"strength": _value(checkpoint)}} | read_json(file)
        write_text_atomically(json.dumps(content, indent=4), file)


def stale_masks(fold: Path, checkpoint: Mapping[str, Any]) -> str:
    """Return a sentence if the validation masks of a fold are of another strength than its checkpoint; "" if not.

    Masks whose summary does not say at which strength they were predicted are taken for those of the checkpoint.
    """
    try:
        said = read_json(fold / "validation" / "summary.json")["dante"]["strength"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if said == (now := _value(checkpoint)):
        return ""
    then = "before the strength was chosen" if said is None else f"at strength {said}"
    return (f"The validation masks were predicted {then}, checkpoint_final.pth is at "
            f"{'full strength' if now is None else f'strength {now}'}.")


def kept_strength(checkpoint: Mapping[str, Any]) -> float:
    """Return how much of what was learned a checkpoint keeps; 1 if nothing was chosen."""
    return 1.0 if (value := _value(checkpoint)) is None else float(value)


def _value(checkpoint: Mapping[str, Any]) -> float | None:
    return ((checkpoint.get("dante") or {}).get("strength") or {}).get("value")


def _at(settings: Mapping[str, Any], strength: float) -> dict[str, Any]:
    """Return the settings of an update at this strength; 1 is not written, so that older versions read the file."""
    settings = {key: value for key, value in settings.items() if key != "strength"}
    return settings if strength == 1 else {**settings, "strength": float(strength)}
