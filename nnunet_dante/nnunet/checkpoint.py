"""Checkpoint files: read without executing what is in them, write whole or not at all, identify by hash."""

from __future__ import annotations

import hashlib
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError, DonorError, UntrustedFileError
from ..files import atomic_path, write_text_atomically  # noqa: F401 - the latter for importers of this module
from ..types import PathLike, ReadOnlyStateDict, StateDict

_NUMERIC_DTYPES = ("Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64",
                   "Float16", "Float32", "Float64")
_OPENED_BY_TORCH = ("torch", "collections.OrderedDict", "_codecs.encode", "numpy.dtype")


def _allow_list() -> list[Any]:
    """What nnU-Net's `save_checkpoint` writes beyond torch's own safe types: numeric numpy scalars and their dtypes.

    nnU-Net logs Dice and losses as numpy scalars. numpy 1 pickles their constructor as `numpy.core.multiarray.scalar`,
    numpy 2 as `numpy._core.multiarray.scalar`; either file must open under either numpy, so both names map to the
    constructor at hand. Arrays, object and string dtypes are left out: no nnU-Net checkpoint needs them.
    """
    scalar = np.float64(0.0).__reduce__()[0]
    dtypes = [getattr(np.dtypes, f"{name}DType") for name in _NUMERIC_DTYPES]
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *dtypes]


def load_checkpoint_safely(path: PathLike, *, trust: bool = False) -> dict[str, Any]:
    """Read a torch file on the CPU with `weights_only=True` and the allow-list of this module.

    Allowed are torch's own safe types (tensors, containers, numbers, strings, torch.device, torch.dtype) and numeric
    numpy scalars. With `trust` the file is unpickled in full, which runs whatever code it holds.

    Raises:
        UntrustedFileError: the file holds something else; nothing of it was executed.
        DonorError: the file is missing, truncated or no torch file, or holds no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise DonorError(f"Checkpoint {path} does not exist; give the path of a .pth file written by nnU-Net.")
    try:
        with torch.serialization.safe_globals(_allow_list()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of protocols and old formats that are no concern of the user
            content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error), trust=trust) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, ImportError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise DonorError(f"{path.name} holds a {type(content).__name__}, not the dict that nnU-Net's save_checkpoint "
                         "writes; give a checkpoint_*.pth of an nnU-Net v2 training.")
    return content


def pickled_globals(path: PathLike) -> tuple[str, ...]:
    """Names ("module.attribute") of everything a torch file or pickle would import, read without unpickling it."""
    path = Path(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content = b"".join(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
    else:
        content = path.read_bytes()
    found: dict[str, None] = {}
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("GLOBAL", "INST"):
                found[str(argument).replace(" ", ".")] = None
            elif opcode.name == "STACK_GLOBAL":
                found[".".join(strings[-2:])] = None
            elif isinstance(argument, str):
                strings.append(argument)
    except Exception:  # whatever a damaged or hostile pickle makes pickletools raise: what was found so far counts
        return tuple(found)
    return tuple(found)


def _refusal(path: Path, message: str, *, trust: bool) -> DonorError:
    named = re.search(r"GLOBAL (\S+) was not an allowed", message)
    foreign = [named.group(1)] if named else [g for g in pickled_globals(path) if not g.startswith(_OPENED_BY_TORCH)]
    if trust or not foreign:
        return _damaged(path, message.strip().splitlines()[-1])
    return UntrustedFileError(
        f"{path.name} cannot be read safely: it asks for {', '.join(foreign[:3])}, and reading that would execute code "
        "from the file. Nothing was executed. nnU-Net's own checkpoints hold only tensors, numbers, strings and "
        "containers. If you know who made this file and trust them, say so with --trust (Python: trust=True).")


def _damaged(path: Path, detail: str) -> DonorError:
    return DonorError(f"{path.name} ({path.stat().st_size} bytes) is truncated, damaged or no torch file "
                      f"({detail.splitlines()[0][:200]}). Copy or download it again and compare its size.")


def save_atomically(obj: object, path: PathLike) -> None:
    """`torch.save` that leaves either the old file or the whole new one; equal content gives equal bytes."""
    # Given a path, torch writes its name into the archive, here that of the temporary file with a process id.
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        torch.save(obj, stream)


def file_sha256(path: PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def alias_sets(state: ReadOnlyStateDict) -> dict[str, tuple[str, ...]]:
    """Canonical key -> all keys of the same tensor; canonical is the first key in the order of `state`.

    nnU-Net's networks register one weight under up to four names, so a state dict of 48 tensors can have 136 keys.
    """
    sets: dict[object, list[str]] = {}
    for key, tensor in state.items():
        # An empty tensor has no address: it is its own set.
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else key
        sets.setdefault(place, []).append(key)
    return {keys[0]: tuple(keys) for keys in sets.values()}


def unique_tensors(state: ReadOnlyStateDict) -> StateDict:
    """The first key of every alias set -> its tensor."""
    return {key: state[key] for key in alias_sets(state)}


def weights_sha256(state: ReadOnlyStateDict) -> str:
    """Hex SHA-256 over (canonical name, dtype, shape, bytes) of the unique tensors, sorted by name.

    The same for a full state dict and for its unique tensors alone, on any device, before and after saving.

    Raises:
        ConfigurationError: a value is no tensor.
    """
    if foreign := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise ConfigurationError(f"Cannot hash weights: {foreign[0]!r} is a {type(state[foreign[0]]).__name__}, "
                                 "not a tensor. Give checkpoint['network_weights'].")
    digest = hashlib.sha256()
    for name, tensor in sorted(unique_tensors(state).items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())  # viewed as bytes: numpy knows no bfloat16
    return digest.hexdigest()
