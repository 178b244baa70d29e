"""Every trainer, stopped before a change of its stages and continued, ends at the very bits of the one that went on."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import differences, outcome
from running import Prepared, build, train, with_overrides

from nnunet_dante.methods import LPFT, DoRA, GradualUnfreezing, LoRA
from nnunet_dante.training import trainers

NAMES = list(trainers.TRAINERS)
OPTIONS = {  # every option that keeps a state of its own, or changes the parameter groups, on methods that stage
    "LoRA+ and dropout": LoRA(lr_ratio=0.25, dropout=0.5),
    "LoRA+ with EWC": LoRA(lr_ratio=4.0, ewc=3.0, stop_patience=50),
    "LP-FT with dropout and L2-SP": LPFT(dropout=0.3, lr_ratio=0.5, l2_sp=0.1),
    "DoRA with everything": DoRA(dropout=0.2, lr_ratio=2.0, l2_sp=0.1, ewc=1.0, size_prior=5.0, stop_patience=50),
    "unfreezing with everything": GradualUnfreezing(l2_sp=0.1, ewc=1.0, size_prior=5.0, stop_patience=50),
}
# One of each family that the tests of the trainer, of adapters and of the options do not stop and continue already.
DEFAULT = ["nnUNetTrainerAdaptFormer", "nnUNetTrainerGradualUnfreezingDante"]


def seed(number: int) -> None:
    for function in (random.seed, np.random.seed, torch.manual_seed):
        function(number)


def stages(trainer) -> list[int]:
    return [stage.first_epoch for stage in trainer.training_plan.schedule.stages]


def whole_and_continued(cls, prepared: Prepared, tmp_path: Path, monkeypatch, **overrides) -> list[int]:
    """Train, keep the checkpoint before each stage begins (or of epoch 1), continue each; return those epochs."""
    plans = with_overrides(prepared, epochs=6, **overrides)
    kept: list[int] = []

    def on_epoch_end(self):
        original(self)
        if self.current_epoch in (stages(self)[1:] or [1]) and self.current_epoch < self.num_epochs:
            kept.append(self.current_epoch)
            self.save_after(self.current_epoch, "checkpoint_latest.pth")
            shutil.copytree(self.output_folder, tmp_path / str(self.current_epoch))

    original = cls.on_epoch_end
    with monkeypatch.context() as patch:
        patch.setattr(cls, "on_epoch_end", on_epoch_end)
        seed(0)
        folder = Path(train(cls, prepared, plans=dict(plans)).output_folder)
    expected = outcome(folder)
    for epoch in kept:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / str(epoch), folder)
        seed(4711)
        resumed = build(cls, prepared, plans=dict(plans), resume=True)
        assert resumed.current_epoch == epoch
        resumed.run_training()
        assert not differences(outcome(folder), expected), f"continued from epoch {epoch}"
    return kept


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
                                  for name in NAMES])
def test_a_continued_training_is_the_one_that_never_stopped(prepared, tmp_path, monkeypatch, name):
    cls = getattr(trainers, name)
    kept = whole_and_continued(cls, prepared, tmp_path, monkeypatch)
    staged = {"nnUNetTrainerGradualUnfreezing": 2, "nnUNetTrainerGradualUnfreezingDante": 1, "nnUNetTrainerLPFT": 1}
    assert len(kept) >= staged.get(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_options_with_a_state_of_their_own_continue_exactly(prepared, tmp_path, monkeypatch, options):
    folder = prepared.root / "nnUNet_raw" / prepared.dataset
    method = replace(OPTIONS[options], size_images=str(folder / "imagesTr"))
    cls = type("nnUNetTrainerWithOptions", (trainers.DanteMixin, trainers.nnUNetTrainer), {"method": method})
    assert whole_and_continued(cls, prepared, tmp_path, monkeypatch)
