"""Adapters: what a training of few numbers changed, as a small file that knows which base it belongs to.

Format 2, a safetensors file: "<weight name>.<factor>" for adapted weights, "<name>" for tensors trained in full (norms,
biases, stem, heads), and one metadata entry "nnunet_dante" with JSON. There "updates" says for each adapted weight what
makes it of its factors: kind "lora" (lora_A, lora_B), "dora" (these and magnitude) or "conv_adapter" (pointwise), and
the arguments of that class. Names are the stock keys, the first of each set of aliases. The base is identified by the
hash of its weights (`weights_sha256`), not of its file. Format 1 knew kind "lora" alone, with one rank for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterError, ConfigurationError
from ..peft.decomposed import DecomposedLowRank
from ..peft.low_rank import LowRankDelta
from ..peft.pointwise import PointwiseDelta
from ..peft.update import WeightUpdate
from ..types import PathLike, ReadOnlyStateDict, StateDict
from .checkpoint import alias_sets, atomic_path, load_checkpoint_safely, save_atomically, weights_sha256

FORMAT = 2
_METADATA = "nnunet_dante"
_IDENTITY = ("version", "method", "options", "base_sha256", "donor", "label_map", "start_dice")
_LOW_RANK = ("rank", "alpha", "factorisation")
_KINDS: dict[str, type[WeightUpdate]] = {c.KIND: c for c in (LowRankDelta, DecomposedLowRank, PointwiseDelta)}


def extract(checkpoint: PathLike, output: PathLike) -> None:
    """Write the adapter of a checkpoint that a trainer of few numbers wrote.

    Raises:
        AdapterError: the checkpoint holds no base beside its weights.
    """
    content, dante = _with_adapter(checkpoint)
    factors, weights = dante["adapter"]["factors"], content["network_weights"]
    updates = dante["adapter"].get("updates") or _updates_of_format_1(dante, factors)
    full = {name: weights[name] for name in dante["adapter"]["base"] if name not in updates}
    init = content["init_args"]
    metadata = {"format": FORMAT, **{key: dante.get(key) for key in _IDENTITY}, "updates": updates,
                "trainer_name": content["trainer_name"],
                "inference_allowed_mirroring_axes": content["inference_allowed_mirroring_axes"],
                "init_args": {key: init[key] for key in ("plans", "configuration", "fold", "dataset_json")}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in {**factors, **full}.items()}
    with atomic_path(output) as temporary:
        save_file(tensors, temporary, metadata={_METADATA: json.dumps(metadata)})


def apply(base_checkpoint: PathLike, adapter: PathLike, output: PathLike) -> None:
    """Write base + adapter as a checkpoint with stock keys, equal to the one the adapter was extracted from.

    base_checkpoint: the start weights that `nnunet-dante transfer` wrote, or what `remove` restored.

    Raises:
        AdapterError: the adapter is damaged, or was trained on another base.
    """
    metadata, tensors = read_adapter(adapter)
    weights = load_checkpoint_safely(base_checkpoint)["network_weights"]
    if (found := weights_sha256(weights)) != metadata["base_sha256"]:
        wanted = metadata["base_sha256"]
        raise AdapterError(f"{Path(adapter).name} was trained on weights with sha256 {wanted[:12]}..., "
                           f"{Path(base_checkpoint).name} holds {found[:12]}.... Give the start weights of its own "
                           f"training: the same donor, transferred to the same labels and channels.")
    updates = metadata["updates"]
    factors = {k: v for k, v in tensors.items() if k.rpartition(".")[0] in updates}
    changed = {k: v for k, v in tensors.items() if k not in factors}
    changed |= {name: _merged(weights[name], name, settings, factors) for name, settings in updates.items()}
    dante = {"format": 1, **{key: metadata[key] for key in _IDENTITY},
             "adapter": {"base": {name: weights[name] for name in changed}, "updates": updates, "factors": factors}}
    init_args = metadata["init_args"] | {"device": torch.device("cpu")}
    axes = metadata["inference_allowed_mirroring_axes"]
    save_atomically({"network_weights": _replaced(weights, changed), "init_args": init_args,
                     "trainer_name": metadata["trainer_name"],
                     "inference_allowed_mirroring_axes": None if axes is None else tuple(axes), "dante": dante}, output)


def remove(checkpoint: PathLike, output: PathLike) -> None:
    """Write the checkpoint with the weights it had before its training, bit for bit.

    Raises:
        AdapterError: the checkpoint holds no base, or not the one it names.
    """
    content, dante = _with_adapter(checkpoint)
    weights = _replaced(content["network_weights"], dante["adapter"]["base"])
    if weights_sha256(weights) != dante["base_sha256"]:
        raise AdapterError(f"{Path(checkpoint).name} does not hold the base it names; the file was changed after its "
                           f"training. Use the start weights that `nnunet-dante transfer` wrote.")
    kept = ("init_args", "trainer_name", "inference_allowed_mirroring_axes")
    save_atomically({"network_weights": weights, **{key: content[key] for key in kept}}, output)


def info(adapter: PathLike) -> str:
    """Return what an adapter file is, in lines for a person."""
    metadata, tensors = read_adapter(adapter)
    updates = metadata["updates"]
    full = sum(name.rpartition(".")[0] not in updates for name in tensors)
    options = [f"{key} {metadata['options'][key]}" for key in _LOW_RANK if key in (metadata["options"] or {})]
    donor, init = metadata.get("donor") or {}, metadata["init_args"]
    return "\n".join([
        f"adapter of nnunet_dante {metadata['version']}, format {metadata['format']}, "
        f"{Path(adapter).stat().st_size / 2**20:.2f} MiB",
        f"  method         {', '.join([metadata['method'], *options])}",
        f"  holds          factors of {len(updates)} weights, {full} tensors trained in full",
        f"  base           weights sha256 {metadata['base_sha256']}",
        f"  donor          {donor.get('source', 'unknown')} (file sha256 {donor.get('sha256', 'unknown')})",
        f"  trained on     {init['plans']['dataset_name']}, {init['configuration']}, fold {init['fold']}",
        f"  labels         {', '.join(init['dataset_json']['labels'])}"])


def read_adapter(path: PathLike) -> tuple[dict[str, Any], StateDict]:
    """Return metadata and tensors of an adapter file; metadata of format 1 comes as that of format 2.

    Raises:
        AdapterError: the file is missing, damaged, of another kind or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"adapter {path} does not exist; give the adapter.safetensors of a training.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{path.name} is damaged or no safetensors file ({error}); copy it again.") from error
    if metadata is None:
        raise AdapterError(f"{path.name} is a safetensors file, but none of nnunet_dante's adapters.")
    if metadata.get("format") not in (1, FORMAT):
        raise AdapterError(f"{path.name} has adapter format {metadata.get('format')!r}, this version reads 1 and "
                           f"{FORMAT}; update nnunet-dante.")
    if metadata["format"] == 1:
        metadata |= {"updates": _updates_of_format_1(metadata, tensors),
                     "options": {key: metadata[key] for key in _LOW_RANK}}
    return metadata, tensors


