"""The internals of nnU-Net that the trainers override: a release that changes one of them must be seen here first."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from running import build

from nnunet_dante.training import trainers
from nnunet_dante.training.trainer import DanteMixin
from nnunet_dante.training.trainers import AddedModulesMixin

NETWORK = ["plans_manager", "configuration_manager", "num_input_channels", "num_output_channels",
           "enable_deep_supervision"]
PARAMETERS = {
    "_build_loss": ["self"],
    "__init__": ["self", "plans", "configuration", "fold", "dataset_json", "device"],
    "build_network_architecture": NETWORK,
    "configure_optimizers": ["self"],
    "configure_rotation_dummyDA_mirroring_and_inital_patch_size": ["self"],
    "do_split": ["self"],
    "get_tr_and_val_datasets": ["self"],
    "initialize": ["self"],
    "load_checkpoint": ["self", ...],  # the argument's name changes after 2.8.1; it is passed by position
    "on_epoch_end": ["self"],
    "on_epoch_start": ["self"],
    "on_train_end": ["self"],
    "on_train_epoch_end": ["self", "train_outputs"],
    "on_train_epoch_start": ["self"],
    "on_train_start": ["self"],
    "perform_actual_validation": ["self", "save_probabilities"],
    "run_training": ["self"],
    "save_checkpoint": ["self", "filename"],
    "train_step": ["self", "batch"],
    "validation_step": ["self", "batch"],
}
OURS = [c for c in AddedModulesMixin.__mro__ if c.__module__.startswith("nnunet_dante")]


def test_these_and_no_others_are_overridden():
    names = {name for c in OURS for name, value in vars(c).items() if callable(value) or isinstance(value, classmethod)}
    assert {name for name in names if name in vars(nnUNetTrainer)} == set(PARAMETERS)
    assert DanteMixin in OURS


@pytest.mark.parametrize("name", PARAMETERS)
def test_nnunet_calls_them_with_these_arguments(name):
    found = list(inspect.signature(getattr(nnUNetTrainer, name)).parameters)
    expected = PARAMETERS[name]
    assert len(found) == len(expected)
    assert all(want in (..., have) for want, have in zip(expected, found)), found


@pytest.mark.parametrize("name", [n for n in PARAMETERS if n != "build_network_architecture"])
def test_the_overrides_take_the_same_arguments(name):
    for own in (vars(c)[name] for c in OURS if name in vars(c)):
        assert len(inspect.signature(own).parameters) == len(PARAMETERS[name])


def test_a_renamed_argument_of_load_checkpoint_does_no_harm(prepared, monkeypatch):
    cls, seen = trainers.nnUNetTrainerHeadOnly, []
    started = build(cls, prepared)
    started.on_train_start()
    best = str(Path(started.output_folder, "checkpoint_best.pth"))
    monkeypatch.setattr(nnUNetTrainer, "load_checkpoint", lambda self, checkpoint: seen.append(checkpoint))
    build(cls, prepared).load_checkpoint(best)
    assert seen == [best]
