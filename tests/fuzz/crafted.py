"""Attacks that somebody thought of. Each writes one file; what runs code would make the folder CANARY."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Attack = Callable[[Path, Path, Path], None]  # (samples, file to write, canary)


class Call:
    """Calls `function` when it is unpickled."""

    def __init__(self, function: Callable, *arguments: Any):
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def bomb(canary: Path) -> Call:
    return Call(os.mkdir, str(canary))


def raw_pickles(canary: Path) -> dict[str, bytes]:
    """Pickles of every way to name and to call a function, and of claims beyond what they hold."""
    path = str(canary).encode()
    text = b"X" + struct.pack("<I", len(path)) + path
    short = b"\x8c" + bytes([len(path)]) + path
    name = b"\x8c\x05posix\x8c\x05mkdir"
    return {
        "GLOBAL REDUCE": b"\x80\x02cposix\nmkdir\n" + text + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04" + name + b"\x93" + short + b"\x85R.",
        "STACK_GLOBAL from memo": b"\x80\x04" + name.replace(b"\x8c\x05mkdir", b"\x94\x8c\x05mkdir\x94") + b"00h\x00h\x01\x93"
                                  + short + b"\x85R.",
        "INST": b"(S'" + path + b"'\niposix\nmkdir\n.",
        "OBJ": b"(cposix\nmkdir\n" + text + b"o.",
        "NEWOBJ": b"\x80\x02cposix\nmkdir\n" + text + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + name + b"\x93" + short + b"\x85}\x92.",
        "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemscposix\nmkdir\nsb.",
        "EXT1": b"\x80\x02\x82\x01.", "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\ncbuiltins\nobject\nX\x0e\x00\x00\x00__subclasses__\x86R)R.",
        "eval": b"\x80\x02cbuiltins\neval\nX" + struct.pack("<I", len(path) + 30) + b"__import__('os').mkdir('" + path
                + b"')" + b"    " + b"\x85R.",
        "codecs": b"\x80\x02c_codecs\ndecode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
        "bytearray of 2 GB": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        "bytearray of 2 GB, Python 2": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        "memo 2**32": b"\x80\x02]r\xff\xff\xff\xff.", "put 2**40": b"]p1099511627776\n.",
        "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b".", "FRAME": b"\x80\x04\x95" + struct.pack("<Q", 2**40),
        "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", 2**36) + b".", "BINUNICODE8": b"\x80\x04\x8d" + struct.pack("<Q", 2**36),
        "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.", "INT of a million digits": b"I" + b"9" * 10**6 + b"\n.",
        "tuples a million deep": b")" + b"\x85" * 10**6 + b".", "lists a million deep": b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
        "marks": b"(" * 10**6 + b".", "pops": b"0" * 100 + b".", "a dict in itself": b"\x80\x02}q\x00K\x01h\x00s.",
        "storage without end": b"\x80\x02ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R.",
        "tensor of 2**62": b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86R.",
        "empty": b"", "STOP": b".", "NONE": b"N.", "persistent": b"\x80\x02X\x01\x00\x00\x00aQ."}


def laughs(depth: int = 12) -> list:
    """10**depth times "ha", in a few hundred bytes of pickle."""
    value: list = ["ha"]
    for _ in range(depth):
        value = [value] * 10
    return value


def itself() -> list:
    value: list = []
    value.append(value)
    return value


def _saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def _rezipped(content: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return stream.getvalue()


def checkpoints(canary: Path) -> Iterator[tuple[str, Callable[[Path], bytes]]]:
    """Hostile .pth files: name, and what makes the bytes from the folder of samples."""
    for name, pickled in raw_pickles(canary).items():
        yield f"pickle in a zip: {name}", lambda s, p=pickled: _rezipped(
            (s / "checkpoint.pth").read_bytes(), lambda n, d: p if n.endswith("data.pkl") else d)
        yield f"plain pickle: {name}", lambda _, p=pickled: p
        yield f"old format: {name}", lambda s, p=pickled: (s / "old.pth").read_bytes()[:100] + p
    base = torch.zeros(10**4)
    for legacy in (False, True):
        for name, value in (("code", bomb(canary)), ("10**12 words", laughs()), ("a list in itself", itself()),
                            ("surrogates", "\ud800"), ("expanded", torch.zeros(1).expand(10**7, 10**7)),
                            ("meta", torch.zeros(10**6, 10**6, device="meta")), ("sparse", torch.ones(3).to_sparse()),
                            ("overlapping", [base[i:] for i in range(500)])):
            for place in ("network_weights", "init_args", "dante", "more"):
                yield f"{name} as {place}{', old format' * legacy}", lambda s, v=value, p=place, old=legacy: _saved(
                    torch.load(s / "checkpoint.pth", weights_only=False) | {p: {"w": v} if p == "network_weights" else v},
                    _use_new_zipfile_serialization=not old)
    yield "compressed half gigabyte", lambda _: _rezipped(_saved({"network_weights": {"w": torch.zeros(2**27)}}), lambda n, d: d,
                                                     zipfile.ZIP_DEFLATED)
    for size in (0, 10, 10**6, 2**31 - 1):
        yield f"storage of {size}", lambda _, k=size: _rezipped(
            _saved({"network_weights": {"w": torch.ones(1000)}}), lambda n, d: d.replace(
                b"M\xe8\x03", b"J" + struct.pack("<i", k)) if n.endswith(".pkl") else d)
    yield "torchscript", lambda s: _rezipped((s / "checkpoint.pth").read_bytes(), lambda n, d: d).replace(
        b"/byteorder", b"/constants.pkl"[:10])
    yield "tar", lambda s: b"storages" + bytes(92) + b"0000644\0" * 3 + b"77777777777\0" * 2 + bytes(400)


def archives(canary: Path) -> Iterator[tuple[str, Callable[[Path], bytes]]]:
    """Hostile zips of model folders."""
    escape = canary.parent / "escaped"
    up = "../" * 12 + str(escape).lstrip("/")
    for name in (f"{escape}/plans.json", f"{up}/plans.json", up.replace("/", "\\") + "\\plans.json", "C:\\escaped\\plans.json",
                 "C:plans.json", "//host/share/plans.json", "\\\\?\\C:\\plans.json", "a/../../plans.json", "plans.json/plans.json",
                 "CON/plans.json", "a" * 300 + "/plans.json", "a\0b/plans.json", "./././plans.json", "plans.json/"):
        yield f"entry {name[:40]!r}", lambda _, n=name: _zip((n, b"{}"), ("m/fold_0/checkpoint_final.pth", b""))
    yield "bomb", lambda _: _zip(("m/plans.json", b"0" * (300 << 20)))
    yield "many bombs", lambda _: _zip(*((f"{i}/plans.json", b"[" * (20 << 20)) for i in range(10)))
    yield "bomb as checkpoint", lambda _: _zip(("m/plans.json", b"{}"), ("m/dataset.json", b"{}"),
                                               ("m/fold_0/checkpoint_final.pth", bytes(200 << 20)))
    yield "one entry under many names", _overlapping
    yield "link", lambda _: _link("m/plans.json", "/etc/passwd")
    yield "link as folder", lambda _: _link("m", str(escape.parent))
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"compression {kind}", lambda _, k=kind: _zip(("m/plans.json", b"0" * (50 << 20)), compression=k)
    yield "encrypted", lambda s: (s / "model.zip").read_bytes().replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0")
    yield "no entries", lambda _: b"PK\5\6" + bytes(18)
    yield "a million entries claimed", lambda _: b"PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2)


def _zip(*entries: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return stream.getvalue()


def _link(name: str, target: str) -> bytes:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(entry, target)
        archive.writestr(f"{name}/fold_0/checkpoint_final.pth" if name == "m" else "m/fold_0/checkpoint_final.pth", b"")
    return stream.getvalue()


def _overlapping(_: Path) -> bytes:
    """A thousand entries that share the data of one: 20 MB each."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("plans.json", b"[" * (20 << 20))
        first = archive.infolist()[0]
        for number in range(1000):
            entry = zipfile.ZipInfo(f"{number}/plans.json")
            for field in ("CRC", "compress_size", "file_size", "compress_type", "header_offset", "flag_bits"):
                setattr(entry, field, getattr(first, field))
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
    return stream.getvalue()


def texts() -> dict[str, str]:
    """JSON, TOML and other text that is hostile to parsers."""
    return {"deep lists": "[" * 10**6, "deep lists, closed": "[" * 10**5 + "]" * 10**5, "deep objects": '{"a":' * 10**5,
            "65 deep": "[" * 65 + "]" * 65, "million zeros": "[" + "0," * 10**6 + "0]", "ten million zeros": "[" + "0," * 10**7 + "0]",
            "digits": "9" * 10**6, "exponent": "1e999999999", "minus": "-" * 10**5, "surrogate": '{"labels": "\\ud800"}',
            "empty": "", "null": "null", "string": '"a"', "list": "[]", "object": "{}", "NUL": "\0" * 1000, "BOM": "\ufeff{}",
            "quotes": '"' * 10**5, "commas": "," * 10**5, "dots": "a." * 10**5 + "b = 1", "tables": "[a]\n" * 1000,
            "inline tables": "a = " + "{b = " * 10**4, "long line": "case," + "a" * 10**6, "keys": json.dumps(
                {"configurations": {str(i): {} for i in range(10**5)}})}


def models(canary: Path) -> Iterator[tuple[str, Callable[[Path], bytes]]]:
    """Hostile .model files."""
    run = f"import os\nos.mkdir({str(canary)!r})\n"
    for name, pickled in raw_pickles(canary).items():
        yield f"pickle: {name}", lambda _, p=pickled: p
        yield f"storage: {name}", lambda s, p=pickled: _model(s, weights={"w": Call(torch.storage._load_from_bytes, p)})
    for name, value in (("code", bomb(canary)), ("10**12 words", laughs()), ("a list in itself", itself()),
                        ("expanded", torch.zeros(1).expand(10**7, 10**7)), ("meta", torch.zeros(3, device="meta"))):
        for place in ("weights", "metadata", "model_id", "timestamp_id", "init_model_function", "type"):
            yield f"{name} as {place}", lambda s, v=value, p=place: _model(
                s, **{p: {"w": v} if p in ("weights", "metadata") else v})
    for name, source in (("code before", run), ("code in the settings", f"# nnunet-dante\ndef f():\n    SETTINGS = {{'a': {run!r}}}\n"),
                         ("call in the settings", "# nnunet-dante\ndef f():\n    SETTINGS = {'a': open('/etc/passwd')}\n"),
                         *((f"{word!r} a million times", f"# nnunet-dante\ndef f():\n    SETTINGS = {{'a': {word * 10**6}1}}\n")
                           for word in ("-", "1+", "a.", "(", "[", "not ", "lambda:", "1 if 1 else ", "'' ", "{1:"))):
        yield f"source: {name}", lambda s, t=source: _model(s, init_model_function=t)
        yield f"source: {name}, as nnunet-dante's", lambda s, t=source: _model(
            s, init_model_function=f"# nnunet-dante\n{run}{t}", apply_model_function=run)
    for name, stamp in (("10**300", 10**300), ("negative", -1), ("nan", float("nan")), ("text", "x")):
        yield f"timestamp {name}", lambda s, t=stamp: _model(s, timestamp_id=t)
    yield "one storage a thousand times", lambda s: _model(s, more=[Call(torch.storage._load_from_bytes, _LEGACY)] * 1000)


_LEGACY = _saved(torch.UntypedStorage(4000), _use_new_zipfile_serialization=False)


def _model(samples: Path, **changes: Any) -> bytes:
    with (samples / "Liver.model").open("rb") as stream:
        return pickle.dumps({**pickle.load(stream), **changes}, protocol=4)
