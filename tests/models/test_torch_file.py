"""torch_file.py: a torch file can neither run code, nor claim memory that it does not hold, nor be damaged unnoticed."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from nnunet_dante.errors import DonorError, UntrustedFileError
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.models.torch_file import BoundedUnpickler, check_tensors, foreign_names, load


def saved(content, *, legacy=False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def rewritten(content: bytes, change, compression=zipfile.ZIP_STORED) -> bytes:
    """The zip with change(name, data) in place of each entry's data."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return stream.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    return rewritten(saved({"w": torch.ones(1)}), lambda n, d: pickled if n.endswith("data.pkl") else d)


def call(module: str, name: str, argument: bytes) -> bytes:
    """A pickle of {0: module.name(argument)}."""
    return b"\x80\x02}K\x00c" + f"{module}\n{name}\n".encode() + argument + b"\x85Rs."


@pytest.fixture
def refused(tmp_path):
    def check(content: bytes, match: str, error=DonorError):
        path = tmp_path / "x.pth"
        path.write_bytes(content)
        with pytest.raises(error, match=match):
            load_checkpoint_safely(path)
    return check


@pytest.mark.parametrize("legacy", [False, True])
def test_what_trainings_save_is_read(legacy):
    content = {"state": torch.nn.Conv2d(1, 2, 3).state_dict(), "parameter": torch.nn.Parameter(torch.ones(2)),
               "device": torch.device("cpu"), "dtype": torch.float16, "empty": torch.zeros(0), "half": torch.ones(2).half(),
               "scalars": [np.float64(0.5), np.float32(1), np.int64(3), np.bool_(True)], "view": torch.ones(4, 4)[1:]}
    stream = io.BytesIO(saved(content, legacy=legacy))
    assert foreign_names(stream) == ()
    read = load(stream)
    assert read["scalars"] == content["scalars"] and read["device"] == content["device"]
    assert all(torch.equal(v, content["state"][k]) for k, v in read["state"].items())
    assert torch.equal(read["view"], content["view"]) and torch.equal(read["parameter"], content["parameter"])


def test_one_flipped_bit_in_the_weights_is_noticed(refused):
    content = bytearray(saved({"w": torch.arange(1000.0)}))
    content[content.find(struct.pack("<f", 500.0)) + 2] ^= 0x10
    refused(bytes(content), "checksum of .*data/0 is wrong")


def test_calls_that_allocate_what_they_are_asked_for_are_refused(refused):
    refused(with_pickle(call("builtins", "bytearray", b"J" + struct.pack("<i", 2**31 - 1))), "builtins.bytearray",
            UntrustedFileError)
    refused(with_pickle(call("torch.storage", "UntypedStorage", b"J" + struct.pack("<i", 2**31 - 1))), "UntypedStorage",
            DonorError)
    refused(with_pickle(b"\x80\x02cbuiltins\nbytearray\n(K\x01K\x02l\x85R."), "bytearray", UntrustedFileError)


def test_allowed_calls_with_odd_arguments_are_refused(refused):
    pairs = b"](" + b"(K\x01K\x02t" * 100 + b"e"
    refused(with_pickle(call("collections", "OrderedDict", pairs)), r"collections\.OrderedDict", UntrustedFileError)
    long = b"X" + struct.pack("<I", 100) + b"a" * 100
    refused(with_pickle(call("torch", "device", long)), r"torch\.device", UntrustedFileError)
    refused(with_pickle(call("numpy", "dtype", b"X\x01\x00\x00\x00O")), r"numpy\.dtype", UntrustedFileError)


def test_a_state_cannot_replace_methods(refused):
    state = b"}X\x04\x00\x00\x00keysK\x01s"
    refused(with_pickle(b"\x80\x02ccollections\nOrderedDict\n)R" + state + b"b."), "OrderedDict has a state")


