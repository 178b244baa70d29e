"""model_file.py: our files open without running anything; those of others are named, and never run."""

from __future__ import annotations

import io
import os
import pickle
import uuid
from collections import OrderedDict

import numpy as np
import pytest
import tiny
import torch
from shipped import settings_of

from nnunet_dante.dafne.importer import describe
from nnunet_dante.dafne.model_file import open_model, read, write
from nnunet_dante.dafne.sources import settings_of as read_settings
from nnunet_dante.dafne.sources import sources
from nnunet_dante.errors import DafneError, DanteError, UntrustedFileError
from nnunet_dante.models.checkpoint import unique_tensors
from nnunet_dante.models.donor import open_donor


@pytest.fixture
def content(tmp_path):
    folder = tiny.write_model_folder(tmp_path / "donor")
    return {"type": "DynamicTorchModel", "model_id": "one", "timestamp_id": 1_700_000_000, "is_delta": False,
            "data_dimensionality": 3, "metadata": {"categories": [["a"]]}, **sources(settings_of(folder)),
            "weights": OrderedDict(unique_tensors(open_donor(folder).weights))}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "Name.model"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_weights_settings_and_identity_come_back(content, path):
    write(path, content)
    model = open_model(path)
    assert (model.model_id, model.timestamp) == ("one", 1_700_000_000)
    assert model.settings["labels"][0]["name"] == "organ"
    assert list(model.weights) == list(content["weights"])
    assert all(torch.equal(v, content["weights"][k]) for k, v in model.weights.items())


def test_plain_pickle_reads_what_was_written(content, path):
    write(path, content)
    with path.open("rb") as stream:
        assert pickle.load(stream)["init_model_function"] == content["init_model_function"]


@pytest.mark.parametrize("place", ["metadata", "weights", "init_model_function", "more"])
def test_a_bomb_is_reported_and_not_run(content, path, tmp_path, place):
    write(path, content | {place: Bomb(tmp_path / "crater")})
    with pytest.raises(DanteError):
        open_model(path)
    assert "UNSAFE" in describe(path)
    assert f"{os.mkdir.__module__}.mkdir" in describe(path)
    assert not (tmp_path / "crater").exists()


def test_a_bomb_inside_a_tensors_storage_is_not_run(content, path, tmp_path):
    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Bomb(tmp_path / "crater")),)

    write(path, content | {"weights": {"a": Storage()}})
    with pytest.raises(DafneError):
        read(path)
    assert not (tmp_path / "crater").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"type": "DynamicDLModel", "weights": [np.zeros(3)]}, "Keras"),
    ({"model_id": uuid.uuid4(), "init_model_function": "def f():\n    from monai import x"}, "MONAI model that Dante"),
    ({"init_model_function": "def f():\n    pass"}, "another program"),
    ({"is_delta": True}, "difference between two models"),
    ({"weights": {}}, "no weights"),
    ({"weights": {"a": torch.tensor([np.nan])}}, "NaN")])
def test_files_that_cannot_be_imported_are_named(content, path, changes, message):
    write(path, content | changes)
    with pytest.raises(DanteError, match=message):
        open_model(path)


def test_dantes_files_are_untrusted_because_of_what_they_ask_for(content, path):
    write(path, content | {"model_id": uuid.uuid4(), "init_model_function": "from monai import x"})
    with pytest.raises(UntrustedFileError, match=r"uuid\.UUID\. Nothing was executed"):
        open_model(path)
    assert "a MONAI model that Dante wrote" in describe(path)


def test_a_pickle_cannot_change_the_functions_it_calls(content, path):
    function = torch._utils._rebuild_tensor_v2
    before = function.__defaults__
    state = b"N}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b"  # (None, {"__defaults__": (1,)})
    path.write_bytes(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + state + b".")
    with pytest.raises(DafneError, match="a function has a state"):
        read(path)
    assert function.__defaults__ == before


def test_weights_cannot_be_read_over_and_over(content, path):
    class Often:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (stored,)

    buffer = io.BytesIO()
    torch.save(torch.zeros(1000).storage(), buffer, _use_new_zipfile_serialization=False)
    stored = buffer.getvalue()
    write(path, content | {"more": [Often() for _ in range(1000)]})
    with pytest.raises(DafneError, match="larger than the file"):
        read(path)


def test_claims_of_the_pickle_format_take_no_memory(path):
    for claim in (pickle.LONG_BINPUT + b"\xff" * 4, pickle.BYTEARRAY8 + b"\0" * 5 + b"\1\0\0", pickle.BINBYTES8 + b"\0" * 5 + b"\1\0\0"):
        path.write_bytes(b"\x80\x05K\x01" + claim + b".")
        with pytest.raises(DafneError):
            read(path)


@pytest.mark.parametrize("source", ["+1" * 500_000, ".a" * 500_000, "()" * 300_000, "-" * 100_000 + "1", "{'a': {1, 2}}",
                                    "{'a': b'c'}", "{'a': open}", "[" * 10_000, "{'a': 1" + "0" * 5000 + "}", ""])
def test_a_description_that_is_no_json_is_refused_without_parsing_it(source):
    with pytest.raises(DafneError, match="description"):
        read_settings(f"# nnunet-dante\ndef f():\n    SETTINGS = {source}\n")


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b[:40], lambda b: b"", lambda b: b"\x80\x04N.",
                                    lambda b: b"not a pickle", lambda b: pickle.dumps({"a": 1})])
def test_damaged_files_are_refused(content, path, damage):
    write(path, content)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DafneError, match="Name.model"):
        read(path)


def test_a_missing_file_is_refused(path):
    with pytest.raises(DafneError, match="does not exist"):
        read(path)


def test_the_file_is_hardly_larger_than_its_weights(content, path):
    content["weights"] = OrderedDict({f"layer{i}": torch.zeros(1_000_000) for i in range(10)})
    write(path, content)
    assert path.stat().st_size <= 1.02 * 40_000_000
