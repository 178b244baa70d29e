"""Augmentation and prediction mirror along the axes of the transfer, whatever the trainer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (
    nnUNetTrainer_onlyMirror01,
)
from running import build, train

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods import FromScratch
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.training import trainers
from nnunet_dante.training.trainer import DanteMixin

NAMES = list(trainers.TRAINERS)
KEY = "inference_allowed_mirroring_axes"


def plans_with(prepared, axes, configuration="3d_fullres") -> dict:
    plans = json.loads((prepared.preprocessed / "nnUNetDantePlans.json").read_text())
    plans["dante"]["start_weights"][configuration] = {**plans["dante"]["start_weights"]["3d_fullres"],
                                                      "mirroring_axes": axes}
    return plans


def augmented_axes(trainer) -> tuple[int, ...]:
    transforms = trainer.dataloader_train.data_loader.transforms.transforms
    return next((t.allowed_axes for t in transforms if isinstance(t, MirrorTransform)), ())


@pytest.mark.parametrize("name", NAMES)
def test_every_trainer_asks_the_transfer(name):
    method = "configure_rotation_dummyDA_mirroring_and_inital_patch_size"
    assert getattr(getattr(trainers, name), method) is getattr(DanteMixin, method)


@pytest.mark.parametrize(("axes", "used"), [([], None), ([1], (1,)), ([0, 1, 2], (0, 1, 2)), (None, (0, 1, 2))])
def test_axes_reach_augmentation_checkpoints_and_stock_prediction(prepared, axes, used):
    trainer = build(trainers.nnUNetTrainerHeadOnly, prepared, plans=plans_with(prepared, axes))
    trainer.on_train_start()
    assert augmented_axes(trainer) == (used or ())
    best = Path(trainer.output_folder, "checkpoint_best.pth")  # the start weights: zero-shot results come from it
    assert load_checkpoint_safely(best)[KEY] == used
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_best.pth")
    assert predictor.allowed_mirroring_axes == used


@pytest.mark.parametrize(("axes", "used"), [([], None), ([0], (0,)), (None, (0, 1))])
def test_a_2d_configuration_counts_axes_within_its_slices(prepared, axes, used):
    plans = plans_with(prepared, axes, "2d")
    plans["configurations"]["2d"] = tiny.plans("D")["configurations"]["2d"] | {
        "data_identifier": "nnUNetDantePlans_3d_fullres"}
    trainer = build(trainers.nnUNetTrainerFromScratch, prepared, plans=plans, configuration="2d")
    trainer.initialize()
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1] == used
    assert trainer.inference_allowed_mirroring_axes == used


def test_a_trainer_that_mirrors_less_is_not_overruled(prepared):
    class Mine(DanteMixin, nnUNetTrainer_onlyMirror01):
        method = FromScratch()

    trainer = build(Mine, prepared, plans=plans_with(prepared, [1, 2]))
    trainer.initialize()
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1] == (1,)


def test_continuing_keeps_the_axes_and_refuses_others(prepared):
    cls = trainers.nnUNetTrainerHeadOnly
    train(cls, prepared, plans=plans_with(prepared, []))
    resumed = build(cls, prepared, plans=plans_with(prepared, []), resume=True)
    assert resumed.current_epoch == 3 and resumed.inference_allowed_mirroring_axes is None
    with pytest.raises(ConfigurationError, match=r"mirroring axes were none, are \(0, 1, 2\)"):
        build(cls, prepared, plans=plans_with(prepared, None), resume=True)


def test_validation_of_a_finished_training_needs_no_start_weights(prepared):
    cls = trainers.nnUNetTrainerLoRA
    plans = plans_with(prepared, [])
    trained = train(cls, prepared, plans=copy.deepcopy(plans))
    plans["dante"]["start_weights"]["3d_fullres"]["file"] = "lost.pth"
    trainer = cls(plans=plans | {"continue_training": False}, configuration="3d_fullres", fold=0,
                  dataset_json=trained.dataset_json, device=torch.device("cpu"))
    maybe_load_checkpoint(trainer, False, True, None)
    assert trainer.inference_allowed_mirroring_axes is None
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(trained.network.eval()(x), trainer.network.eval()(x)))