def test_compressed_overlapping_and_oversized_entries_are_refused(refused):
    content = saved({"w": torch.zeros(100_000)})
    refused(rewritten(content, lambda _, d: d, zipfile.ZIP_DEFLATED), "compressed")
    with zipfile.ZipFile(stream := io.BytesIO(content), "a") as archive:
        archive.infolist()[0].file_size = archive.infolist()[0].compress_size = 10**9
        archive.writestr("archive/more", b"")
    refused(stream.getvalue(), "overlap")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(stream := io.BytesIO(content), "a") as archive:
        archive.writestr("archive/data.pkl", b"")
    refused(stream.getvalue(), "share a name")


def test_a_second_list_of_entries_for_torch_alone_is_refused(refused):
    """Python takes the list just before the end record, torch the one that the end record points to."""
    content = rewritten(saved({"w": torch.ones(1)}), lambda _, d: d)
    place = content.rfind(b"PK\5\6")
    offset = struct.unpack("<L", content[place + 16:place + 20])[0]
    refused(content[:place] + content[offset:place] + content[place:], "not where torch writes it")


@pytest.mark.parametrize("numel", [0, 999, 1001, 2**31 - 1])
def test_a_storage_of_another_size_than_its_entry_is_refused(refused, numel):
    def lie(name, data):
        return data.replace(b"M\xe8\x03", b"J" + struct.pack("<i", numel)) if name.endswith("data.pkl") else data

    refused(rewritten(saved({"w": torch.ones(1000)}), lie), "bytes for storage 0")


def test_the_old_format_cannot_claim_more_than_it_holds(refused):
    content = saved({"w": torch.ones(1000)}, legacy=True)
    refused(content.replace(b"M\xe8\x03", b"J" + struct.pack("<i", 10**9)), "claims more numbers than it holds")


@pytest.mark.parametrize("opcode", [pickle.BINUNICODE8, pickle.BINBYTES8])
def test_a_length_beyond_the_file_takes_no_memory(tmp_path, opcode):
    (tmp_path / "a.pth").write_bytes(b"\x80\x04" + opcode + struct.pack("<Q", 2**28) + b"x")
    tracemalloc.start()
    with (tmp_path / "a.pth").open("rb") as stream, pytest.raises(EOFError):
        foreign_names(stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(("tensor", "match"), [
    (torch.zeros(1).expand(10**6, 10**6), "bytes in a storage of 4"), (torch.zeros(2, 2, device="meta"), "."),
    (torch.ones(2, 2).to_sparse(), "."), (torch.ones(2, dtype=torch.complex64), ".")])
def test_tensors_that_are_no_plain_numbers_in_memory_are_refused(refused, tensor, match):
    refused(saved({"w": tensor}), match)


def test_overlapping_views_are_refused():
    base = torch.zeros(1000)
    check_tensors([base, base[:500], base[500:], base])
    with pytest.raises(ValueError, match="overlap"):
        check_tensors([base[i:] for i in range(20)])


def test_lists_that_would_print_for_ever_are_refused(refused):
    itself: list = []
    itself.append(itself)
    refused(saved({"a": itself}), "nested too deeply")
    laughs: list = ["ha"]
    for _ in range(30):
        laughs = [laughs] * 10  # the pickle names each list once: 10**30 entries in 700 bytes
    refused(saved({"a": laughs}), "too many")
    refused(saved({"a": ["x" * 2**16] * 2000}), "too many")


def test_claims_of_the_pickle_format_itself_are_refused():
    for hostile in (pickle.BYTEARRAY8 + struct.pack("<Q", 2**40), pickle.EXT4 + struct.pack("<I", 1)):
        with pytest.raises(KeyError):
            BoundedUnpickler(io.BytesIO(b"\x80\x05" + hostile + b".")).load()
    claimed = BoundedUnpickler(io.BytesIO(b"\x80\x02K\x07r\xff\xff\xff\xff."))  # object number 2**32 - 1
    assert claimed.load() == 7
