"""Trainings that end early: on a plateau as if it were the last epoch, on NaN with an error and good checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from running import build, train, with_overrides

from nnunet_dante.errors import NonFiniteError
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.training import guards as stopping
from nnunet_dante.training import trainers
from nnunet_dante.training.guards import describe_not_finite, not_finite_weights, on_plateau


@pytest.fixture
def short_window(monkeypatch):
    """A plateau is two equal epochs; the losses are those of the trainer's attribute `curve`."""
    monkeypatch.setattr(stopping, "on_plateau", lambda losses, patience: patience > 0 and len(losses) >= patience
                        and len(set(losses[-patience:])) == 1)
    for cls in (trainers.nnUNetTrainerLoRA, trainers.nnUNetTrainerGradualUnfreezing):
        monkeypatch.setattr(cls, "curve", [], raising=False)
        monkeypatch.setattr(cls, "on_train_epoch_end", lambda self, outputs: self.logger.log(
            "train_losses", self.curve[self.current_epoch], self.current_epoch))


def log_of(trainer) -> str:
    return "".join(f.read_text() for f in sorted(Path(trainer.output_folder).glob("training_log*")))


def test_a_plateau_ends_the_training_cleanly_and_continuing_does_not_train_on(prepared, short_window):
    cls = trainers.nnUNetTrainerLoRA
    cls.curve = [3.0, 2.0, 1.0, 1.0, 0.5, 0.4]
    plans = with_overrides(prepared, epochs=6, stop_patience=2)
    trainer = train(cls, prepared, plans=plans)
    folder = Path(trainer.output_folder)
    assert trainer.current_epoch == 4 and "Stopped after 4 of 6 epochs" in log_of(trainer)
    assert (folder / "adapter.safetensors").is_file() and not (folder / "checkpoint_latest.pth").exists()
    final = load_checkpoint_safely(folder / "checkpoint_final.pth")
    assert final["current_epoch"] == 4
    again = build(cls, prepared, plans=plans, resume=True)
    again.run_training()
    assert again.current_epoch == 4 and log_of(again).count("Epoch time") == 4
    after = load_checkpoint_safely(folder / "checkpoint_final.pth")
    assert all(torch.equal(v, after["network_weights"][k]) for k, v in final["network_weights"].items())
    assert after["current_epoch"] == 4


def test_patience_0_never_stops(prepared, short_window):
    trainers.nnUNetTrainerLoRA.curve = [1.0] * 6
    assert train(trainers.nnUNetTrainerLoRA, prepared, plans=with_overrides(prepared, epochs=6)).current_epoch == 6


def test_a_plateau_before_the_last_stage_is_none(prepared, short_window):
    """All groups are open from epoch 3 of 6: the losses of epochs 0 to 2 do not count."""
    cls = trainers.nnUNetTrainerGradualUnfreezing
    cls.curve = [1.0] * 6
    trainer = train(cls, prepared, plans=with_overrides(prepared, epochs=6, stop_patience=2))
    last = trainer.training_plan.schedule.stages[-1].first_epoch
    assert last == 3 and trainer.current_epoch == 5


def test_the_rule_in_the_trainer_is_the_one_of_plateau(prepared, monkeypatch):
    seen = []
    monkeypatch.setattr(stopping, "on_plateau", lambda losses, patience: seen.append((len(losses), patience)))
    train(trainers.nnUNetTrainerLoRA, prepared, plans=with_overrides(prepared, stop_patience=7))
    assert seen == [(0, 7), (1, 7), (2, 7)]


