"""Adapters: what a training of few numbers changed, as a small file that knows which base it belongs to.

Format 2, a safetensors file: "<weight name>.<factor>" for adapted weights, "<name>" for tensors trained in full (norms,
biases, stem, heads), and one metadata entry "nnunet_dante" with JSON. There "updates" says for each adapted weight what
makes it of its factors: kind "lora" (lora_A, lora_B), "dora" (these and magnitude) or "conv_adapter" (pointwise), and
the arguments of that class. Names are the stock keys, the first of each set of aliases. The base is identified by the
hash of its weights (`weights_sha256`), not of its file. "sha256" there is over all else of the file, which has no
checksum of its own; older files lack it. Format 1 knew kind "lora" alone, with one rank for all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterError
from ..files import parse_json
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


def extract(checkpoint: PathLike, output: PathLike, *, form: str = "file") -> None:
    """Write the adapter of a checkpoint that a trainer of few numbers wrote.

    form: "file", or "peft" for a folder of Hugging Face PEFT (see `peft_folder`).

    Raises:
        AdapterError: the checkpoint holds no base beside its weights, or what it holds has no place in the form.
    """
    metadata, tensors, weights = contents(checkpoint)
    if form == "peft":
        from .network import build_network
        from .peft_folder import write_folder

        init = metadata["init_args"]
        network = build_network(init["plans"], init["dataset_json"], init["configuration"],
                                trainer_name=metadata["trainer_name"])
        write_folder(output, metadata, tensors, weights, network)
        return
    metadata["sha256"] = _checksum(metadata, tensors)
    with atomic_path(output) as temporary:
        save_file(tensors, temporary, metadata={_METADATA: json.dumps(metadata)})


def contents(checkpoint: PathLike) -> tuple[dict[str, Any], StateDict, StateDict]:
    """Return metadata and tensors of the adapter in a checkpoint, and the checkpoint's weights.

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
    return metadata, {k: v.detach().cpu().contiguous() for k, v in {**factors, **full}.items()}, weights


def _checksum(metadata: dict[str, Any], tensors: ReadOnlyStateDict) -> str:
    return hashlib.sha256(f"{json.dumps(metadata)}{weights_sha256(tensors)}".encode()).hexdigest()


def apply(base_checkpoint: PathLike, adapter: PathLike, output: PathLike) -> None:
    """Write base + adapter as a checkpoint with stock keys, equal to the one the adapter was extracted from.

    base_checkpoint: the start weights that `nnunet-dante transfer` wrote, or what `remove` restored.

    Raises:
        AdapterError: the adapter is damaged, or was trained on another base.
    """
    base = load_checkpoint_safely(base_checkpoint)
    weights = _weights(base, base_checkpoint)
    metadata, tensors = read_adapter(adapter, base=base)
    if (found := weights_sha256(weights)) != metadata["base_sha256"]:
        wanted = metadata["base_sha256"]
        raise AdapterError(f"{Path(adapter).name} was trained on weights with sha256 {wanted[:12]}..., "
                           f"{Path(base_checkpoint).name} holds {found[:12]}.... Give the start weights of its own "
                           f"training: the same donor, transferred to the same labels and channels.")
    updates = metadata["updates"]
    factors = {k: v for k, v in tensors.items() if k.rpartition(".")[0] in updates}
    changed = {k: v for k, v in tensors.items() if k not in factors}
    if unknown := sorted({*changed, *updates} - set(weights)):
        raise AdapterError(f"{Path(adapter).name} changes {unknown[0]}, which {Path(base_checkpoint).name} does not "
                           "hold; the file is damaged: copy it again.")
    changed |= {name: _merged(weights[name], name, settings, factors) for name, settings in updates.items()}
    if odd := [k for k, v in changed.items() if v.shape != weights[k].shape or v.dtype != weights[k].dtype
               or not torch.isfinite(v).all()]:
        raise AdapterError(f"{Path(adapter).name} gives {odd[0]} another shape or kind of numbers than its base, or "
                           "infinite ones; the file is damaged: copy it again.")
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
    if weights_sha256(weights) != dante.get("base_sha256"):
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
        f"{sum(t.nbytes for t in tensors.values()) / 2**20:.2f} MiB",
        f"  method         {', '.join([metadata['method'], *options])}",
        f"  holds          factors of {len(updates)} weights, {full} tensors trained in full",
        f"  base           weights sha256 {metadata['base_sha256']}",
        f"  donor          {donor.get('source', 'unknown')} (file sha256 {donor.get('sha256', 'unknown')})",
        f"  trained on     {init['plans']['dataset_name']}, {init['configuration']}, fold {init['fold']}",
        f"  labels         {', '.join(init['dataset_json']['labels'])}"])