def _updates_of_format_1(metadata: dict[str, Any], tensors: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {key.removesuffix(".lora_A"): {"kind": "lora", **{option: metadata[option] for option in _LOW_RANK}}
            for key in tensors if key.endswith(".lora_A")}


def _with_adapter(checkpoint: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    content = load_checkpoint_safely(checkpoint)
    dante = content.get("dante") or {}
    if not dante.get("adapter"):
        raise AdapterError(f"{Path(checkpoint).name} holds no adapter (method {dante.get('method', 'stock')}); "
                           f"adapters come from methods that train few numbers, such as nnUNetTrainerLoRA.")
    return content, dante


def _merged(weight: Tensor, name: str, settings: dict[str, Any], factors: ReadOnlyStateDict) -> Tensor:
    """Return the adapted weight by the very arithmetic of the training, so that the result is the same bit for bit.

    Raises:
        AdapterError: settings or factors make no update of this weight.
    """
    arguments = dict(settings)
    kind = arguments.pop("kind", None)
    if kind not in _KINDS:
        raise AdapterError(f"the adapter changes {name} by an update of kind {kind!r}, this version knows "
                           f"{', '.join(_KINDS)}; update nnunet-dante.")
    try:
        update = _KINDS[kind](weight.shape, **arguments)
        update.load_state_dict({factor: factors[f"{name}.{factor}"] for factor in update.FACTORS})
    except (ConfigurationError, KeyError, RuntimeError, TypeError) as error:
        raise AdapterError(f"the adapter's update of {name} is damaged ({error}); copy the file again.") from error
    return update.merged(weight)


def _replaced(weights: ReadOnlyStateDict, values: ReadOnlyStateDict) -> StateDict:
    """Return `weights` with `values` under every alias, in the same order."""
    first = {key: canonical for canonical, keys in alias_sets(weights).items() for key in keys}
    return {key: values.get(first[key], tensor) for key, tensor in weights.items()}