def broken_from(epoch, step, *, loss=True, weight=True, monkeypatch):
    """nnU-Net's step, in which from an epoch and a step on loss, or a weight, or both are NaN."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    original = nnUNetTrainer.train_step

    def train_step(self, batch):
        outputs = original(self, batch)
        if (self.current_epoch, self.step_in_epoch) >= (epoch, step):
            if weight:
                with torch.no_grad():
                    self.bare_network.decoder.seg_layers[0].bias.fill_(float("nan"))
            if loss:
                outputs = {"loss": np.float32("nan")}
        return outputs

    monkeypatch.setattr(nnUNetTrainer, "train_step", train_step)


@pytest.mark.parametrize("name", ["nnUNetTrainerFineTune", "nnUNetTrainerLoRA"])
def test_a_loss_that_is_nan_stops_with_place_and_tensors_and_good_checkpoints(prepared, monkeypatch, name):
    broken_from(2, 1, monkeypatch=monkeypatch)
    trainer = build(getattr(trainers, name), prepared, plans=with_overrides(prepared, epochs=4))
    trainer.initialize()
    trainer.save_every = 1
    with pytest.raises(NonFiniteError, match=r"loss is nan in epoch 2, step 1 \(cases case_00\d, case_00\d\), not finite "
                                             r"since epoch 2, step 1; 1 tensors .*: decoder.seg_layers.0.bias"):
        trainer.run_training()
    assert "Training stopped: the loss is nan in epoch 2, step 1" in log_of(trainer)
    folder = Path(trainer.output_folder)
    assert not (folder / "checkpoint_final.pth").exists()
    for file, epoch in (("checkpoint_latest.pth", 2), ("checkpoint_best.pth", None)):
        checkpoint = load_checkpoint_safely(folder / file)
        assert all(v.isfinite().all() for v in checkpoint["network_weights"].values())
        assert epoch is None or checkpoint["current_epoch"] == epoch
    assert "checkpoint_latest.pth and checkpoint_best.pth" in log_of(trainer)


def test_weights_that_break_in_the_last_step_of_an_epoch_are_found_before_anything_is_saved(prepared, monkeypatch):
    broken_from(1, 1, loss=False, monkeypatch=monkeypatch)
    trainer = build(trainers.nnUNetTrainerFineTune, prepared)
    with pytest.raises(NonFiniteError, match="after the last step of epoch 1 1 tensors"):
        trainer.run_training()
    best = load_checkpoint_safely(Path(trainer.output_folder, "checkpoint_best.pth"))
    assert all(v.isfinite().all() for v in best["network_weights"].values())


def test_no_checkpoint_with_nan_replaces_a_good_one(prepared):
    trainer = build(trainers.nnUNetTrainerFineTune, prepared)
    trainer.initialize()
    file = Path(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()
    with torch.no_grad():
        trainer.bare_network.decoder.seg_layers[0].weight[0] = float("inf")
    with pytest.raises(NonFiniteError, match="checkpoint_latest.pth is not written: .*decoder.seg_layers.0.weight"):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before and [f.name for f in file.parent.glob("*.pth")] == [file.name]


def test_real_nan_in_an_image_is_named(prepared, monkeypatch):
    """Not simulated: NaN goes through nnU-Net's own step, loss and clipping."""
    trainer = build(trainers.nnUNetTrainerFineTune, prepared)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    batch["data"][0, 0, 3, 3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"loss is nan in epoch 0, step 1 .* since epoch 0, step 1; \d+ tensors"):
        trainer.train_step(batch)


def test_with_a_grad_scaler_a_skipped_step_is_no_end_but_twenty_in_a_row_are(prepared, monkeypatch, capsys):
    broken_from(0, 3, weight=False, monkeypatch=monkeypatch)
    trainer = build(trainers.nnUNetTrainerFineTune, prepared, plans=with_overrides(prepared, iterations=50))
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(NonFiniteError, match=r"epoch 0, step 22 .*not finite since epoch 0, step 3; all weights are fin"):
        trainer.run_training()
    said = [line for line in capsys.readouterr().out.splitlines() if "so this step was skipped" in line]
    assert len(said) == 19 and not any("WARNING" in line or "case_" in line for line in said)


def infinite_gradients(trainer, steps):
    """Let the head's gradient be infinite in some of the steps, counted over the epochs; the losses stay finite."""
    first = next(trainer.bare_network.decoder.seg_layers[-1].parameters())
    first.register_hook(lambda gradient: gradient * (float("inf") if trainer.current_epoch * 10 + trainer.step_in_epoch
                                                     in steps else 1.0))


