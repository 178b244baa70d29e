"""Adapter files: small files with what a training changed, which also say to which base they belong.

Format 2 is a safetensors file. It holds "<weight name>.<factor>" for adapted weights, "<name>" for tensors that were
trained in full (norms, biases, stem, heads), and JSON in one metadata entry, "nnunet_dante". In it, "updates" has for
each adapted weight the kind of its factors and the arguments of their class. The kinds are "lora" (lora_A, lora_B),
"dora" (these and magnitude) and "conv_adapter" (pointwise). Names are stock keys; if a tensor has several, the first.
The base is identified by the hash of its weights (`weights_sha256`), and not of its file. "sha256" is a checksum of the
rest of the file, as safetensors files have none; older adapters lack it. Format 1 had only the kind "lora", with one
rank for all weights.

"strength" has the strength of the update as its "value". If it is not 1, "<name>" is the tensor at this strength, and
"trained:<name>" the same tensor at full strength, so that the strength can still be changed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import AdapterError
from ..files import atomic_path, parse_json
from ..models.checkpoint import weights_sha256
from ..types import PathLike, ReadOnlyStateDict, StateDict

FORMAT = 2
LOW_RANK = ("rank", "alpha", "factorisation")
_METADATA, _TRAINED = "nnunet_dante", "trained:"
_EXTRACT = ("Write the adapter from the checkpoint of its training: nnunet-dante adapter extract checkpoint_final.pth "
            "-o adapter.safetensors")


class _Plans(msgspec.Struct):
    dataset_name: Any


class _Dataset(msgspec.Struct):
    labels: dict[str, Any]


class _InitArgs(msgspec.Struct):
    plans: _Plans
    configuration: Any
    fold: Any
    dataset_json: _Dataset


class Stock(msgspec.Struct, kw_only=True):
    """What a checkpoint of nnU-Net says about its training.

    inference_allowed_mirroring_axes: None for no mirroring, UNSET if the checkpoint has no entry.
    """

    init_args: _InitArgs
    trainer_name: str
    inference_allowed_mirroring_axes: list[Literal[0, 1, 2]] | None | msgspec.UnsetType = msgspec.UNSET


class _Strength(msgspec.Struct):
    """The strength of an update, and its tensors at full strength that factors do not give."""

    value: Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]
    trained: dict[str, Any] = {}


class Header(Stock, kw_only=True):
    """The metadata of an adapter file, format 2; tensors of its strength are stored beside the others."""

    version: Any
    method: str
    options: dict[str, Any] | None
    base_sha256: str
    donor: dict[str, Any] | None
    label_map: Any
    start_dice: Any
    updates: dict[str, dict[str, Any]]
    strength: _Strength | None = None


STOCK = tuple(field for field in Stock.__struct_fields__ if field != "init_args")
IDENTITY = tuple(f for f in Header.__struct_fields__ if f not in (*Stock.__struct_fields__, "updates"))


def write_adapter(metadata: dict[str, Any], tensors: StateDict, path: PathLike) -> None:
    """Write an adapter file, the whole file or nothing.

    Raises:
        AdapterError: the metadata is incomplete, so that the file could not be read again.
    """
    check(metadata, Header, path)
    _refuse_two_strengths(metadata, path)
    strength = dict(metadata.get("strength") or {})
    tensors = tensors | {f"{_TRAINED}{name}": tensor for name, tensor in strength.pop("trained", {}).items()}
    metadata = {**metadata, "strength": strength or None}
    metadata["sha256"] = _checksum(metadata, tensors)
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={_METADATA: json.dumps(metadata)}))


def read_adapter(path: PathLike, *, base: dict[str, Any] | None = None) -> tuple[dict[str, Any], StateDict]:
    """Return metadata and tensors of an adapter file; the metadata of format 1 is converted to format 2.

    path: an adapter file, or a folder of PEFT.
    base: for a folder of PEFT, the checkpoint to which it belongs; it gives the names of the weights (`read_folder`).

    Raises:
        AdapterError: the file is missing, damaged, of another kind or of a newer format.
    """
    path = Path(path)
    if path.is_dir():
        from .hf_peft import CONFIG, read_folder

        if not (path / CONFIG).is_file():
            raise AdapterError(f"{path.name} is no folder of PEFT: it holds no {CONFIG}. {_EXTRACT}")
        metadata, tensors = read_folder(path, base)
        check(metadata, Header, path)
        return metadata, tensors
    if not path.is_file():
        raise AdapterError(f"adapter {path} does not exist; give the adapter.safetensors of a training.")
    if path.suffix in (".pth", ".pt"):
        raise AdapterError(f"{path.name} is a checkpoint, no adapter. {_EXTRACT}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = parse_json((file.metadata() or {}).get(_METADATA, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except Exception as error:  # safetensors may raise anything on damaged and unusual files
        raise AdapterError(f"{path.name} is damaged or no safetensors file ({error}); copy it again.") from error
    if not isinstance(metadata, dict):
        raise AdapterError(f"{path.name} is a safetensors file, but not an adapter of nnunet_dante.")
    if (checksum := metadata.pop("sha256", None)) not in (None, _checksum(metadata, tensors)):
        raise AdapterError(f"{path.name} does not hold what was written into it (checksum {str(checksum)[:12]}...); "
                           "copy it again.")
    if metadata.get("format") not in (1, FORMAT):
        raise AdapterError(f"{path.name} has adapter format {metadata.get('format')!r}, this version reads 1 and "
                           f"{FORMAT}; update nnunet-dante.")
    if metadata["format"] == 1:
        metadata |= {"updates": updates_of_format_1(metadata, tensors),
                     "options": {key: metadata.get(key) for key in LOW_RANK}}
    trained = {name: tensors.pop(name) for name in [*tensors] if name.startswith(_TRAINED)}
    if isinstance(strength := metadata.get("strength"), dict):
        strength["trained"] = {name.removeprefix(_TRAINED): tensor for name, tensor in trained.items()}
    check(metadata, Header, path)
    _refuse_two_strengths(metadata, path)
    return metadata, tensors


def _refuse_two_strengths(metadata: dict[str, Any], path: PathLike) -> None:
    value = (metadata.get("strength") or {}).get("value", 1)
    for name, settings in metadata["updates"].items():
        if (found := settings.get("strength", 1)) != value:
            raise AdapterError(f"{Path(path).name} is at strength {value!r}, and its update of {name} at {found!r}. "
                               f"{_EXTRACT}")


def _checksum(metadata: dict[str, Any], tensors: ReadOnlyStateDict) -> str:
    return hashlib.sha256(f"{json.dumps(metadata)}{weights_sha256(tensors)}".encode()).hexdigest()


def updates_of_format_1(metadata: dict[str, Any], tensors: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of each update of format 1, whose metadata has them once for all updates."""
    return {key.removesuffix(".lora_A"): {"kind": "lora", **{option: metadata.get(option) for option in LOW_RANK}}
            for key in tensors if key.endswith(".lora_A")}


def check(content: dict[str, Any], record: type[msgspec.Struct], path: PathLike) -> None:
    """Check that the content of a file has the fields of `record`; it may have more.

    Raises:
        AdapterError: names the first field that is missing or has another type.
    """
    try:
        msgspec.convert(content, record)
    except Exception as error:  # a ValidationError, or an error from a tensor where none should be
        raise AdapterError(f"{Path(path).name} is damaged: {error}. Copy it again, or make it again from the "
                           "checkpoint of its training.") from error


def are_tensors(value: Any) -> bool:
    """Return whether a value is a dict from names to tensors."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def are_updates(value: Any) -> bool:
    """Return whether a value is a dict from names to the settings of an update."""
    return isinstance(value, dict) and all(isinstance(settings, dict) for settings in value.values())
