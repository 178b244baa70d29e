"""predict.py: masks are stock nnU-Net's, any folder of images will do, and what goes wrong with one case stays there."""

from __future__ import annotations

import json
import shutil

import image_folders
import numpy as np
import pandas
import pytest
import tiny
import torch
from click.testing import CliRunner
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dante import predict
from nnunet_dante.adaptation.networks import Segmenter, open_networks
from nnunet_dante.cli import main
from nnunet_dante.errors import ConfigurationError, DatasetError

TWO = {"0": "T1", "1": "T2 fs"}


@pytest.fixture
def model(tmp_path):
    """Two folds with random weights."""
    folder = tiny.write_model_folder(tmp_path / "models", seed=0)
    other = tiny.write_model_folder(tmp_path / "other", seed=1)
    (other / "fold_0").rename(folder / "fold_1")
    return folder


def write_images(folder, names=("P1.nii.gz", "P2.nii.gz"), **place):
    for n, name in enumerate(names):
        image_folders.write(image_folders.case(n, shape=(20, 18, 16), dtype=np.float32, **place)[0], folder / name)
    return folder


def test_the_masks_are_those_of_stock_prediction_and_the_folds_agreement_sorts_them(model, tmp_path):
    images = write_images(tmp_path / "images", [f"P{n}_0000.nii.gz" for n in range(3)], codes="RAI", spacing=(1, 1, 1.5))
    before = image_folders.tree(images)
    done = predict(model, images, tmp_path / "masks", overlays=True, device="cpu")
    assert image_folders.tree(images) == before
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), None)
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential(str(images), str(tmp_path / "stock"))
    for n in range(3):
        ours, theirs = (image_folders.array(tmp_path / name / f"P{n}.nii.gz") for name in ("masks", "stock"))
        assert np.array_equal(ours, theirs) and ours.any()
    table = pandas.read_csv(done.table)
    assert list(table) == ["case", "confidence", "folds", "confidence organ", "confidence lesion", "problem"]
    assert table["confidence"].is_monotonic_increasing and table["confidence"].between(0, 1).all()
    assert dict(done.confidence) == pytest.approx(dict(zip(table["case"], table["confidence"])))
    assert [f.name[:3] for f in sorted((tmp_path / "masks" / "overlays").iterdir())] == ["001", "002", "003"]
    assert f"001_{table['case'][0]}.png" in [f.name for f in (tmp_path / "masks" / "overlays").iterdir()]
    assert done.tested == "" and f"first (confidence): {table['case'][0]} " in str(done)


def test_a_single_network_segments_and_says_nothing_of_its_confidence(model, tmp_path):
    shutil.rmtree(model / "fold_1")
    done = predict(tiny.zip_folder(model, tmp_path / "m.zip", "Dataset900_Donor/nnUNetTrainer__nnUNetPlans__3d_fullres/"),
                   write_images(tmp_path / "images"), tmp_path / "masks", device="cpu")
    assert list(pandas.read_csv(done.table)) == ["case", "problem"] and "first" not in str(done)
    assert (tmp_path / "masks" / "P1.nii.gz").is_file() and (tmp_path / "masks" / "P2.nii.gz").is_file()


def test_images_that_nnunet_cannot_read_are_converted_and_nothing_else_is_left(model, tmp_path):
    images = write_images(tmp_path / "images", ["P 1/scan.nrrd", "ä.2.mha"])
    predict(model, images, tmp_path / "masks", device="cpu")
    assert sorted(f.name for f in (tmp_path / "masks").iterdir()) == [
        "P_1.nii.gz", "a_2.nii.gz", "confidence.csv", "predict.json"]
    assert image_folders.array(tmp_path / "masks" / "P_1.nii.gz").shape == (16, 18, 20)


