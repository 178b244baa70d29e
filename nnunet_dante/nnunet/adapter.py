"""Adapters: what a low-rank training changed, as a file of a few MB that knows which base it belongs to.

Format 1, a safetensors file: "<weight name>.lora_A" and ".lora_B" for adapted weights, "<name>" for tensors trained in
full (norms, biases, stem, heads), and one metadata entry "nnunet_dante" with JSON. Names are the stock keys, the first
of each set of aliases. The base is identified by the hash of its weights (`weights_sha256`), not of its file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import AdapterError
from ..peft.low_rank import LowRankDelta
from ..types import PathLike, ReadOnlyStateDict, StateDict
from .checkpoint import alias_sets, atomic_path, load_checkpoint_safely, save_atomically, weights_sha256

FORMAT = 1
_METADATA = "nnunet_dante"
_IDENTITY = ("version", "method", "rank", "alpha", "factorisation", "base_sha256", "donor", "label_map", "start_dice")


def extract(checkpoint: PathLike, output: PathLike) -> None:
    """Write the adapter of a checkpoint that a LoRA trainer wrote.

    Raises:
        AdapterError: the checkpoint holds no low-rank factors.
    """
    content, dante = _with_adapter(checkpoint)
    factors, weights = dante["adapter"]["factors"], content["network_weights"]
    full = {name: weights[name] for name in dante["adapter"]["base"] if f"{name}.lora_A" not in factors}
    init = content["init_args"]
    metadata = {"format": FORMAT, **{key: dante.get(key) for key in _IDENTITY},
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
    factors = {k: v for k, v in tensors.items() if k.endswith((".lora_A", ".lora_B"))}
    changed = {k: v for k, v in tensors.items() if k not in factors}
    changed |= _merged(weights, factors, metadata)
    dante = {"format": 1, **{key: metadata[key] for key in _IDENTITY},
             "adapter": {"base": {name: weights[name] for name in changed}, "factors": factors}}
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
    factors = sum(1 for name in tensors if name.endswith(".lora_A"))
    donor, init = metadata.get("donor") or {}, metadata["init_args"]
    return "\n".join([
        f"adapter of nnunet_dante {metadata['version']}, format {metadata['format']}, "
        f"{Path(adapter).stat().st_size / 2**20:.2f} MiB",
        f"  method         {metadata['method']}, rank {metadata['rank']}, alpha {metadata['alpha']}, "
        f"{metadata['factorisation']}",
        f"  holds          factors of {factors} weights, {len(tensors) - 2 * factors} tensors trained in full",
        f"  base           weights sha256 {metadata['base_sha256']}",
        f"  donor          {donor.get('source', 'unknown')} (file sha256 {donor.get('sha256', 'unknown')})",
        f"  trained on     {init['plans']['dataset_name']}, {init['configuration']}, fold {init['fold']}",
        f"  labels         {', '.join(init['dataset_json']['labels'])}"])


def read_adapter(path: PathLike) -> tuple[dict[str, Any], StateDict]:
    """Return metadata and tensors of an adapter file.

    Raises:
        AdapterError: the file is missing, damaged, of another kind or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"adapter {path} does not exist; give an adapter.safetensors of a LoRA training.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{path.name} is damaged or no safetensors file ({error}); copy it again.") from error
    if metadata is None:
        raise AdapterError(f"{path.name} is a safetensors file, but none of nnunet_dante's adapters.")
    if metadata.get("format") != FORMAT:
        raise AdapterError(f"{path.name} has adapter format {metadata.get('format')!r}, this version reads {FORMAT}; "
                           f"update nnunet-dante.")
    return metadata, tensors


def _with_adapter(checkpoint: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    content = load_checkpoint_safely(checkpoint)
    dante = content.get("dante") or {}
    if not dante.get("adapter"):
        raise AdapterError(f"{Path(checkpoint).name} holds no low-rank factors (method "
                           f"{dante.get('method', 'stock')}); adapters come from nnUNetTrainerLoRA and "
                           f"nnUNetTrainerLoRADecoder.")
    return content, dante


def _merged(weights: ReadOnlyStateDict, factors: ReadOnlyStateDict, metadata: dict[str, Any]) -> StateDict:
    """Return the adapted weights by the very arithmetic of the training, so that the result is the same bit for bit."""
    merged = {}
    for name in (key.removesuffix(".lora_A") for key in factors if key.endswith(".lora_A")):
        delta = LowRankDelta(weights[name].shape, rank=metadata["rank"], alpha=metadata["alpha"],
                             factorisation=metadata["factorisation"])
        delta.load_state_dict({part: factors[f"{name}.{part}"] for part in ("lora_A", "lora_B")})
        merged[name] = delta(weights[name]).detach()
    return merged


def _replaced(weights: ReadOnlyStateDict, values: ReadOnlyStateDict) -> StateDict:
    """Return `weights` with `values` under every alias, in the same order."""
    first = {key: canonical for canonical, keys in alias_sets(weights).items() for key in keys}
    return {key: values.get(first[key], tensor) for key, tensor in weights.items()}
