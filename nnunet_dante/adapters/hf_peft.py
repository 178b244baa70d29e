"""Adapters with flat factors as folders of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

PEFT finds layers by name and replaces them. A stock nnU-Net network has up to four names for a layer, and its forward
pass uses one of them. So the files contain the names that the forward pass uses, and `drop_aliases` removes the others
from a network before PEFT gets it; without that, PEFT says that it does not find the layers. PEFT has low-rank factors
only for plain convolutions and linear layers. Convolutions that are transposed, dilated, grouped or padded by
reflection are stored in full.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .. import __version__
from ..errors import AdapterError
from ..files import atomic_path, parse_json, read_json, write_text_atomically
from ..models.checkpoint import alias_sets, weights_sha256
from ..types import PathLike, ReadOnlyStateDict, StateDict

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_METADATA = "nnunet_dante"
_STOCK = ("init_args", "trainer_name", "inference_allowed_mirroring_axes")  # entries that prediction needs
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NOT_READ = ("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out", "target_parameters", "layer_replication")


def drop_aliases(network: nn.Module) -> None:
    """Remove all names of each layer but the one that the forward pass uses; the network is changed in place.

    Load stock weights before that. Afterwards `PeftModel.from_pretrained(network, folder)` works, and so does training
    with PEFT.
    """
    taken: set[int] = set()
    for module in list(network.modules()):
        run = {id(layer) for layer in getattr(module, "all_modules", ())}
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in taken | run:
                del module._modules[name]
                object.__setattr__(module, name, child)  # the attribute stays, but it is no submodule any more
            taken.add(id(child))
        taken -= run


def write_folder(folder: PathLike, metadata: Mapping[str, Any], tensors: ReadOnlyStateDict,
                 weights: ReadOnlyStateDict, network: nn.Module) -> None:
    """Write an adapter as a folder of PEFT.

    Args:
        folder: the folder to write.
        metadata, tensors: as `adapter.contents` returns them.
        weights: weights of the checkpoint, under stock keys.
        network: the stock network.

    Raises:
        AdapterError: the factors are not flat factors of LoRA, or a tensor was trained that PEFT's files cannot hold.
    """
    kinds = {(settings["kind"], settings.get("factorisation")) for settings in metadata["updates"].values()}
    if kinds != {("lora", "flat")}:
        raise AdapterError(f"PEFT's format holds flat LoRA factors, and the method {metadata['method']} left "
                           f"{', '.join(sorted(f'{kind} {form or str()}'.strip() for kind, form in kinds)) or 'none'}; "
                           f"train with nnUNetTrainerLoRAFlat, or write an adapter.safetensors.")
    config, content = _to_peft(metadata["updates"], tensors, weights, network)
    kept = {key: value for key, value in metadata.items() if key not in ("updates", "sha256", "strength")}
    kept["tensors_sha256"] = weights_sha256(content)
    with atomic_path(Path(folder, WEIGHTS)) as temporary:
        temporary.write_bytes(save(content, metadata={"format": "pt", _METADATA: json.dumps(kept)}))
    write_text_atomically(json.dumps(config, indent=2), Path(folder, CONFIG))


def _to_peft(updates: Mapping[str, dict[str, Any]], tensors: ReadOnlyStateDict, weights: ReadOnlyStateDict,
             network: nn.Module) -> tuple[dict[str, Any], StateDict]:
    layers = dict(network.named_modules())
    used = {first: next((key for key in keys if ".all_modules." in key), first)
            for first, keys in alias_sets(weights).items()}
    low_rank = [name for name in updates if _fits(layers[name.removesuffix(".weight")])]
    content, ranks = dict[str, Tensor](), dict[str, tuple[int, dict[str, Any]]]()
    for name in low_rank:
        layer, a, b = used[name].removesuffix(".weight"), tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        kernel = weights[name].shape[2:]
        content[f"{_PREFIX}{layer}.lora_A.weight"] = b.reshape(b.shape[0], -1, *kernel)
        content[f"{_PREFIX}{layer}.lora_B.weight"] = a.reshape(*a.shape, *[1] * len(kernel))
        ranks[layer] = b.shape[0], updates[name]
    in_full = set[str]()
    others = [n for n in (*tensors, *updates) if n not in low_rank and n.rpartition(".")[0] not in updates]
    for name in others:
        owner, _, part = name.rpartition(".")
        layer = used[name].rpartition(".")[0]
        if f"{owner}.weight" in low_rank:
            content[f"{_PREFIX}{layer}.base_layer.{part}"] = weights[name]
            continue
        if list(layers[owner].children()):
            raise AdapterError(f"{name} was trained in full and belongs to no layer of its own, so PEFT's format has "
                               f"no place for it; write an adapter.safetensors.")
        in_full.add(layer)  # PEFT replaces whole layers, with all of their tensors
        content |= {f"{_PREFIX}{layer}.{key}": weights[f"{owner}.{key}"] for key in layers[owner].state_dict()}
    return _config(ranks, sorted(in_full)), {k: v.detach().clone().contiguous() for k, v in content.items()}


def _fits(layer: Any) -> bool:
    """Return whether PEFT's low-rank layer computes the same as a flat update of this layer's weight."""
    return type(layer) is nn.Linear or type(layer) in _CONVS and (
        layer.groups == 1 and layer.padding_mode == "zeros" and set(layer.dilation) == {1})


def _config(layers: Mapping[str, tuple[int, dict[str, Any]]], in_full: list[str]) -> dict[str, Any]:
    """Return PEFT's LoraConfig. PEFT scales by alpha / rank of each layer, so lower ranks have another alpha."""
    stabilised = any(s.get("rank_stabilised") for _, s in layers.values())
    root = math.sqrt if stabilised else float
    alphas = {}
    for name, (rank, s) in layers.items():
        alpha = s["alpha"] * s.get("strength", 1)
        alphas[name] = alpha if rank == s["rank"] else alpha / root(s["rank"]) * root(rank)
    ranks = {name: rank for name, (rank, _) in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
            "r": rank, "lora_alpha": alpha, "use_rslora": stabilised, "lora_dropout": 0.0,
            # The biases of layers with factors are trained, too. PEFT stores them only with "all".
            "bias": "all", "target_modules": sorted(layers), "modules_to_save": in_full,
            "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha}}


def read_folder(folder: PathLike, base: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], StateDict]:
    """Return metadata and tensors of a folder of PEFT, like `file.read_adapter` for an adapter file.

    base: the checkpoint to which the folder belongs. The names of its weights are used. If PEFT itself wrote the
        folder, labels, plans and trainer are the base's, because the folder does not tell them.

    Raises:
        AdapterError: a file is missing or damaged, holds more than LoRA, or does not fit the base.
    """
    folder = Path(folder)
    try:
        config = read_json(folder / CONFIG)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = parse_json((file.metadata() or {}).get(_METADATA, "null"))
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        if isinstance(metadata, dict) and metadata.pop("tensors_sha256", None) != weights_sha256(content):
            raise AdapterError(f"{folder.name} does not hold what was written into it; copy it again.")
        updates, tensors = _from_peft(config, content)
        names = _canonical((base or {}).get("network_weights", {}))
        updates = {names.get(name, name): settings for name, settings in updates.items()}
        tensors = {_renamed(name, names): tensor for name, tensor in tensors.items()}
    except AdapterError:
        raise
    except Exception as error:  # damaged and unusual files may raise anything
        raise AdapterError(f"{folder.name} is no folder of PEFT with {CONFIG} and {WEIGHTS}, or is damaged "
                           f"({type(error).__name__}: {error}).") from error
    return {**(metadata or _identity_of(base, folder)), "updates": updates}, tensors


