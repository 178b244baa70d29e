"""The weighted sum of several adapters of one base, as one adapter: model soups and task arithmetic.

What an adapter does to a weight W is an update U: W -> W + U. The sum has W + w_1 U_1 + w_2 U_2 + ..., exactly. Weights
1 / n average trainings that learned the same task (Wortsman 2022, arXiv 2203.05482), such as the folds of one
cross-validation; weights of 1 add what was learned in different tasks (Ilharco 2023, arXiv 2212.04089). Averaging
factors would be neither: the mean of products is not the product of means.

Factors of LoRA are stacked: n updates of rank r are one of rank n r, as long as that costs less than the weight itself.
Every other tensor that differs is stored in full, which needs the base unless the weights add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError
from ..models.checkpoint import load_checkpoint_safely, not_finite, weights_sha256
from ..models.labels import head_names
from ..peft.low_rank import capped_rank
from ..types import PathLike, StateDict
from .adapter import checkpoint_weights, updated_weight
from .file import FORMAT, read_adapter, write_adapter
from .hf_peft import CONFIG


def merge(adapters: Sequence[PathLike], output: PathLike, *, weights: Sequence[float] | None = None,
          base: PathLike | None = None) -> str:
    """Write the weighted sum of adapters that were trained on one base, and return what it is in a sentence.

    Args:
        adapters: two or more adapter files, or folders of Hugging Face PEFT.
        output: the adapter file to write.
        weights: one number for each adapter; by default 1 / n each, the average.
        base: checkpoint with the start weights of the trainings, as `nnunet-dante transfer` writes it. Needed where
            the weights do not add up to 1, where adapters are of different kinds, for DoRA, for folders of PEFT, and
            where stacked factors would cost more than the weight itself; a message then asks for it.

    Raises:
        AdapterError: the adapters were trained on different bases or labels, the base is missing or another one, the
            numbers of weights and adapters differ, or the sum is not finite.
    """
    paths = [Path(path) for path in adapters]
    shares = _checked_shares(paths, weights)
    content = None if base is None else load_checkpoint_safely(base)
    start = None if content is None else checkpoint_weights(content, str(base))
    read = _read(paths, content)
    if start is not None and weights_sha256(start) != (wanted := read[0][0]["base_sha256"]):
        raise AdapterError(f"{Path(str(base)).name} is not the base of these adapters (sha256 {wanted[:12]}...); give "
                           "the start weights of their trainings.")
    updates, tensors = _summed(shares, read, start)
    if odd := not_finite(tensors.items()):
        raise AdapterError(f"the sum of {odd[0]} is infinite or not a number: the weights {_listed(shares)} are too "
                           "large, or one of the files is damaged.")
    sources = [f"{share:g} x {path.name}: {_training(metadata)}"
               for share, path, (metadata, _) in zip(shares, paths, read)]
    options = {"methods": [metadata["method"] for metadata, _ in read], "weights": shares, "sources": sources}
    write_adapter({**read[0][0], "format": FORMAT, "method": "merge", "updates": updates, "options": options,
                   "strength": None, "start_dice": None}, tensors, output)
    return (f"{Path(output).name}: {' + '.join(sources)}; {len(updates)} weights as factors, "
            f"{len(_full(tensors, updates))} in full")


def _summed(shares: Sequence[float], read: Sequence[tuple[dict[str, Any], StateDict]],
            start: StateDict | None) -> tuple[dict[str, dict[str, Any]], StateDict]:
    """Return the settings of the sum's updates, and all of its tensors."""
    updates: dict[str, dict[str, Any]] = {}
    tensors: StateDict = {}
    for name in sorted({name for metadata, found in read for name in _changed(metadata, found)}):
        parts = [_Part(share, metadata["updates"].get(name), found, name)
                 for share, (metadata, found) in zip(shares, read) if name in _changed(metadata, found)]
        try:
            if stacked := _stacked(parts):
                updates[name], factors = stacked
                tensors |= {f"{name}.{factor}": tensor for factor, tensor in factors.items()}
            else:
                tensors[name] = _in_full(parts, start)
        except AdapterError:
            raise
        except Exception as error:  # whatever settings and shapes, which come from the files, raise
            raise AdapterError(f"the updates of {name} cannot be added ({type(error).__name__}: {error}); one of the "
                               "files is damaged: copy them again.") from error
    return updates, tensors


