"""Random damage: to bytes, to the entries of an archive, to JSON, to what a checkpoint holds."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from copy import copy
from random import Random
from typing import Any

import torch

EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 10**200, 0.5, 1e308, float("nan"), float("inf"), "", "0", "x",
    "../../escaped", "/etc/passwd", "C:\\x", "a/b", "\x00", "\x1b[2J", "\ud800", "é", "x" * 70_000, "os.system",
    "subprocess.Popen", "torch.nn.Linear", "torch.nn.modules.module.warnings.sys.exit", "*" * 50, [], {}, [[]], [None],
    [0], [-1, 2, 3], [10**9] * 3, ["a", "b"], {"a": 1}, {"0": None}, [1] * 3000)


def damaged(content: bytes, rng: Random) -> bytes:
    """One to four changes of bytes; half of the time the end is cut off, too."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _damage(data, rng)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data) + 1):]
    return bytes(data)


def _damage(data: bytearray, rng: Random) -> None:
    if not data:
        return
    place, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 16, 200))
    kind = rng.randrange(8)
    if kind <= 1:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[place:place + length] = rng.randbytes(length)
    elif kind == 3:
        data[place:place + length] = bytes(length)
    elif kind == 4:
        del data[place:place + length]
    elif kind == 5:
        data[place:place] = rng.randbytes(length)
    elif kind == 6:
        data[place:place] = data[place:place + length] * rng.choice((1, 50))
    else:
        size, value = rng.choice((("<H", 2), ("<I", 4), ("<Q", 8))), rng.choice(EXTREMES)
        data[place:place + size[1]] = struct.pack(size[0], value & (1 << 8 * size[1]) - 1)


def damaged_entry(content: bytes, rng: Random) -> bytes:
    """Damage inside one entry of a zip, with right checksums: what a checksum cannot find."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", old.infolist()[0].compress_type) as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith((".pkl", ".json"))]
        chosen = rng.choice(pickles if pickles and rng.random() < 0.7 else names)
        for name in names:
            data = old.read(name)
            new.writestr(name, damaged(data, rng) if name == chosen else data)
    return stream.getvalue()


def changed(content: Any, rng: Random, *, leaf: Callable[[Any, Random], Any] = lambda v, _: v) -> Any:
    """A copy of nested dicts and lists with one to three nodes replaced, dropped, renamed, doubled or swapped."""
    content = _copied(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(content))
        if places:
            _change(content, *rng.choice(places), places, rng, leaf)
    return content


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        new = copy(value)
        for key in new:
            new[key] = _copied(new[key])
        return new
    return [_copied(v) for v in value] if isinstance(value, list) else value


def _places(value: Any) -> Any:
    """(container, key) of every node below `value`."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _change(content: Any, container: Any, key: Any, places: list, rng: Random, leaf: Callable) -> None:
    kind = rng.randrange(8)
    try:
        if kind <= 3:
            container[key] = copy(rng.choice(VALUES))
        elif kind == 4:
            del container[key]
        elif kind == 5 and isinstance(container, dict):
            container[rng.choice(("", "0", "9", "../x", "3d_fullres", "inherits_from", str(key) + "x"))] = container.pop(key)
        elif kind == 6:
            other, name = rng.choice(places)
            container[key] = _copied(other[name])
        elif rng.random() < 0.5:
            container[key] = [container[key]] * rng.choice((2, 100))
        else:
            container[key] = leaf(container[key], rng)
    except (KeyError, IndexError):  # an earlier change removed the place
        pass


def odd_tensor(value: Any, rng: Random) -> Any:
    """Another tensor in place of one: shape, kind, view, or numbers that no training leaves."""
    if not isinstance(value, torch.Tensor):
        return rng.choice((torch.zeros(3), torch.tensor(7), value))
    if value.numel() > 10**6:  # a view from an earlier change: numbers of its own would fill the memory
        return value
    return rng.choice((
        lambda: value.half(), lambda: value.double(), lambda: value.to(torch.int64), lambda: value.flatten(),
        lambda: value[:1], lambda: value * float("nan"), lambda: torch.zeros(1).expand(10**6, 10**6), lambda: value.bool(),
        lambda: torch.zeros(10**5, 10**5, device="meta"), lambda: value.to_sparse(), lambda: value.to(torch.complex64),
        lambda: torch.nn.Parameter(value) if value.is_floating_point() else value, lambda: torch.zeros(0),
        lambda: value.transpose(0, -1) if value.ndim > 1 else value, lambda: value.bfloat16()))()
