"""Short trainings over network, dimension, kernels and label kinds: what the tables of the README promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from running import build, prepare, train

from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.training import trainers
from nnunet_dante.transfers.transfer import transfer

pytestmark = pytest.mark.slow

REGIONS = {"background": 0, "whole": [1, 2], "lesion": 2}
CASES = {
    "residual encoder": {"architecture": "ResidualEncoderUNet"},
    "2d": {"configuration": "2d"},
    "regions": {"labels": REGIONS, "regions_class_order": [1, 2], "values": (1, 2)},
    "ignore label": {"labels": {"background": 0, "organ": 1, "ignore": 2}, "values": (1, 2)},
    "two channels": {"channel_names": {"0": "MRI", "1": "CT"}},
}
METHODS = [trainers.nnUNetTrainerLoRA, trainers.nnUNetTrainerLoRADecoder, trainers.nnUNetTrainerGradualUnfreezing]


@pytest.mark.parametrize("case", CASES)
def test_methods_train_on(case, tmp_path, monkeypatch):
    options = dict(CASES[case])
    ready = prepare(tmp_path, **options).activate(monkeypatch)
    configuration = options.get("configuration", "3d_fullres")
    for method in METHODS:
        trainer = train(method, ready, configuration=configuration)
        assert np.isfinite(trainer.logger.get_value("train_losses", None)).all()
        checkpoint = load_checkpoint_safely(Path(trainer.output_folder, "checkpoint_final.pth"))
        assert set(checkpoint["dante"]["start_dice"]) == set(trainer.foreground_names)
        stock = build("nnUNetTrainer", ready, configuration=configuration)
        stock.initialize()
        stock.network.load_state_dict(checkpoint["network_weights"], strict=True)
    if case == "regions":
        assert trainer.foreground_names == ["whole", "lesion"]
    if case == "ignore label":
        assert trainer.foreground_names == ["organ"]


def test_anisotropic_kernels_and_strides(tmp_path, monkeypatch):
    plain = tiny.plans

    def anisotropic(*arguments, **options):
        plans = plain(*arguments, **options)
        network = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        network |= {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}
        plans["configurations"]["3d_fullres"]["patch_size"] = [8, 16, 16]
        return plans

    monkeypatch.setattr(tiny, "plans", anisotropic)
    ready = prepare(tmp_path).activate(monkeypatch)
    for method in METHODS:
        assert np.isfinite(train(method, ready).logger.get_value("train_losses", None)).all()


def test_cascade_both_stages_with_one_plans_name(tmp_path, monkeypatch):
    """nnU-Net finds the first stage's predictions by trainer and plans name."""
    ready = prepare(tmp_path, configuration="3d_lowres").activate(monkeypatch)
    full = tiny.write_model_folder(tmp_path / "elsewhere", configuration="3d_cascade_fullres")
    transfer(full, ready.dataset, configuration="3d_cascade_fullres", preprocess=True, num_processes=1,
             overrides={"epochs": 2, "iterations": 2, "val_iterations": 1, "rank": 2, "alpha": 4.0})
    plans = json.loads((ready.preprocessed / "nnUNetDantePlans.json").read_text())
    assert {"3d_lowres", "3d_cascade_fullres"} <= set(plans["dante"]["start_weights"])
    for fold in range(5):  # the second stage needs a prediction of every case
        first = train(trainers.nnUNetTrainerLoRA, ready, configuration="3d_lowres", fold=fold)
        first.perform_actual_validation()
    second = train(trainers.nnUNetTrainerLoRA, ready, configuration="3d_cascade_fullres")
    assert second.is_cascaded and np.isfinite(second.logger.get_value("train_losses", None)).all()