def _from_peft(config: Mapping[str, Any], content: ReadOnlyStateDict) -> tuple[dict[str, dict[str, Any]], StateDict]:
    if config["peft_type"] != "LORA" or (more := [key for key in _NOT_READ if config.get(key)]):
        raise AdapterError(f"only plain LoRA of PEFT can be read; {CONFIG} has peft_type {config['peft_type']!r}, "
                           f"{', '.join(more) if config['peft_type'] == 'LORA' else 'another method'}.")
    updates: dict[str, dict[str, Any]] = {}
    tensors: StateDict = {}
    for key, tensor in _own_keys(content):
        owner, factor = key.removesuffix(".weight"), key.rsplit(".", 2)[-2]
        if factor == "lora_A":
            layer = owner.removesuffix(".lora_A")
            tensors[f"{layer}.weight.lora_B"] = tensor.flatten(1).float()
            updates[f"{layer}.weight"] = {
                "kind": "lora", "factorisation": "flat", "rank": tensor.shape[0],
                "alpha": _of_layer(config.get("alpha_pattern"), layer, config["lora_alpha"]),
                "rank_stabilised": bool(config.get("use_rslora"))}
        elif factor == "lora_B":
            tensors[f"{owner.removesuffix('.lora_B')}.weight.lora_A"] = tensor.flatten(1).float()
        else:
            tensors[key.replace(".base_layer.", ".")] = tensor
    return updates, tensors


def _own_keys(content: ReadOnlyStateDict) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) without the copies of biases that PEFT adds under names of its own with bias "all"."""
    for key, tensor in content.items():
        if ".original_module." not in key and ".modules_to_save." not in key:
            yield key.removeprefix(_PREFIX), tensor


def _of_layer(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """Return the value that PEFT takes for a layer: that of the first pattern that matches the end of its name.

    Patterns may be regular expressions. Only names are read here, because evaluating an expression of unknown origin
    may never end.
    """
    for pattern, value in (patterns or {}).items():
        name = pattern.replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise AdapterError(f"{CONFIG} has the alpha_pattern {pattern!r}; only names of layers can be read.")
        if f".{layer}".endswith(f".{name}"):
            return value
    return default


def _canonical(weights: ReadOnlyStateDict) -> dict[str, str]:
    return {key: first for first, keys in alias_sets(weights).items() for key in keys}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    weight, _, factor = name.rpartition(".")
    return f"{names.get(weight, weight)}.{factor}" if factor in ("lora_A", "lora_B") else names.get(name, name)


def _identity_of(base: Mapping[str, Any] | None, folder: Path) -> dict[str, Any]:
    if base is None or "init_args" not in base:
        raise AdapterError(f"{folder.name} was written by PEFT itself and does not say which plans and labels it "
                           f"belongs to; give a whole checkpoint_final.pth as its base.")
    return {"format": 2, "version": __version__, "method": "PEFT", "options": None, "donor": None, "label_map": None,
            "start_dice": {}, "base_sha256": weights_sha256(base["network_weights"]),
            **{key: base[key] for key in _STOCK if key in base}}