def test_a_gradient_that_is_not_finite_is_no_loss_and_no_later_step(prepared):
    trainer = build(trainers.nnUNetTrainerFineTune, prepared, plans=with_overrides(prepared, iterations=10))
    trainer.initialize()
    infinite_gradients(trainer, steps=[12])
    with pytest.raises(NonFiniteError, match=r"a gradient is not finite in epoch 1, step 2 \(cases case_00\d, case_00\d\), "
                                             r"not finite since epoch 1, step 2; \d+ tensors .*decoder.seg_layers"):
        trainer.run_training()
    assert load_checkpoint_safely(Path(trainer.output_folder, "checkpoint_best.pth"))["current_epoch"] <= 1


def test_with_a_grad_scaler_gradients_in_a_row_count_over_epochs_and_few_do_no_harm(prepared, capsys):
    """A loss that is finite, and steps that are all skipped: nothing would be learned until the last epoch."""
    trainer = build(trainers.nnUNetTrainerFineTune, prepared, plans=with_overrides(prepared, iterations=10))
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    infinite_gradients(trainer, steps=[0, 1, *range(3, 40)])
    with pytest.raises(NonFiniteError, match=r"a gradient is not finite in epoch 2, step 2 .*not finite since epoch 0, "
                                             r"step 3; all weights are finite"):
        trainer.run_training()
    assert capsys.readouterr().out.count("a gradient is not finite in epoch") == 2 + 19 + 1
    best = load_checkpoint_safely(Path(trainer.output_folder, "checkpoint_best.pth"))
    assert all(v.isfinite().all() for v in best["network_weights"].values())


def test_plans_written_for_the_option_are_read(prepared):
    plans = json.loads(json.dumps(with_overrides(prepared, stop_patience=20)))
    trainer = build(trainers.nnUNetTrainerFineTune, prepared, plans=plans)
    trainer.initialize()
    assert trainer.run_method.stop_patience == 20


def first_stop(losses, patience):
    return next((n for n in range(len(losses) + 1) if on_plateau(losses[:n], patience=patience)), None)


def test_a_falling_loss_goes_on_and_a_flat_one_stops_as_soon_as_it_can_be_seen():
    falling = [1 - 0.001 * epoch for epoch in range(200)]
    assert first_stop(falling, 20) is None
    assert first_stop([0.5] * 100, 20) == 30
    assert first_stop([0.5] * 100, 5) == 15


def test_a_curve_that_flattens_stops_after_the_patience():
    """Falls until epoch 50, then flat: windows 20 epochs apart are both flat once 80 epochs are done."""
    losses = [1 - 0.01 * min(epoch, 50) for epoch in range(200)]
    stop = first_stop(losses, 20)
    assert 70 < stop <= 80


def test_a_rising_loss_stops_and_noise_is_averaged():
    assert first_stop([0.5 + 0.01 * e for e in range(50)], 20) == 30
    noisy = [1 - 0.002 * e + 0.05 * (-1) ** e for e in range(200)]
    assert first_stop(noisy, 20) is None


@pytest.mark.parametrize("gain", [0.0009, 0.0011])
def test_the_threshold_is_a_thousandth_over_the_patience(gain):
    losses = [1 - gain / 20 * e for e in range(100)]
    assert (first_stop(losses, 20) is None) == (gain > 1e-3)


def test_off_never_stops_and_nan_is_no_plateau():
    assert first_stop([0.5] * 100, 0) is None
    assert first_stop([math.nan] * 100, 20) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_tensors_are_named_each_once(value):
    network = tiny.plain_unet(2)
    assert not_finite_weights(network) == []
    with torch.no_grad():
        network.encoder.stages[0][0].convs[0].conv.weight[0, 0, 1, 1] = value
    assert not_finite_weights(network) == ["encoder.stages.0.0.convs.0.conv.weight"]


def test_many_are_counted_and_some_shown():
    text = describe_not_finite([f"w{i}" for i in range(9)])
    assert text.startswith("9 tensors") and "w4, ..." in text and "w5" not in text
