"""NIfTI files whose header claims something else than what follows."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Iterator

Change = Callable[[bytearray], bytes | None]

_HEADERS: dict[str, tuple[int, str, tuple]] = {  # name -> byte, format, values
    "32767 voxels an axis": (40, "<4h", (3, 32767, 32767, 32767)), "no voxels": (40, "<4h", (3, 0, 12, 12)),
    "negative size": (40, "<4h", (3, -12, 12, 12)), "seven axes": (40, "<8h", (7, 12, 12, 12, 100, 100, 100, 100)),
    "9 axes": (40, "<h", (9,)), "no axes": (40, "<h", (0,)), "other kind of numbers": (70, "<2h", (1536, 128)),
    "complex numbers": (70, "<2h", (1792, 128)), "unknown kind of numbers": (70, "<2h", (7, 7)),
    "no spacing": (76, "<4f", (1.0, 0.0, 0.0, 0.0)), "spacing nan": (76, "<4f", (1.0, *[float("nan")] * 3)),
    "negative spacing": (76, "<4f", (1.0, -1.0, -1.0, -1.0)), "offset 2**40": (108, "<f", (2.0**40,)),
    "negative offset": (108, "<f", (-352.0,)), "offset nan": (108, "<f", (float("nan"),)),
    "scale nan": (112, "<2f", (float("nan"), float("inf"))), "no directions": (280, "<12f", (0.0,) * 12),
    "directions nan": (280, "<12f", (float("nan"),) * 12), "other magic": (344, "<4s", (b"ni1\0",))}


def images() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """What makes a hostile .nii.gz from the content of a valid one, by name."""
    for name, (place, form, values) in _HEADERS.items():
        def write(content: bytes, p: int = place, f: str = form, v: tuple = values) -> bytes:
            changed = bytearray(content)
            struct.pack_into(f, changed, p, *v)
            return bytes(changed)
        yield name, lambda c, w=write: gzip.compress(w(c))
    yield "size that its end confirms", _confirmed
    yield "half a gigabyte after the image", lambda c: gzip.compress(c + bytes(1 << 29), 1)
    yield "many members", lambda c: gzip.compress(c) + gzip.compress(b"") * 10_000
    yield "not compressed", lambda c: c
    yield "empty", lambda _: b""
    yield "empty member", lambda _: gzip.compress(b"")
    yield "text", lambda _: b"NIfTI" * 1000
    for number in (3.0, -1.0, 1e9, float("nan"), float("inf")):
        yield f"voxels {number}", lambda c, n=number: gzip.compress(_as_floats(c, n))


def _confirmed(content: bytes) -> bytes:
    """A header of 32 TB, and an end that gives the same size modulo 2**32."""
    changed = bytearray(content)
    struct.pack_into("<4h", changed, 40, 3, 32767, 32767, 32767)
    size = struct.unpack_from("<h", changed, 72)[0] // 8
    return gzip.compress(bytes(changed))[:-4] + struct.pack("<I", (352 + size * 32767**3) % 2**32)


def _as_floats(content: bytes, number: float) -> bytes:
    header = bytearray(content[:352])
    struct.pack_into("<2h", header, 70, 16, 32)
    return bytes(header) + struct.pack("<f", number) * (12 * 12 * 12)
