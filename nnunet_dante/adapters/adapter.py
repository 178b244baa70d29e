"""Adapters: what a training of few numbers changed, apart from its base: taken out, put in, taken away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError
from ..models.checkpoint import (
    alias_sets,
    load_checkpoint_safely,
    not_finite,
    replaced,
    save_atomically,
    weights_sha256,
)
from ..peft.low_rank import DecomposedLowRank, LowRankDelta
from ..peft.update import PointwiseDelta, WeightUpdate, interpolated
from ..types import PathLike, ReadOnlyStateDict, StateDict
from .file import (
    FORMAT,
    IDENTITY,
    LOW_RANK,
    STOCK,
    Stock,
    are_tensors,
    are_updates,
    check,
    read_adapter,
    updates_of_format_1,
    write_adapter,
)

_KINDS: dict[str, type[WeightUpdate]] = {c.KIND: c for c in (LowRankDelta, DecomposedLowRank, PointwiseDelta)}


def extract(checkpoint: PathLike, output: PathLike, *, form: str = "file") -> None:
    """Write the adapter of a checkpoint that a trainer of few numbers wrote.

    form: "file", or "peft" for a folder of Hugging Face PEFT (see `peft_folder`).

    Raises:
        AdapterError: the checkpoint holds no base beside its weights, or what it holds has no place in the form.
    """
    metadata, tensors, weights = contents(checkpoint)
    if form == "peft":
        from ..models.network import build_network
        from .hf_peft import write_folder

        init = metadata["init_args"]
        network = build_network(init["plans"], init["dataset_json"], init["configuration"],
                                trainer_name=metadata["trainer_name"])
        write_folder(output, metadata, tensors, weights, network)
        return
    write_adapter(metadata, tensors, output)


def contents(checkpoint: PathLike) -> tuple[dict[str, Any], StateDict, StateDict]:
    """Return metadata and tensors of the adapter in a checkpoint, and the checkpoint's weights.

    Raises:
        AdapterError: the checkpoint holds no base beside its weights.
    """
    content, dante = _with_adapter(checkpoint)
    factors, weights = dante["adapter"]["factors"], content["network_weights"]
    updates = dante["adapter"].get("updates") or updates_of_format_1(dante, factors)
    full = {name: weights[name] for name in dante["adapter"]["base"] if name not in updates}
    init, strength = content["init_args"], dante.get("strength") or {}
    # Copies: integer tensors are the same ones at every strength above 0, and safetensors stores no tensor twice.
    trained = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
               for k, v in (strength.get("trained") or {}).items()}
    metadata = {"format": FORMAT, **{key: dante.get(key) for key in IDENTITY}, "updates": updates,
                **{key: content[key] for key in STOCK if key in content},
                "strength": {"value": strength.get("value")} if strength else None,  # not how long its choice took
                "init_args": {key: init[key] for key in ("plans", "configuration", "fold", "dataset_json")}}
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:  # a checkpoint can hold tensors anywhere
        raise AdapterError(f"{Path(checkpoint).name} is damaged: what it says of its training is no JSON ({error}). "
                           "Copy the file again.") from error
    if strength:
        metadata["strength"]["trained"] = trained
    return metadata, {k: v.detach().cpu().contiguous() for k, v in {**factors, **full}.items()}, weights


def apply(base_checkpoint: PathLike, adapter: PathLike, output: PathLike) -> None:
    """Write base + adapter as a checkpoint with stock keys, equal to the one the adapter was extracted from.

    base_checkpoint: the start weights that `nnunet-dante transfer` wrote, or what `remove` restored.

    Raises:
        AdapterError: the adapter is damaged, or was trained on another base.
    """
    base = load_checkpoint_safely(base_checkpoint)
    weights = checkpoint_weights(base, base_checkpoint)
    metadata, tensors = read_adapter(adapter, base=base)
    if (found := weights_sha256(weights)) != metadata["base_sha256"]:
        wanted = metadata["base_sha256"]
        raise AdapterError(f"{Path(adapter).name} was trained on weights with sha256 {wanted[:12]}..., "
                           f"{Path(base_checkpoint).name} holds {found[:12]}.... Give the start weights of its own "
                           f"training: the same donor, transferred to the same labels and channels.")
    updates = metadata["updates"]
    factors = {k: v for k, v in tensors.items() if k.rpartition(".")[0] in updates}
    changed = {k: v for k, v in tensors.items() if k not in factors}
    trained = (metadata.get("strength") or {}).get("trained", {})
    if unknown := sorted({*changed, *updates} - set(alias_sets(weights)) | trained.keys() - changed.keys()):
        raise AdapterError(f"{Path(adapter).name} changes {unknown[0]}, which {Path(base_checkpoint).name} does not "
                           "hold, or holds under another name; the file is damaged: copy it again.")
    changed |= {name: updated_weight(weights[name], name, settings, factors) for name, settings in updates.items()}
    given = [*changed.items(), *trained.items()]
    if odd := [k for k, v in given if v.shape != weights[k].shape or v.dtype != weights[k].dtype] or not_finite(given):
        raise AdapterError(f"{Path(adapter).name} gives {odd[0]} another shape or kind of numbers than its base, or "
                           "infinite ones; the file is damaged: copy it again.")
    dante = {"format": 1, **{key: metadata.get(key) for key in IDENTITY},
             "adapter": {"base": {name: weights[name] for name in changed}, "updates": updates, "factors": factors}}
    init_args = metadata["init_args"] | {"device": torch.device("cpu")}
    stock = {key: metadata[key] for key in STOCK if key in metadata}
    if axes := stock.get("inference_allowed_mirroring_axes"):
        stock["inference_allowed_mirroring_axes"] = tuple(axes)  # JSON has made a list of them
    save_atomically({"network_weights": replaced(weights, changed), "init_args": init_args, **stock, "dante": dante},
                    output)


def remove(checkpoint: PathLike, output: PathLike) -> None:
    """Write the checkpoint with the weights it had before its training, bit for bit.

    Raises:
        AdapterError: the checkpoint holds no base, or not the one it names.
    """
    content, dante = _with_adapter(checkpoint)
    weights = replaced(content["network_weights"], dante["adapter"]["base"])
    if weights_sha256(weights) != dante.get("base_sha256"):
        raise AdapterError(f"{Path(checkpoint).name} does not hold the base it names; the file was changed after its "
                           f"training. Use the start weights that `nnunet-dante transfer` wrote.")
    kept = {key: content[key] for key in ("init_args", *STOCK) if key in content}
    save_atomically({"network_weights": weights, **kept}, output)


def info(adapter: PathLike) -> str:
    """Return what an adapter file is, in lines for a person."""
    metadata, tensors = read_adapter(adapter)
    updates = metadata["updates"]
    full = sum(name.rpartition(".")[0] not in updates for name in tensors)
    given, donor, init = metadata["options"] or {}, metadata.get("donor") or {}, metadata["init_args"]
    options = [f"{key} {given[key]}" for key in LOW_RANK if key in given]
    strength = (metadata.get("strength") or {}).get("value", 1)
    merged = isinstance(given.get("sources"), list)
    sources = given["sources"] if merged else [
        f"{init['plans']['dataset_name']}, {init['configuration']}, fold {init['fold']}"]
    return "\n".join([
        f"adapter of nnunet_dante {metadata['version']}, format {metadata['format']}, "
        f"{sum(t.nbytes for t in tensors.values()) / 2**20:.2f} MiB",
        f"  method         {', '.join([metadata['method'], *options])}",
        f"  holds          factors of {len(updates)} weights, {full} tensors trained in full",
        f"  base           weights sha256 {metadata['base_sha256']}",
        f"  donor          {donor.get('source', 'unknown')} (file sha256 {donor.get('sha256', 'unknown')})",
        f"  strength       {strength:g}, where 1 is all that was learned",
        f"  {'sum of    ' if merged else 'trained on'}     " + "\n                 ".join(map(str, sources)),
        f"  labels         {', '.join(init['dataset_json']['labels'])}"])


def checkpoint_weights(content: dict[str, Any], checkpoint: PathLike) -> StateDict:
    """Return the weights of a checkpoint's content.

    Raises:
        AdapterError: it holds none.
    """
    if not are_tensors(weights := content.get("network_weights")) or not weights:
        raise AdapterError(f"{Path(checkpoint).name} is damaged: it holds no network_weights. Copy the file again.")
    return weights


def _with_adapter(checkpoint: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    content = load_checkpoint_safely(checkpoint)
    dante: dict[str, Any] = content["dante"] if isinstance(content.get("dante"), dict) else {}
    adapter = dante.get("adapter")
    if adapter is None or (isinstance(adapter, dict) and not adapter):
        raise AdapterError(f"{Path(checkpoint).name} holds no adapter (method {dante.get('method', 'stock')}); "
                           f"adapters come from methods that train few numbers, such as nnUNetTrainerLoRA.")
    check(content, Stock, checkpoint)
    weights = checkpoint_weights(content, checkpoint)
    whole = isinstance(adapter, dict) and are_updates(adapter.get("updates") or {}) and all(
        are_tensors(adapter.get(part)) for part in ("base", "factors"))
    strength = dante.get("strength") or {}
    whole = whole and isinstance(strength, dict) and are_tensors(strength.get("trained") or {})
    if not whole or not set(adapter["base"]) <= set(alias_sets(weights)):
        raise AdapterError(f"{Path(checkpoint).name} is damaged: its adapter cannot be used. Copy the file again.")
    return content, dante


def updated_weight(weight: Tensor, name: str, settings: dict[str, Any], factors: ReadOnlyStateDict) -> Tensor:
    """Return the adapted weight by the very arithmetic of the training, so that the result is the same bit for bit.

    Raises:
        AdapterError: settings or factors make no update of this weight.
    """
    arguments = dict(settings)
    kind, strength = arguments.pop("kind", None), arguments.pop("strength", 1)
    if kind not in _KINDS:
        raise AdapterError(f"the adapter changes {name} by an update of kind {kind!r}, this version knows "
                           f"{', '.join(_KINDS)}; update nnunet-dante.")
    try:
        with torch.device("meta"):  # settings may ask for any size, and the numbers come from the file
            update = _KINDS[kind](weight.shape, **arguments)
        update.load_state_dict({factor: factors[f"{name}.{factor}"].float() for factor in update.FACTORS}, assign=True)
        return interpolated(weight, update.merged(weight), float(strength))
    except Exception as error:  # whatever settings and factors of the wrong kind or size make torch raise
        raise AdapterError(f"the adapter's update of {name} is damaged ({type(error).__name__}: {error}); copy the "
                           "file again.") from error