def _checked_shares(paths: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    """Return the weight of each adapter; by default they are averaged."""
    if len(paths) < 2:
        raise AdapterError(f"a sum needs at least two adapters, and {len(paths)} was given"
                           f"{f' ({paths[0].name})' if paths else ''}; give two or more files adapter.safetensors.")
    shares = [1 / len(paths)] * len(paths) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(paths) or not all(map(math.isfinite, shares)):
        raise AdapterError(f"{len(paths)} adapters and the weights {_listed(shares)} were given; give one finite "
                           "number for each adapter.")
    if not any(shares):
        raise AdapterError(f"the weights are {_listed(shares)}, which adds nothing to the base; give at least one that "
                           "is not 0.")
    return shares


def _listed(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:g}" for share in shares)


def _read(paths: Sequence[Path], base: dict[str, Any] | None) -> list[tuple[dict[str, Any], StateDict]]:
    """Return metadata and tensors of each adapter, after a check that their updates can be added."""
    read = []
    for path in paths:
        if base is None and (path / CONFIG).is_file():
            raise AdapterError(f"{path.name} is a folder of PEFT, whose layers get their names from the base: give "
                               "--base with the start weights that `nnunet-dante transfer` wrote.")
        read.append(read_adapter(path, base=base))
        (first, _), (metadata, _) = read[0], read[-1]
        if metadata["base_sha256"] != first["base_sha256"]:
            raise AdapterError(f"{path} was trained on another base than {paths[0]}; updates of different bases cannot "
                               "be added. Give adapters of one donor, transferred to the same labels and channels.")
        if (here := _names(metadata, path)) != (there := _names(first, paths[0])):
            raise AdapterError(f"{path} was trained for the labels {', '.join(here)}, {paths[0]} for "
                               f"{', '.join(there)}; the sum would give the voxels of one label the name of another. "
                               "Give adapters with the same labels in the same order.")
    return read


def _names(metadata: dict[str, Any], path: Path) -> tuple[str, ...]:
    try:
        return head_names(metadata["init_args"]["dataset_json"])
    except Exception as error:  # whatever labels that are none raise
        raise AdapterError(f"{path} is damaged: its labels cannot be read ({error}). Copy it again.") from error


def _training(metadata: dict[str, Any]) -> str:
    """Return in words which training an adapter is of."""
    init = metadata["init_args"]
    value = (metadata.get("strength") or {}).get("value", 1)
    return (f"{metadata['method']}, {init['plans']['dataset_name']}, fold {init['fold']}"
            f"{'' if value == 1 else f', strength {value:g}'}")


@dataclass(frozen=True)
class _Part:
    """What one adapter does to one weight: its share, the settings of its update (None: trained in full), its file."""

    share: float
    settings: dict[str, Any] | None
    tensors: StateDict
    name: str

    def factor(self, factor: str) -> Tensor:
        return self.tensors[f"{self.name}.{factor}"].float()

    def value(self, start: Tensor) -> Tensor:
        """Return the weight with this adapter alone."""
        if self.settings is None:
            return self.tensors[self.name]
        return updated_weight(start, self.name, self.settings, self.tensors)


def _changed(metadata: dict[str, Any], tensors: StateDict) -> set[str]:
    """Return the names of the weights that an adapter changes."""
    return {*metadata["updates"], *_full(tensors, metadata["updates"])}


def _full(tensors: StateDict, updates: dict[str, Any]) -> list[str]:
    return [name for name in tensors if name.rpartition(".")[0] not in updates]


def _stacked(parts: list[_Part]) -> tuple[dict[str, Any], StateDict] | None:
    """Return settings and factors of the sum of low-rank updates; None where the weight in full costs less."""
    settings = [part.settings for part in parts if part.settings and part.settings["kind"] == "lora"]
    if len(settings) < len(parts) or len({update["factorisation"] for update in settings}) > 1:
        return None
    scaled = []
    for part, update in zip(parts, settings):
        root = math.sqrt if update.get("rank_stabilised") else float
        scale = part.share * update.get("strength", 1) * update["alpha"] / root(update["rank"])
        scaled.append(scale * part.factor("lora_A"))
    # With R the sum of the ranks: (K, out, R) and (K, R, in), or flat (out, R) and (R, in * K).
    a, b = torch.cat(scaled, dim=-1), torch.cat([part.factor("lora_B") for part in parts], dim=-2)
    rank, factorisation = a.shape[-1], settings[0]["factorisation"]
    shape = (a.shape[-2], b.shape[-1], *a.shape[:-2])  # all that the cost of a weight in full depends on
    if capped_rank(shape, rank, factorisation=factorisation) < rank:
        return None
    if not (a @ b).isfinite().all():
        raise ValueError("their sum is infinite")
    return ({"kind": "lora", "rank": rank, "alpha": float(rank), "factorisation": factorisation,
             "rank_stabilised": False}, {"lora_A": a.contiguous(), "lora_B": b.contiguous()})


def _in_full(parts: list[_Part], start: StateDict | None) -> Tensor:
    """Return the weight with the sum of all updates; an adapter that leaves it alone counts as the base."""
    name, rest = parts[0].name, 1 - sum(part.share for part in parts)
    base = None if start is None else start[name]
    if base is None and (abs(rest) > 1e-6 or any(part.settings for part in parts)):
        raise AdapterError(f"the sum of {name} needs the base: give --base with the start weights that `nnunet-dante "
                           "transfer` wrote (nnUNetDantePlans_CONFIGURATION_start.pth).")
    values = [part.value(base) for part in parts]  # type: ignore[arg-type]
    if not values[0].is_floating_point():
        return values[0]
    total = sum(part.share * value.double() for part, value in zip(parts, values))
    if base is not None:
        total = total + rest * base.double()
    return total.to(values[0].dtype)  # type: ignore[union-attr]
