"""Checkpoint files: read them without running code from them, write them whole or not at all, and hash them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, DanteError, DonorError, UntrustedFileError
from ..files import atomic_path
from ..types import PathLike, ReadOnlyStateDict, StateDict
from .torch_file import foreign_names, load

# The first bytes of NRRD, MHA, PNG, JPEG, TIFF (two kinds) and BMP.
_IMAGES = (b"NRRD", b"ObjectType", b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM")


def load_checkpoint_safely(path: PathLike, *, trust: bool = False) -> dict[str, Any]:
    """Return the dict in a torch file, with its tensors on the CPU, after the checks of `torch_file.py`.

    The file may hold tensors, dicts, lists, tuples, numbers, strings, torch.device, torch.dtype and numeric numpy
    scalars.

    trust: unpickle the file without any check, which runs the code that it holds.

    Raises:
        UntrustedFileError: the file holds something else; no code from it was executed.
        DonorError: the file is missing, is damaged, is no torch file, claims more than it holds, or holds no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise DonorError(f"Checkpoint {path} does not exist; give the path of a .pth file written by nnU-Net.")
    try:
        with path.open("rb") as stream:
            if not trust and (foreign := foreign_names(stream)):
                raise _refusal(path, foreign)
            content = torch.load(path, map_location="cpu", weights_only=False) if trust else load(stream)
    except DanteError:
        raise
    except Exception as error:  # whatever zipfile, pickle and torch raise on damaged and hostile files
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise DonorError(f"{path.name} holds a {type(content).__name__}, not the dict that nnU-Net's save_checkpoint "
                         "writes; give a checkpoint_*.pth of an nnU-Net v2 training.")
    return content


def _refusal(path: Path, foreign: tuple[str, ...]) -> UntrustedFileError:
    return UntrustedFileError(
        f"{path.name} cannot be read safely: it asks for {', '.join(foreign[:3])}, and reading that would execute code "
        "from the file. Nothing was executed. nnU-Net's own checkpoints hold only tensors, numbers, strings and "
        "containers. If you know who made this file and trust them, say so with --trust (Python: trust=True).")


def _damaged(path: Path, detail: str) -> DonorError:
    if _is_image(path):
        return DonorError(f"{path.name} is an image, and no model. Give a model folder, a zip that nnU-Net exported, "
                          "or a checkpoint .pth. Commands for images take their folder: `nnunet-dante dataset FOLDER "
                          "-d 1 -n Look --dry-run` says what is in it, and `nnunet-dante predict MODEL FOLDER "
                          "-o MASKS` segments.")
    return DonorError(f"{path.name} ({path.stat().st_size} bytes) is truncated, damaged or no torch file "
                      f"({detail.splitlines()[0][:200]}). Copy or download it again and compare its size.")


def _is_image(path: Path) -> bool:
    """Return whether a file is an image, by its first bytes, or by its name where it is a compressed NIfTI."""
    with path.open("rb") as stream:
        head = stream.read(348)
    return (path.name.lower().endswith(".nii.gz") or head[128:132] == b"DICM" or head[344:347] in (b"n+1", b"ni1")
            or head.startswith(_IMAGES))


def weights_of(content: Mapping[Any, Any]) -> StateDict | None:
    """Return the weights in the content of a checkpoint file; None if it has none.

    nnU-Net stores them as "network_weights". Other tools store them as "state_dict" or "model", or nothing else.
    """
    for found in (content.get("network_weights"), content.get("state_dict"), content.get("model"), content):
        if isinstance(found, dict) and found and all(
                isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
            return found
    return None


def save_atomically(obj: object, path: PathLike) -> None:
    """Save like `torch.save`, but leave either the old file or the whole new one; equal content gives equal bytes."""
    # If torch is given a path, it writes the name of the file into the archive. That of a temporary file is random.
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        torch.save(obj, stream)


def file_sha256(path: PathLike) -> str:
    """Return the SHA-256 of a file's bytes, as hex digits."""
    with Path(path).open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def alias_sets(state: ReadOnlyStateDict) -> dict[str, tuple[str, ...]]:
    """Return {first key of a tensor: all of its keys}, in the order of `state`.

    nnU-Net's networks register a weight under up to four names, so a state dict of 48 tensors can have 136 keys.
    """
    sets: dict[object, list[str]] = {}
    for key, tensor in state.items():
        # An empty tensor has no address of its own, so it is never taken for the same as another.
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else key
        sets.setdefault(place, []).append(key)
    return {keys[0]: tuple(keys) for keys in sets.values()}


def unique_tensors(state: ReadOnlyStateDict) -> StateDict:
    """Return each tensor of `state` once, under the first of its keys."""
    return {key: state[key] for key in alias_sets(state)}


def replaced(weights: ReadOnlyStateDict, values: ReadOnlyStateDict) -> StateDict:
    """Return `weights` in the same order, with each of `values` under all names of the tensor that it replaces."""
    result = dict(weights)
    for names in alias_sets(weights).values():
        for tensor in (values[name] for name in names if name in values):
            result |= dict.fromkeys(names, tensor)
    return result


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of tensors that hold NaN or infinite numbers; a GPU is waited for only once."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not named:
        return []
    # If there is a NaN, the smallest and the largest number are NaN. On a CPU, this takes a tenth of isfinite's time.
    extremes = torch.stack([torch.stack(torch.aminmax(tensor.detach())) for _, tensor in named])
    return [name for (name, _), finite in zip(named, extremes.isfinite().all(1).tolist()) if not finite]


def weights_sha256(state: ReadOnlyStateDict) -> str:
    """Return the SHA-256 over (name, dtype, shape, bytes) of the unique tensors, sorted by name, as hex digits.

    It is the same for a full state dict and for its unique tensors alone, on any device, before and after saving.

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
        digest.update(flat.view(torch.uint8).numpy().tobytes())  # as bytes, because numpy has no bfloat16
    return digest.hexdigest()