def read_adapter(path: PathLike, *, base: dict[str, Any] | None = None) -> tuple[dict[str, Any], StateDict]:
    """Return metadata and tensors of an adapter file; metadata of format 1 comes as that of format 2.

    path: may be a folder of PEFT, too; base is the checkpoint that it is for, which gives the names (`read_folder`).

    Raises:
        AdapterError: the file is missing, damaged, of another kind or of a newer format.
    """
    path = Path(path)
    if path.is_dir():
        from .peft_folder import read_folder

        metadata, tensors = read_folder(path, base)
        _check(metadata, _NEEDED, path)
        return metadata, tensors
    if not path.is_file():
        raise AdapterError(f"adapter {path} does not exist; give the adapter.safetensors of a training.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = parse_json((file.metadata() or {}).get(_METADATA, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except Exception as error:  # whatever safetensors raises on damaged and odd files
        raise AdapterError(f"{path.name} is damaged or no safetensors file ({error}); copy it again.") from error
    if not isinstance(metadata, dict):
        raise AdapterError(f"{path.name} is a safetensors file, but none of nnunet_dante's adapters.")
    if (checksum := metadata.pop("sha256", None)) not in (None, _checksum(metadata, tensors)):
        raise AdapterError(f"{path.name} does not hold what was written into it (checksum {str(checksum)[:12]}...); "
                           "copy it again.")
    if metadata.get("format") not in (1, FORMAT):
        raise AdapterError(f"{path.name} has adapter format {metadata.get('format')!r}, this version reads 1 and "
                           f"{FORMAT}; update nnunet-dante.")
    if metadata["format"] == 1:
        metadata |= {"updates": _updates_of_format_1(metadata, tensors),
                     "options": {key: metadata.get(key) for key in _LOW_RANK}}
    _check(metadata, _NEEDED, path)
    return metadata, tensors


def _check(content: dict[str, Any], needed: dict[str, Callable[[Any], bool]], path: PathLike) -> None:
    if wrong := [key for key, holds in needed.items() if key not in content or not holds(content[key])]:
        raise AdapterError(f"{Path(path).name} is damaged: {', '.join(wrong)} cannot be used. Copy it again, or make "
                           "it again from the checkpoint of its training.")


def _is_init(value: Any) -> bool:
    return isinstance(value, dict) and {"plans", "configuration", "fold", "dataset_json"} <= set(value) and (
        isinstance(value["plans"], dict) and "dataset_name" in value["plans"]
        and isinstance(value["dataset_json"], dict) and isinstance(value["dataset_json"].get("labels"), dict))


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _are_updates(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(settings, dict) for settings in value.values())


_STOCK: dict[str, Callable[[Any], bool]] = {
    "init_args": _is_init, "trainer_name": lambda v: isinstance(v, str),
    "inference_allowed_mirroring_axes": lambda v: v is None or isinstance(v, (list, tuple)) and all(
        axis in (0, 1, 2) for axis in v)}
_NEEDED = {**_STOCK, **dict.fromkeys(_IDENTITY, lambda _: True), "updates": _are_updates,
           "base_sha256": lambda v: isinstance(v, str), "method": lambda v: isinstance(v, str),
           "options": lambda v: v is None or isinstance(v, dict), "donor": lambda v: v is None or isinstance(v, dict)}


def _weights(content: dict[str, Any], checkpoint: PathLike) -> StateDict:
    _check(content, {"network_weights": lambda v: _are_tensors(v) and bool(v)}, checkpoint)
    return content["network_weights"]


def _updates_of_format_1(metadata: dict[str, Any], tensors: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {key.removesuffix(".lora_A"): {"kind": "lora", **{option: metadata.get(option) for option in _LOW_RANK}}
            for key in tensors if key.endswith(".lora_A")}


def _with_adapter(checkpoint: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    content = load_checkpoint_safely(checkpoint)
    dante = content.get("dante") if isinstance(content.get("dante"), dict) else {}
    if not dante.get("adapter"):
        raise AdapterError(f"{Path(checkpoint).name} holds no adapter (method {dante.get('method', 'stock')}); "
                           f"adapters come from methods that train few numbers, such as nnUNetTrainerLoRA.")
    _check(content, _STOCK, checkpoint)
    weights, adapter = _weights(content, checkpoint), dante["adapter"]
    whole = isinstance(adapter, dict) and _are_updates(adapter.get("updates") or {}) and all(
        _are_tensors(adapter.get(part)) for part in ("base", "factors"))
    if not whole or not set(adapter["base"]) <= set(weights):
        raise AdapterError(f"{Path(checkpoint).name} is damaged: its adapter cannot be used. Copy the file again.")
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
        with torch.device("meta"):  # settings may ask for any size, and the numbers come from the file
            update = _KINDS[kind](weight.shape, **arguments)
        update.load_state_dict({factor: factors[f"{name}.{factor}"].float() for factor in update.FACTORS}, assign=True)
        return update.merged(weight)
    except Exception as error:  # whatever settings and factors of the wrong kind or size make torch raise
        raise AdapterError(f"the adapter's update of {name} is damaged ({type(error).__name__}: {error}); copy the "
                           "file again.") from error


def _replaced(weights: ReadOnlyStateDict, values: ReadOnlyStateDict) -> StateDict:
    """Return `weights` with `values` under every alias, in the same order."""
    first = {key: canonical for canonical, keys in alias_sets(weights).items() for key in keys}
    return {key: values.get(first[key], tensor) for key, tensor in weights.items()}
