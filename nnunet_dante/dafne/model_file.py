"""The .model file: a pickle of one flat dict. It is written completely or not at all; reading it executes nothing."""

from __future__ import annotations

import io
import mmap
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DafneError, UntrustedFileError
from ..files import atomic_path, bounded
from ..models.checkpoint import not_finite
from ..models.torch_file import BoundedUnpickler, Inert, check_tensors, foreign_names, load
from ..types import PathLike, StateDict
from .sources import settings_of

TYPE = "DynamicTorchModel"
_PICKLE = b"\x80"  # how a pickle of any protocol above 1 begins


class _Reader(BoundedUnpickler):
    """Loads weights. Any other class or function that the file asks for is recorded and replaced by `Inert`."""

    def __init__(self, stream: Any, size: int):
        super().__init__(stream)
        self.foreign: dict[str, None] = {}
        self.left = size

    def find_class(self, module: str, name: str) -> Any:
        known = {"collections.OrderedDict": _empty, "torch._utils._rebuild_tensor_v2": _tensor,
                 "torch.storage._load_from_bytes": self._storage}
        if (full := f"{module}.{name}") in known:
            return known[full]
        self.foreign[full] = None
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        return Inert()

    def _storage(self, content: bytes) -> Any:
        # What the pickle asks for is torch's own loader, which would unpickle `content` without any restriction.
        self.left -= len(content)
        if self.left < 0:
            raise ValueError("its weights are larger than the file")
        if names := foreign_names(io.BytesIO(content)):
            raise ValueError(f"its weights ask for {names[0]}")
        return load(io.BytesIO(content))


def _empty() -> OrderedDict:
    return OrderedDict()


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError("a tensor has no numbers")
    rebuild = torch._utils._rebuild_tensor_v2  # type: ignore[attr-defined]
    return rebuild(storage, offset, size, stride, False, OrderedDict())


def read(path: PathLike) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the dict in a .model file, and the names of the classes and functions that loading it would run.

    For files of nnunet-dante there are no such names. Foreign classes and functions are replaced by objects that do
    nothing, so no code of the file runs.

    Raises:
        DafneError: the file is missing, damaged or not a .model file.
    """
    path = Path(path)
    if not path.is_file():
        raise DafneError(f"{path} does not exist; give a .model file of Dafne.")
    with path.open("rb") as stream:
        if stream.read(1) != _PICKLE:
            raise DafneError(f"{path.name} is no .model file of Dafne; give one that `nnunet-dante export` or Dafne "
                             "wrote. `nnunet-dante inspect` says what other files hold.")
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            reader = _Reader(mapped, len(mapped))  # mapped, a claimed length allocates no more than there is
            content = reader.load()
        check_tensors([leaf for leaf in bounded(content) if isinstance(leaf, Tensor)])
    except Exception as error:  # whatever the unpickler and torch raise on damaged and hostile files
        raise DafneError(f"{path.name} ({path.stat().st_size} bytes) is damaged or no .model file of Dafne "
                         f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Copy or "
                         "download it again and compare its size.") from error
    if not isinstance(content, dict) or "model_id" not in content:
        raise DafneError(f"{path.name} holds a {type(content).__name__} that is no model of Dafne.")
    return content, tuple(reader.foreign)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A .model file of nnunet-dante.

    weights: each tensor once, under its first stock key. settings: as `settings_for` returns them.
    """

    model_id: str
    timestamp: int
    weights: StateDict
    settings: dict[str, Any]
    metadata: dict[str, Any]


def open_model(path: PathLike) -> Model:
    """Read a .model file of nnunet-dante, also after any number of rounds of learning and merging in Dafne.

    Raises:
        UntrustedFileError: reading the whole file would execute code.
        DafneError: another program wrote the file, it holds a difference and not a model, or it is damaged.
    """
    path = Path(path)
    content, foreign = read(path)
    source, weights = content.get("init_model_function"), content.get("weights")
    if kind := kind_of(content, foreign):
        error = UntrustedFileError if foreign and "nnunet-dante" not in str(source) else DafneError
        raise error(f"{path.name} is {kind}. Only files of `nnunet-dante export`, and what Dafne makes of them, can be "
                    f"read{f'; it asks for {foreign[0]}. Nothing was executed' if foreign else ''}.")
    settings = settings_of(str(source))
    if content.get("is_delta"):
        raise DafneError(f"{path.name} holds the difference between two models. Add it to its base in Dafne first.")
    if not isinstance(weights, dict) or not weights or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise DafneError(f"{path.name} holds no weights, so it was not written completely. Copy or download it again.")
    if bad := not_finite(weights.items()):
        raise DafneError(f"{path.name} holds NaN or infinite numbers in {bad[0]}; take an older version of the model.")
    timestamp, metadata = content.get("timestamp_id"), content.get("metadata")
    return Model(model_id=str(content["model_id"]), timestamp=timestamp if isinstance(timestamp, int) else 0,
                 weights=dict(weights), settings=settings, metadata=metadata if isinstance(metadata, dict) else {})


def kind_of(content: Mapping[str, Any], foreign: tuple[str, ...]) -> str:
    """Return what kind of model another program wrote; "" for a model of nnunet-dante."""
    source = str(content.get("init_model_function"))
    if content.get("type") == TYPE and "nnunet-dante" in source.split("\n", 1)[0] and not foreign:
        return ""
    if content.get("type", "DynamicDLModel") == "DynamicDLModel":
        return "a Keras (TensorFlow) model of Dafne"
    if "monai" in source.lower() or "dafne_inference" in source:
        return "a MONAI model that Dante wrote"
    return f"a model of type {content.get('type')!r} that another program wrote"


def write(path: PathLike, content: Mapping[str, Any]) -> None:
    """Write a dict as a .model file."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        pickle.dump(dict(content), stream, protocol=4)
