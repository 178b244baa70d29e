"""Read torch files of unknown origin: check the file before torch reads it, and check the tensors afterwards.

`torch.load(weights_only=True)` runs no code from the file. But it ignores the checksums, unpacks compressed entries
without a limit, and calls the functions that it allows with any arguments: a pickle of 60 bytes can ask for 2 GB (seen
in torch 2.15). So `foreign_names` goes through the file first, and `load` reads it only then.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..files import MAX_JSON_BYTES, bounded

_NUMERIC_DTYPES = ("Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64",
                   "Float16", "Float32", "Float64")
_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_DTYPE_STATE = (None, None, None, -1, -1, 0)  # the pickled state of a dtype of plain numbers
_DTYPES = {f"torch.{name}": getattr(torch, name) for name in (
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")}
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in {
    "Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32,
    "Long": torch.int64, "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32,
    "Double": torch.float64}.items()} | {"torch.storage.UntypedStorage": torch.uint8}
_MAX_ARGUMENT = 64  # largest length of an argument: a device's name, the bytes of a scalar, the shape of a tensor
_LEGACY_HEADER = 3  # before torch 1.6, three pickles come before the content: magic number, protocol, system


def allow_list() -> list[Any]:
    """Return what torch must allow beyond its own safe types, so that it reads what nnU-Net's `save_checkpoint` writes.

    These are numeric numpy scalars and their dtypes, because nnU-Net logs Dice and losses as numpy scalars. numpy 1
    pickles the constructor of a scalar as `numpy.core.multiarray.scalar`, numpy 2 as `numpy._core.multiarray.scalar`.
    Each version must read the files of both, so both names stand for the constructor of the installed numpy. Arrays
    and the dtypes of objects and texts are not allowed, because no checkpoint of nnU-Net needs them.
    """
    scalar = np.float64(0.0).__reduce__()[0]
    dtypes = [getattr(np.dtypes, f"{name}DType") for name in _NUMERIC_DTYPES]
    return [*((scalar, name) for name in _SCALARS), np.dtype, *dtypes]


class BoundedUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """An unpickler without the opcodes that reserve as much memory as the file claims, or that import by number.

    It is derived from the unpickler written in Python. In the one written in C, five bytes of a file can make the table
    of known objects 64 GB large.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        if bytes([code]) not in (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4)}

    def load_build(self) -> None:
        """Ignore the state that a pickle gives to an object, and refuse it where torch writes none.

        A state replaces attributes. With it, a file could replace the methods of an OrderedDict, or change a function.
        """
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, OrderedDict):
            if not isinstance(state, dict) or set(state) - {"_metadata"}:
                raise ValueError("an OrderedDict has a state")
        elif isinstance(built, (Inert, _Mark)):
            built.__setstate__(state)
        else:
            raise ValueError(f"a {type(built).__name__} has a state")

    dispatch[pickle.BUILD[0]] = load_build


class Inert:
    """Takes the place of a foreign class or function; it accepts any arguments and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def _nothing(self, *_: Any) -> None:
        pass

    append = extend = __setitem__ = _nothing


class _UnusualCall(ValueError):
    """The file calls a function that is allowed, but with arguments that torch never writes."""


class _Mark:
    """Takes the place of an allowed class or function, or of an object that calling it returned."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def __call__(self, *arguments: Any) -> Any:
        sized = (str, bytes, list, tuple, dict)
        if not _CALLS[self.name](arguments) or any(len(a) > _MAX_ARGUMENT for a in arguments if isinstance(a, sized)):
            raise _UnusualCall(f"{self.name}{arguments!r:.80}")
        return OrderedDict() if self.name == "collections.OrderedDict" else _Mark(f"{self.name}()")

    def __setstate__(self, state: Any) -> None:
        if self.name != "numpy.dtype()" or state[2:] != _DTYPE_STATE:
            raise ValueError(f"{self.name} has a state")


def _is(value: Any, name: str) -> bool:
    return isinstance(value, _Mark) and value.name == name


_CALLS: dict[str, Callable[[tuple], bool]] = {
    "collections.OrderedDict": lambda a: a == (),
    "torch._utils._rebuild_tensor_v2": lambda a: _is(a[0], "storage") and not any(a[5:]),  # no hooks, no metadata
    "torch._utils._rebuild_parameter": lambda a: _is(a[0], "torch._utils._rebuild_tensor_v2()") and not any(a[2:]),
    "torch.device": lambda a: all(isinstance(v, (str, int)) for v in a),
    "_codecs.encode": lambda a: a[1:] == ("latin1",),
    "numpy.dtype": lambda a: bool(re.fullmatch(r"[biuf][1248]", a[0])),
    **dict.fromkeys(_SCALARS, lambda a: _is(a[0], "numpy.dtype()"))}


