"""A model fine-tuned here goes to Dafne, learns, merges with its base, comes back, and predicts with stock nnU-Net."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import tiny
import torch
from dafne_client import as_stored, client, shown
from running import prepare, train

from nnunet_dante.dafne.export import export_model
from nnunet_dante.dafne.importer import import_model
from nnunet_dante.models.donor import open_donor

SCRIPT = """
import pickle
with open(arguments[2], "rb") as stream:
    data = pickle.load(stream)
base, tuned = load(arguments[0]), load(arguments[1])
masks = tuned.apply(data)
np.savez(arguments[3], **masks)
volume = np.moveaxis(data["image"], -1, 0)
outputs = {i: {"organ": np.moveaxis((data["image"] > 0.4).astype(np.uint8), -1, 0)} for i in range(2)}
tuned.incremental_learn({"image_list": [volume, volume + 0.01], "affine": [data["affine"]] * 2,
                         "resolution": data["resolution"], "classification": "Tuned"}, outputs, 1, 10)
tuned.reset_timestamp()
merged = base * 0.5 + tuned * 0.5
with open(arguments[4], "wb") as stream:
    merged.dump(stream)
"""


def predict(folder, image, output, fold, mirroring=False):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=mirroring, perform_everything_on_device=False,
                                device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=(fold,))
    predictor.predict_from_files_sequential([[str(image)]], [str(output)])
    return np.asarray(nibabel.load(f"{output}.nii.gz").dataobj)


@pytest.mark.slow
def test_from_lora_to_dafne_and_back(tmp_path, monkeypatch):
    import pickle

    from nnunet_dante.training.trainers import nnUNetTrainerLoRA

    prepared = prepare(tmp_path, labels=tiny.LABELS, values=(1, 2)).activate(monkeypatch)
    trainer = train(nnUNetTrainerLoRA, prepared)
    trainer.perform_actual_validation()
    folder = tmp_path / "nnUNet_results" / prepared.dataset / "nnUNetTrainerLoRA__nnUNetDantePlans__3d_fullres"
    base = export_model(prepared.donor, tmp_path / "Base.model", orientation="RAS")
    tuned = export_model(folder, tmp_path / "Tuned.model")
    assert "validation" in str(tuned) and tuned.model_id == base.model_id

    image = next((tmp_path / "nnUNet_raw" / prepared.dataset / "imagesTr").glob("*.nii.gz"))
    stored = nibabel.load(image)
    view = shown(stored)
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(
        {"image": view.get_fdata(dtype=np.float32), "affine": view.affine,
         "resolution": [1.0, 1.0, 1.0], "classification": "Tuned"}))
    client(SCRIPT, base.model, tuned.model, tmp_path / "data.pkl", tmp_path / "masks.npz", tmp_path / "merged.model",
           home=tmp_path / "home")
    expected = predict(folder, image, tmp_path / "tuned", 0)
    with np.load(tmp_path / "masks.npz") as masks:
        for label, value in (("organ", 1), ("lesion", 2)):
            found = as_stored(masks[label], stored) > 0
            dice = (2 * np.sum(found & (expected == value)) + 1e-9) / (found.sum() + np.sum(expected == value) + 1e-9)
            assert dice >= 0.999, label
    report = import_model(tmp_path / "merged.model", tmp_path / "back")
    fold = report.checkpoint.parent.name.removeprefix("fold_")
    predict(tmp_path / "back", image, tmp_path / "merged", int(fold) if fold.isdigit() else fold)
    mine, start = open_donor(tmp_path / "back").weights, open_donor(folder).weights
    assert any(not torch.equal(mine[key], start[key]) for key in start)
