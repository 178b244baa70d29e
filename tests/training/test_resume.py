"""A training continues only with what it was begun with; the message names each difference."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from running import build, train, with_overrides

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.models.checkpoint import load_checkpoint_safely, save_atomically
from nnunet_dante.training import trainers
from nnunet_dante.training.resume import random_state, restore_random_state
from nnunet_dante.transfers.transfer import transfer

CLS = trainers.nnUNetTrainerLoRA


@pytest.fixture(scope="module")
def trained(prepared_once, tmp_path_factory) -> Path:
    """The results of one finished training."""
    kept = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        folder = Path(train(CLS, prepared_once.activate(patch)).output_folder_base)
    return Path(shutil.copytree(folder, kept / folder.name))


@pytest.fixture
def finished(trained, prepared):
    shutil.copytree(trained, prepared.root / "nnUNet_results" / prepared.dataset / trained.name)
    return prepared


def changed(prepared, **changes) -> dict:
    plans = with_overrides(prepared, **{k: v for k, v in changes.items() if k not in ("batch_size", "spacing")})
    for key in ("batch_size", "spacing"):
        if key in changes:
            plans["configurations"]["3d_fullres"][key] = changes[key]
    return plans


@pytest.mark.parametrize(("changes", "message"), [
    ({"rank": 3}, "rank was 2, is 3"), ({"epochs": 30}, "epochs was 3, is 30"), ({"lr": 0.5}, "lr was 0.001, is 0.5"),
    ({"l2_sp": 0.1}, r"l2_sp was 0\.0, is 0\.1"), ({"iterations": 9}, "iterations was 2, is 9"),
    ({"batch_size": 4}, "batch_size of configuration 3d_fullres was 2, is 4"),
    ({"spacing": [1.0, 1.0, 2.0]}, r"spacing of configuration 3d_fullres was \[1.0, 1.0, 1.0\], is \[1.0, 1.0, 2.0\]"),
    ({"rank": 3, "lr": 0.5}, "lr was 0.001, is 0.5; rank was 2, is 3")])
def test_changed_numbers_are_refused_by_name(finished, changes, message):
    with pytest.raises(ConfigurationError, match=f"cannot be continued: since its training began, {message}"):
        build(CLS, finished, plans=changed(finished, **changes), resume=True)


def test_another_donor_is_refused(finished):
    plans = changed(finished)
    plans["dante"]["start_weights"]["3d_fullres"] |= {"sha256": "a" * 64, "donor": {"source": "other"}}
    cls = type("nnUNetTrainerLoRA", (CLS,), {"configure_optimizers": _without_start(CLS)})
    with pytest.raises(ConfigurationError, match=r"the start weights were nnUNetTrainer__.*sha256 .*\), are other \(sha256 aaaaaaaaaaaa\)"):
        build(cls, finished, plans=plans, resume=True)


def _without_start(cls):
    def configure_optimizers(self):
        entry, self.start_entry = self.start_entry, None  # the other donor's file is not at hand
        found = cls.configure_optimizers(self)
        self.start_entry = entry
        return found
    return configure_optimizers


def test_other_labels_are_refused(finished):
    trainer = build(CLS, finished)
    trainer.initialize()  # the start weights are for the old names, and that is said first
    trainer.dataset_json = trainer.dataset_json | {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}
    trainer.logger.resume = True
    with pytest.raises(ConfigurationError, match="labels of dataset.json was .*'vessel': 3.*, is .*'c': 3"):
        trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))


@pytest.mark.parametrize("use", ["train", "val"])
def test_another_split_is_refused_without_naming_cases(finished, use):
    file = finished.preprocessed / "splits_final.json"
    before = file.read_text()
    splits = json.loads(before)
    splits[0][use] = splits[0][use][:-1]
    try:
        file.write_text(json.dumps(splits))
        with pytest.raises(ConfigurationError, match=r"the (training|validation) cases were \d \(sha256 of their names "
                                                     r"\w{12}\), are \d \(sha256") as raised:
            build(CLS, finished, resume=True)
        assert "case_00" not in str(raised.value)
    finally:
        file.write_text(before)
    assert build(CLS, finished, resume=True).current_epoch == 3


def test_another_method_under_the_same_name_is_refused(finished):
    cls = type("nnUNetTrainerLoRA", (trainers.nnUNetTrainerFineTune,), {})
    with pytest.raises(ConfigurationError, match="the method was LoRA, is FineTune"):
        build(cls, finished, resume=True)


def test_the_same_plans_continue_and_what_the_trainer_ignores_may_change(finished):
    for plans in (None, changed(finished, input_lr_scale=0.5), changed(finished, recompute=True)):
        assert build(CLS, finished, plans=plans, resume=True).current_epoch == 3
    plans = changed(finished)
    plans["dante"]["start_weights"]["2d"] = plans["dante"]["start_weights"]["3d_fullres"] | {"sha256": "b" * 64}
    plans["configurations"]["2d"] = {"patch_size": [1, 1]}
    assert build(CLS, finished, plans=plans, resume=True).current_epoch == 3


def test_validation_of_a_finished_training_is_not_refused(finished):
    trainer = build(CLS, finished, plans=changed(finished, epochs=30, lr=0.5))
    trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    assert trainer.current_epoch == 3


def test_checkpoints_from_before_an_option_was_there_continue_with_its_default(finished):
    file = Path(build(CLS, finished).output_folder, "checkpoint_final.pth")
    checkpoint = load_checkpoint_safely(file)
    for name in ("l2_sp", "ewc", "size_prior", "size_margin", "size_images", "stop_patience"):
        del checkpoint["dante"]["options"][name]
    for name in ("iterations", "val_iterations", "penalty", "cases"):
        del checkpoint["dante"][name]
    save_atomically(checkpoint, file)
    assert build(CLS, finished, resume=True).current_epoch == 3
    with pytest.raises(ConfigurationError, match="ewc was 0.0, is 1.0"):
        build(CLS, finished, plans=changed(finished, ewc=1.0), resume=True)


def test_a_second_transfer_with_other_numbers_is_noticed(finished, tmp_path):
    """The whole way: nnU-Net reads the plans from the disk when it continues."""
    kept = {f: shutil.copy(f, tmp_path) for f in finished.preprocessed.glob("nnUNetDantePlans*.*")}
    try:
        transfer(finished.donor, finished.dataset, overrides={"epochs": 3, "iterations": 2, "val_iterations": 1, "rank": 2,
                                                              "alpha": 8.0})
        with pytest.raises(ConfigurationError, match="alpha was 4.0, is 8.0"):
            build(CLS, finished, resume=True)
    finally:
        for file, copied in kept.items():
            shutil.copy(copied, file)


def test_a_stock_checkpoint_is_not_looked_at(finished):
    trainer = build(CLS, finished)
    checkpoint = load_checkpoint_safely(Path(trainer.output_folder, "checkpoint_final.pth"))
    del checkpoint["dante"]
    checkpoint["init_args"] = copy.deepcopy(checkpoint["init_args"])
    checkpoint["init_args"]["plans"]["plans_name"] = "other"
    torch.save(checkpoint, Path(trainer.output_folder, "checkpoint_final.pth"))
    assert build(CLS, finished, resume=True).current_epoch == 3
    assert json.dumps(checkpoint["init_args"]["plans"])


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]


def test_the_numbers_after_restoring_are_the_numbers_after_saving(tmp_path):
    draw()
    torch.save({"random_state": random_state()}, tmp_path / "state.pth")
    expected = [draw(), draw()]
    draw()
    restore_random_state(load_checkpoint_safely(tmp_path / "state.pth")["random_state"])
    assert [draw(), draw()] == expected
    assert random_state()["numpy"][0] == "MT19937"


def test_the_random_numbers_of_an_apple_gpu_go_on_too(monkeypatch):
    """No Apple GPU has run this: the generator is a fake."""
    generator = [torch.tensor([1], dtype=torch.uint8)]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: generator[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: generator.__setitem__(0, new))
    state = random_state()
    generator[0] = torch.tensor([2], dtype=torch.uint8)
    restore_random_state(state)
    assert generator[0] == 1
    restore_random_state({k: v for k, v in state.items() if k != "mps"})  # of a version that did not know it
