"""The .model file: one pickle of one flat dict, written whole or not at all, read without executing what is in it."""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DafneError, UntrustedFileError
from ..nnunet.checkpoint import atomic_path
from ..types import PathLike, StateDict
from .payload import settings_of

TYPE = "DynamicTorchModel"
_DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError,
           RuntimeError, struct.error, MemoryError, OverflowError)


def _storage(content: bytes) -> Any:
    # What the pickle asks for is torch's own loader, which would unpickle `content` without any restriction.
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


_ALLOWED = {("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,  # type: ignore[attr-defined]
            ("torch.storage", "_load_from_bytes"): _storage}


class _Inert:
    """Stands for a foreign class or function: takes anything, does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def _nothing(self, *_: Any) -> None:
        pass

    append = extend = __setitem__ = _nothing


class _Reader(pickle.Unpickler):
    def __init__(self, stream: Any):
        super().__init__(stream)
        self.foreign: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        self.foreign[f"{module}.{name}"] = None
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()


def read(path: PathLike) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the dict in a .model file and the names of what it would execute (empty for nnunet-dante's files).

    Foreign classes and functions are replaced by objects that do nothing; no code of the file runs.

    Raises:
        DafneError: the file is missing, damaged or no .model file.
    """
    path = Path(path)
    if not path.is_file():
        raise DafneError(f"{path} does not exist; give a .model file of Dafne.")
    with path.open("rb") as stream:
        reader = _Reader(stream)
        try:
            content = reader.load()
        except _DAMAGE as error:
            raise DafneError(f"{path.name} ({path.stat().st_size} bytes) is damaged or no .model file of Dafne "
                             f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Copy or "
                             "download it again and compare its size.") from error
    if not isinstance(content, dict) or "model_id" not in content:
        raise DafneError(f"{path.name} holds a {type(content).__name__} that is no model of Dafne.")
    return content, tuple(reader.foreign)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A .model file of nnunet-dante. weights: each once, by the first stock key. settings: see `settings.py`."""

    model_id: str
    timestamp: int
    weights: StateDict
    settings: dict[str, Any]
    metadata: dict[str, Any]


def open_model(path: PathLike) -> Model:
    """Read a .model file of nnunet-dante, also after any number of rounds in Dafne.

    Raises:
        UntrustedFileError: reading the file in full would execute code.
        DafneError: another program wrote it, it is a difference and no model, or it is damaged.
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
        raise DafneError(f"{path.name} holds the difference of two models. Add it to its base in Dafne first.")
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise DafneError(f"{path.name} holds no weights; it was not written completely. Get it again.")
    if bad := [k for k, v in weights.items() if not torch.isfinite(v).all()]:
        raise DafneError(f"{path.name} holds NaN or infinite numbers in {bad[0]}; take an older version of the model.")
    return Model(model_id=str(content["model_id"]), timestamp=int(content.get("timestamp_id") or 0),
                 weights=dict(weights), settings=settings, metadata=dict(content.get("metadata") or {}))


def kind_of(content: Mapping[str, Any], foreign: tuple[str, ...]) -> str:
    """Say whose model this is where it is not one of nnunet-dante; "" where it is."""
    source = str(content.get("init_model_function"))
    if content.get("type") == TYPE and "nnunet-dante" in source.split("\n", 1)[0] and not foreign:
        return ""
    if content.get("type", "DynamicDLModel") == "DynamicDLModel":
        return "a Keras (TensorFlow) model of Dafne"
    if "monai" in source.lower() or "dafne_inference" in source:
        return "a MONAI model that Dante wrote"
    return f"a model of type {content.get('type')!r} that another program wrote"


def write(path: PathLike, content: Mapping[str, Any]) -> None:
    """Write the dict of a .model file."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        pickle.dump(dict(content), stream, protocol=4)