def test_the_same_call_goes_on_and_does_nothing_twice(model, tmp_path, monkeypatch):
    images, stops, mask = write_images(tmp_path / "images"), [2], Segmenter.mask
    segmented = []

    def stopped(self, prepared, weights, **options):
        if not options:
            segmented.append(len(segmented))
            if len(segmented) in stops:
                stops.clear()
                raise KeyboardInterrupt
        return mask(self, prepared, weights, **options)

    monkeypatch.setattr(Segmenter, "mask", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict(model, images, tmp_path / "masks", device="cpu")
    assert sorted(f.name for f in (tmp_path / "masks").iterdir()) == ["P1.nii.gz", "predict.json"]
    done = predict(model, images, tmp_path / "masks", device="cpu")
    assert len(segmented) == 3 and set(done.confidence) == {"P1", "P2"}
    assert str(predict(model, images, tmp_path / "masks", device="cpu")) == str(done) and len(segmented) == 3
    write_images(images, ["P2.nii.gz"])  # another image
    predict(model, images, tmp_path / "masks", device="cpu")
    assert len(segmented) == 4


def test_what_goes_wrong_with_one_case_stays_there_and_the_exit_code_says_so(model, tmp_path):
    images = write_images(tmp_path / "images", ["P1.nii.gz", "P2.nii.gz", "P3.nii.gz"])
    (images / "P2.nii.gz").write_bytes((images / "P2.nii.gz").read_bytes()[:2000])
    said = CliRunner().invoke(main, ["predict", str(model), str(images), "-o", str(tmp_path / "masks"), "--device", "cpu"])
    assert said.exit_code == 1 and "Not segmented: P2: P2.nii.gz was cut off" in said.output and "2 masks" in said.output
    table = pandas.read_csv(tmp_path / "masks" / "confidence.csv")
    assert table["case"][0] == "P2" and "cut off" in table["problem"][0] and not (tmp_path / "masks" / "P2.nii.gz").exists()


def test_channels_are_found_by_the_models_names_or_by_number(tmp_path):
    model = tiny.write_model_folder(tmp_path / "models", channel_names=TWO)
    images = write_images(tmp_path / "images", ["P1_t2_fs.nii.gz", "P1_t1.nii.gz", "P2_0000.nii.gz", "P2_0001.nii.gz",
                                                "P3_t1.nii.gz"])
    seen, read = {}, Segmenter.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmenter, "prepare", lambda self, files: (
            seen.setdefault(files[0].name, [image_folders.array(f).mean() for f in files]), read(self, files))[1])
        done = predict(model, images, tmp_path / "masks", device="cpu")
    for case, names in (("P1", ["P1_t1", "P1_t2_fs"]), ("P2", ["P2_0000", "P2_0001"])):
        assert seen[f"{case}_0000.nii.gz"] == [image_folders.array(images / f"{name}.nii.gz").mean() for name in names]
    assert set(done.confidence) == {"P1", "P2"}
    assert "it has 1 channels (t1), the model takes 2 (T1, T2 fs)" in done.problems["P3"]


def test_folders_that_cannot_be_used_are_refused_before_anything_is_written(model, tmp_path):
    images = write_images(tmp_path / "images")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for given, out, error, message in (
            ("empty", "masks", DatasetError, "holds no image that can be read"),
            ("images", "images/masks", ConfigurationError, "lies in the folder of the images"),
            ("images", "full", ConfigurationError, "full is not empty. Give a new folder")):
        with pytest.raises(error, match=message):
            predict(model, tmp_path / given, tmp_path / out, device="cpu")
    two = tiny.write_model_folder(tmp_path / "two", channel_names=TWO)
    write_images(tmp_path / "flair", ["P1_flair.nii.gz", "P1_dwi.nii.gz"])
    with pytest.raises(DatasetError, match=r"no case has the channels of the model, which are T1, T2 fs"):
        predict(two, tmp_path / "flair", tmp_path / "masks", device="cpu")
    assert not (tmp_path / "masks").exists() and sorted(f.name for f in (tmp_path / "full").iterdir()) == ["notes.txt"]
    predict(model, images, tmp_path / "masks", device="cpu")
    with pytest.raises(ConfigurationError, match="holds masks of other images or of another model"):
        predict(model, write_images(tmp_path / "others"), tmp_path / "masks", device="cpu")


def test_an_adaptation_that_is_not_finished_is_refused(tmp_path):
    (tmp_path / "adapt.json").write_text(json.dumps({"asked": {}, "done": {"data": {}}}))
    with pytest.raises(ConfigurationError, match="adaptation that is not finished"):
        open_networks(tmp_path)
