"""checkpoint.py: safe reading, whole writing, one hash per set of weights."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from nnunet_dante.errors import ConfigurationError, DonorError, UntrustedFileError
from nnunet_dante.models.checkpoint import (
    alias_sets,
    file_sha256,
    load_checkpoint_safely,
    not_finite,
    save_atomically,
    unique_tensors,
    weights_sha256,
)


class Bomb:
    """Touches a file when unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_what_nnunet_writes_is_read_without_trust(tmp_path):
    folder = tiny.write_model_folder(tmp_path)
    checkpoint = load_checkpoint_safely(folder / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["logging"]["mean_fg_dice"] == [0.5]
    assert checkpoint["_best_ema"] == 0.5
    assert checkpoint["init_args"]["device"] == torch.device("cpu")


@pytest.mark.parametrize("value", [np.float64(0.5), np.float32(0.1), np.int64(3), np.uint8(7), np.bool_(True)])
@pytest.mark.parametrize("numpy_major", [1, 2])
def test_numpy_scalars_of_both_numpy_majors(tmp_path, value, numpy_major):
    path = tmp_path / "a.pth"
    torch.save({"x": value}, path)
    rewritten = tmp_path / "b.pth"
    old, new = (b"numpy._core.multiarray", b"numpy.core.multiarray")[::1 if numpy_major == 1 else -1]
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(rewritten, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry).replace(old, new))
    assert load_checkpoint_safely(rewritten)["x"] == value


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_bomb_is_refused_and_not_executed(tmp_path, legacy):
    path, target = tmp_path / "bomb.pth", tmp_path / "executed"
    torch.save({"network_weights": Bomb(target)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UntrustedFileError, match=r"bomb\.pth cannot be read safely.*Nothing was executed.*--trust"):
        load_checkpoint_safely(path)
    assert not target.exists()


def test_plain_pickle_bomb_is_refused(tmp_path):
    path, target = tmp_path / "bomb.pth", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(UntrustedFileError, match="Nothing was executed"):
        load_checkpoint_safely(path)
    assert not target.exists()


def test_trust_opens_what_is_refused_otherwise(tmp_path):
    path, target = tmp_path / "bomb.pth", tmp_path / "executed"
    torch.save({"network_weights": Bomb(target)}, path)
    load_checkpoint_safely(path, trust=True)
    assert target.exists()


@pytest.mark.parametrize("array", [np.zeros(3), np.array([{}], dtype=object), np.str_("a")])
def test_arrays_and_object_dtypes_are_not_on_the_allow_list(tmp_path, array):
    path = tmp_path / "a.pth"
    torch.save({"x": array}, path)
    with pytest.raises(UntrustedFileError):
        load_checkpoint_safely(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("trust", [False, True])
def test_truncated_file_says_so(tmp_path, share, legacy, trust):
    path = tmp_path / "cut.pth"
    torch.save({"network_weights": {"w": torch.ones(1000)}}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DonorError, match=r"cut\.pth \(\d+ bytes\) is truncated, damaged or no torch file"):
        load_checkpoint_safely(path, trust=trust)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"hello" * 100])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(DonorError):
        load_checkpoint_safely(path)


def test_missing_and_non_dict(tmp_path):
    with pytest.raises(DonorError, match="does not exist"):
        load_checkpoint_safely(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DonorError, match="holds a list"):
        load_checkpoint_safely(tmp_path / "list.pth")


def test_an_interrupted_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.pth"
    save_atomically({"x": 1}, path)
    before = file_sha256(path)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        save_atomically({"x": lambda: None}, path)
    assert file_sha256(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_equal_content_is_an_equal_file(tmp_path, monkeypatch):
    save_atomically({"w": torch.ones(3)}, tmp_path / "a.pth")
    monkeypatch.setattr("os.getpid", lambda: 4711)
    save_atomically({"w": torch.ones(3)}, tmp_path / "b.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize("build", [tiny.plain_unet, tiny.residual_unet])
def test_unique_tensors_are_the_parameters(build):
    network = build()
    state = network.state_dict()
    names = [name for name, _ in network.named_parameters()]  # named_parameters gives each parameter once, first name
    assert list(unique_tensors(state)) == names
    assert sorted(key for keys in alias_sets(state).values() for key in keys) == sorted(state)


def test_hash_is_one_for_full_unique_and_reloaded_weights():
    state = tiny.plain_unet().state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    digest = weights_sha256(state)
    assert weights_sha256(unique_tensors(state)) == digest
    assert weights_sha256(dict(reversed(unique_tensors(state).items()))) == digest
    assert weights_sha256(torch.load(buffer, weights_only=True)) == digest


@pytest.mark.parametrize("change", [lambda w: w + 1e-7, lambda w: w.half(), lambda w: w.reshape(-1)])
def test_hash_sees_values_dtype_and_shape(change):
    weight = torch.linspace(-1, 1, 12).reshape(3, 4)
    assert weights_sha256({"w": change(weight)}) != weights_sha256({"w": weight})


def test_hash_sees_names_and_takes_scalars_and_bfloat16():
    scalar = torch.tensor(3, dtype=torch.bfloat16)
    assert weights_sha256({"a": scalar}) != weights_sha256({"b": scalar})
    with pytest.raises(ConfigurationError, match="'x' is a int"):
        weights_sha256({"x": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 7, -1])
def test_one_wrong_number_among_many_of_any_kind_is_seen_and_large_ones_are_not_wrong(value, place):
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tensors = [(str(kind), torch.full((999,), torch.finfo(kind).max, dtype=kind)) for kind in kinds]
    assert not_finite([*tensors, ("none", torch.zeros(0))]) == []
    for name, tensor in tensors:
        tensor[place] = value
        assert not_finite(tensors) == [name]
        tensor[place] = -torch.finfo(tensor.dtype).max


def test_whole_numbers_and_nothing_are_finite():
    assert not_finite([("steps", torch.tensor([1, 2]))]) == not_finite([]) == []
