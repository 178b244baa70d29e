"""Tensors in messages: numpy's format, read within bounds, because what arrives may be damaged or made to do harm."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import torch

from ..errors import FederationError
from ..types import ReadOnlyStateDict, StateDict


def packed(tensors: ReadOnlyStateDict) -> dict[str, np.ndarray]:
    """Return the tensors as arrays on the CPU, ready to be sent."""
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}


def unpacked(content: Mapping[str, bytes], expected: ReadOnlyStateDict, *, whole: bool) -> StateDict:
    """Return the tensors of a message.

    Nothing is unpickled, and no memory is taken that a message claims and does not hold.

    Args:
        content: name -> a file in numpy's format (.npy).
        expected: name -> tensor with the shape and type that the message must have.
        whole: every expected name must be there; otherwise some may be missing.

    Raises:
        FederationError: a name, shape, type or length is another one; the message names the tensor.
    """
    if wrong := sorted(content.keys() - expected.keys() or (expected.keys() - content.keys() if whole else ())):
        what = "sends" if wrong[0] in content else "does not send"
        raise FederationError(f"it {what} {wrong[0][:200]!r} ({len(wrong)} names differ from those of this round)")
    return {name: _tensor(name, data, expected[name]) for name, data in content.items()}


def _tensor(name: str, data: bytes, expected: torch.Tensor) -> torch.Tensor:
    wanted = (tuple(expected.shape), np.dtype(str(expected.dtype).removeprefix("torch.")))
    stream = io.BytesIO(data[:4096])
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("it is another version of numpy's format")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        if (shape, dtype) != wanted:
            raise ValueError(f"it has shape {shape!r:.80} and type {dtype!r:.80}, and not {wanted[0]} and {wanted[1]}")
        if len(data) - stream.tell() != expected.nbytes:
            raise ValueError(f"it has {len(data) - stream.tell()} bytes, and not {expected.nbytes}")
        values = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if by_columns else "C")
    except Exception as error:  # numpy may raise anything on a damaged header
        raise FederationError(f"{name} cannot be read ({error})") from error
    return torch.from_numpy(np.array(values, order="C"))
