"""inspect.py: every file says what it is; a hostile one is described, not run."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import tiny
import torch

from nnunet_dante.command.inspect import inspect_path
from nnunet_dante.errors import DonorError
from nnunet_dante.models.checkpoint import file_sha256, weights_sha256
from nnunet_dante.models.donor import open_donor


@pytest.fixture
def folder(tmp_path):
    return tiny.write_model_folder(tmp_path / "results", labels={"background": 0, "whole": [1, 2], "core": 2},
                                   regions_class_order=[1, 2])


def test_folder_zip_plans_and_dataset_name_labels_and_network(folder, tmp_path):
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path / "results"))
    for text in (inspect_path(folder), inspect_path(tmp_path / "results"), inspect_path(path)):
        assert "regions: whole, core" in text
        assert "channels: MRI" in text
        assert "3d_fullres: PlainConvUNet; spacing [1.0, 1.0, 1.0]; patch_size [16, 16, 16]" in text
        assert "fold_0/checkpoint_final.pth" in text
    assert "3d_cascade_fullres: inherits_from 3d_fullres" in inspect_path(folder / "plans.json")
    assert "regions: whole, core" in inspect_path(folder / "dataset.json")


def test_checkpoint_gives_its_hashes_and_training(folder):
    path = folder / "fold_0" / "checkpoint_final.pth"
    text = inspect_path(path)
    assert f"sha256 {file_sha256(path)}" in text
    assert f"sha256 {weights_sha256(torch.load(path, weights_only=False)['network_weights'])}" in text
    assert "trainer nnUNetTrainer, configuration 3d_fullres, fold 0, epoch 1, mirroring axes (0, 1, 2)" in text


def test_start_weights_and_trained_checkpoints_show_their_provenance(tmp_path):
    block = {"format": 1, "version": "9.9", "donor": {"source": "d.zip"}, "label_map": {"a": None}, "method": "LoRA",
             "random_state": {"torch": torch.ones(1)}, "adapter": {"factors": {"w": torch.ones(1)}},
             "penalty": {"start": {"w": torch.ones(3)}, "fisher": {}}, "more": {"of a later version": torch.ones(1)}}
    torch.save({"network_weights": {"w": torch.ones(3)}, "dante": block}, tmp_path / "start.pth")
    text = inspect_path(tmp_path / "start.pth")
    assert "start weights of a transfer" in text
    assert "nnunet_dante 9.9:" in text
    assert "source: d.zip" in text
    assert "a: new" in text
    assert "adapter extract" in text
    assert "tensor" not in text.split("nnunet_dante 9.9")[1] and "penalty" not in text


def test_pickle_bomb_is_described_as_unsafe_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"network_weights": Bomb()}, tmp_path / "bomb.pth")
    text = inspect_path(tmp_path / "bomb.pth")
    assert "UNSAFE" in text
    assert "getattr" in text or "touch" in text
    assert not (tmp_path / "executed").exists()


def test_damaged_plans_in_a_folder_do_not_hide_the_rest(folder):
    (folder / "plans.json").write_text("{")
    text = inspect_path(folder)
    assert "plans.json: cannot be read" in text
    assert "regions: whole, core" in text


def test_what_is_none_of_these_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"x": 1}))
    (tmp_path / "b.json").write_text("{")
    torch.save({"x": 1}, tmp_path / "c.pth")
    for name, message in (("a.json", "neither nnU-Net plans"), ("b.json", "is no JSON"), ("c.pth", "no network_weights"),
                          ("none", "does not exist"), (".", "holds no plans.json")):
        with pytest.raises(DonorError, match=message):
            inspect_path(tmp_path / name)


def test_a_fold_folder_says_to_give_the_folder_above(folder):
    with pytest.raises(DonorError, match="fold_0 is one fold of a model; give the folder above it"):
        inspect_path(folder / "fold_0")


def test_a_network_with_added_modules_says_that_it_is_not_stock_and_what_it_needs(folder):
    assert "NOT a stock network" not in inspect_path(folder / "fold_0" / "checkpoint_final.pth")
    tiny.add_modules(folder, "nnUNetTrainerSpatialAdapter")
    text = inspect_path(folder / "fold_0" / "checkpoint_final.pth")
    assert "NOT a stock network: 864 of these numbers, in 2 tensors, are modules that nnUNetTrainerSpatialAdapter" in text
    assert "decoder.stages.1.spatial_adapter.down.weight" in text and "nnunet-dante env" in text


def test_slimmed_models_bundles_and_models_of_v1_are_described(tmp_path):
    root = tiny.monai_bundle(tmp_path / "results", tmp_path / "bundle")
    for source in (root, tiny.zip_folder(root, tmp_path / "b.zip")):
        text = inspect_path(source)
        assert "nnU-Net model folder models" in text and "fold_0/model.pt: " in text and "labels: background, organ" in text
    assert "weights alone: as a donor it needs plans.json" in inspect_path(root / "models" / "fold_0" / "model.pt")
    assert "facts about an nnU-Net without its weights" in inspect_path(root / "models" / "nnunet_checkpoint.pth")
    text = inspect_path(tiny.slim(next((tmp_path / "results").glob("*/*"))))
    assert "weights alone" in text
    torch.save({"state_dict": {"a": torch.ones(1)}, "plot_stuff": [], "epoch": 1}, tmp_path / "m.model")
    (tmp_path / "m.model.pkl").write_bytes(b"never read")
    for name in ("m.model", "m.model.pkl"):
        assert "nnU-Net v1" in inspect_path(tmp_path / name)
    (tmp_path / "m.model.pkl").unlink()
    assert "nnU-Net v1" in inspect_path(tmp_path / "m.model")


def test_options_that_are_not_set_are_not_called_new(tmp_path):
    block = {"version": "0.2", "options": {"rank": 8, "ranks": None}, "label_map": {"organ": "liver", "lesion": None}}
    torch.save({"network_weights": {"a": torch.zeros(1)}, "dante": block}, tmp_path / "start.pth")
    said = inspect_path(tmp_path / "start.pth")
    assert "lesion: new" in said and "organ: liver" in said and "rank: 8" in said
    assert "ranks" not in said


@pytest.mark.parametrize(("name", "first"), [
    ("a.nii.gz", b"\x1f\x8b"), ("a.nii", b"\0" * 344 + b"n+1\0"), ("a.mha", b"ObjectType = Image"), ("a.nrrd", b"NRRD0004"),
    ("IM0001", b"\0" * 128 + b"DICM"), ("a.png", b"\x89PNG\r\n"), ("a.tif", b"II*\0")])
def test_images_are_called_images_by_all_that_read_models(tmp_path, name, first):
    file = tmp_path / name
    file.write_bytes(first + bytes(500))
    for read in (inspect_path, open_donor):
        with pytest.raises(DonorError, match=f"{name} is an image, and no model.*nnunet-dante predict MODEL FOLDER"):
            read(file)