class _Scan(BoundedUnpickler):
    """Go through a pickle as torch would, but build nothing; collect foreign names, and the size of each storage.

    foreign: names that are not allowed, in the order in which they come.
    storages: key -> size in bytes that the pickle claims.
    """

    def __init__(self, stream: BinaryIO):
        super().__init__(stream)
        self.foreign: dict[str, None] = {}
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _CALLS or full in _DTYPES or full in _STORAGES:
            return _Mark(full)
        self.foreign[full] = None
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, location, numel, *views = pid
        if kind != "storage" or not isinstance(key, str) or not isinstance(location, str) or any(views) or numel < 0:
            raise ValueError(f"it names {pid!r} where torch names a storage")
        size = int(numel) * _STORAGES[storage.name].itemsize
        if self.storages.setdefault(key, size) != size:
            raise ValueError(f"it gives storage {key!r} two sizes")
        return _Mark("storage")


def foreign_names(stream: BinaryIO) -> tuple[str, ...]:
    """Return the names that a torch file or pickle imports, without those that nnU-Net's checkpoints need.

    Nothing is imported or executed. The position in the stream does not change.

    Raises:
        Exception: any error, if the file is damaged, not written by `torch.save`, or claims more than it holds.
    """
    start = stream.tell()
    found: dict[str, None] = {}
    try:
        _scan(stream, found)
    except _UnusualCall as error:
        found[str(error)] = None
    except Exception:
        if not found:
            raise
    finally:
        stream.seek(start)
    return tuple(found)


def _scan(stream: BinaryIO, found: dict[str, None]) -> None:
    if zipfile.is_zipfile(stream):
        _scan_zip(stream, found)
        return
    stream.seek(0)
    stream = io.BytesIO(stream.read())  # reading from memory allocates no more bytes than there are
    for _ in range(_LEGACY_HEADER):
        _load(stream, found)
    scan = _load(stream, found)
    _load(stream, found)
    position = stream.tell()
    if sum(scan.storages.values()) > stream.seek(0, io.SEEK_END) - position:
        raise ValueError("it claims more numbers than it holds")


def _load(stream: BinaryIO, found: dict[str, None]) -> _Scan:
    scan = _Scan(stream)
    scan.foreign = found
    scan.load()
    return scan


def _scan_zip(stream: BinaryIO, found: dict[str, None]) -> None:
    _check_directory(stream)
    with zipfile.ZipFile(stream) as archive:
        listed, entries = archive.infolist(), {e.filename: e for e in archive.infolist()}
        size, folder = stream.seek(0, io.SEEK_END), listed[0].filename.split("/")[0]
        if (len({name.casefold() for name in entries}) < len(listed) or min(e.header_offset for e in listed) != 0
                or any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in listed)
                or sum(e.file_size for e in listed) > size):
            raise ValueError("its entries overlap, are compressed or share a name")
        pickled = entries[f"{folder}/data.pkl"]
        if pickled.file_size > MAX_JSON_BYTES:
            raise ValueError(f"its pickle has {pickled.file_size} bytes")
        scan = _load(io.BytesIO(archive.read(pickled)), found)
        if found:
            return
        for key, claimed in scan.storages.items():
            if entries[f"{folder}/data/{key}"].file_size != claimed:
                raise ValueError(f"it claims {claimed} bytes for storage {key}")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")


def _check_directory(stream: BinaryIO) -> None:
    """Refuse a zip file in which Python and torch would find different lists of entries."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - 98))
    tail = stream.read().rjust(98, b"\0")
    signature, *_, length, offset, comment = struct.unpack("<4s4H2LH", tail[76:])
    end = size - 22
    if tail[56:60] == b"PK\6\7":
        signature64, length, offset = *struct.unpack("<4s", tail[:4]), *struct.unpack("<2Q", tail[40:56])
        end = size - 98
        if signature64 != b"PK\6\6" or struct.unpack("<Q", tail[64:72])[0] != end:
            raise ValueError("its list of entries is not where torch writes it")
    if signature != b"PK\5\6" or comment or offset + length != end:
        raise ValueError("its list of entries is not where torch writes it")


def load(stream: BinaryIO) -> Any:
    """Return the content of a torch file, with its tensors on the CPU. Call `foreign_names` first.

    Raises:
        Exception: any error, if torch cannot read the file, or it holds something that no checkpoint holds.
    """
    with torch.serialization.safe_globals(allow_list()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of pickle protocols and old formats, which the user cannot change
        content = torch.load(stream, map_location="cpu", weights_only=True)
    check_tensors([leaf for leaf in bounded(content) if isinstance(leaf, Tensor)])
    return content


def check_tensors(tensors: list[Tensor]) -> None:
    """Refuse tensors that claim to be larger than their memory; copying one of them could need all memory there is.

    Raises:
        ValueError: there is such a tensor, or one that does not hold plain numbers on the CPU.
    """
    views, storages = dict[object, int](), dict[int, int]()
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.dtype not in _DTYPES.values():
            raise ValueError(f"it holds a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}")
        size, storage = tensor.numel() * tensor.element_size(), tensor.untyped_storage()
        views[tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype] = size
        storages[storage.data_ptr()] = storage.nbytes()
        if size > storage.nbytes():
            raise ValueError(f"it holds a tensor of {size} bytes in a storage of {storage.nbytes()}")
    if sum(views.values()) > 4 * sum(storages.values()):
        raise ValueError("its tensors overlap")
