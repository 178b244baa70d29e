"""live.py: TensorBoard and W&B get what nnU-Net logs and a little more, and no training depends on them."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import build, prepare, train, with_overrides

from nnunet_dante.models.memory import PeakMemory
from nnunet_dante.training import live, trainers
from nnunet_dante.ui.progress import Training, read_log

LABELS = ("lesion", "organ", "vessel")


class FakeWriter:
    """What a SummaryWriter was given: tag -> {step: value}."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.values = folder, purge_step, {}

    def add_scalar(self, tag, value, step):
        self.values.setdefault(tag, {})[step] = float(value)

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC" and image.dtype == np.uint8 and image.shape[2] == 3
        self.values.setdefault(tag, {})[step] = image

    def flush(self):
        pass


@pytest.fixture
def writers(monkeypatch):
    """Every writer that is opened."""
    opened = []

    def open_writer(folder, purge_step):
        opened.append(FakeWriter(folder, purge_step))
        return opened[-1]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=open_writer))
    monkeypatch.setattr(live, "find_spec", lambda name: name == "tensorboard")
    return opened


def test_tensorboard_gets_curves_by_label_stages_overlays_and_the_strength(prepared, writers):
    trained = train(trainers.nnUNetTrainerGradualUnfreezing, prepared)
    trained.perform_actual_validation()
    (writer,) = writers
    assert Path(writer.folder) == Path(trained.output_folder, "tensorboard") and writer.purge_step == 0
    by_epoch = {"learning rate", "loss/training", "loss/validation", "dice/mean", "dice/moving average", "stage",
                "seconds per epoch", "prediction, truth", *(f"dice/{name}" for name in LABELS)}
    at_the_end = {"strength/kept", "strength/dice", "final validation/mean", *(f"final validation/{n}" for n in LABELS)}
    assert set(writer.values) == by_epoch | at_the_end
    assert all(list(writer.values[tag]) == [0, 1, 2] for tag in by_epoch)
    assert writer.values["stage"] == dict(enumerate((0, 1, 2)))
    curve = trained.kept_strength["curve"]
    assert writer.values["strength/dice"] == {round(100 * s): pytest.approx(d, nan_ok=True) for s, d in curve}
    assert writer.values["dice/organ"][2] == pytest.approx(
        trained.logger.get_value("dice_per_class_or_region", 2)[1], nan_ok=True)
    assert writer.values["prediction, truth"][0].shape == (4 * 16, 2 * 4 * 16, 3)


def test_the_log_says_how_much_memory_was_taken(prepared, monkeypatch):
    monkeypatch.setattr(live, "find_spec", lambda _: None)
    monkeypatch.setattr(PeakMemory, "peak_mib", lambda self: 12.3)
    folder = Path(train(trainers.nnUNetTrainerHeadOnly, prepared).output_folder)
    read = Training(trainer="nnUNetTrainerHeadOnly", fold="0", folder=folder, total=3)
    read_log("".join(file.read_text() for file in folder.glob("training_log*")), read)
    assert [epoch.mib for epoch in read.epochs] == [12, 12, 12]


def test_a_training_is_the_same_bit_for_bit_without_tensorboard(prepared, writers, monkeypatch):
    weights = []
    for there in (True, False):
        monkeypatch.setattr(live, "find_spec", lambda _, there=there: there)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        weights.append(train(trainers.nnUNetTrainerLoRA, prepared).network.state_dict())
    assert len(writers) == 1
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())


def test_logs_that_cannot_be_written_do_not_stop_a_training(prepared, writers, monkeypatch):
    def full(self, *_):
        raise OSError("no space left on device")

    monkeypatch.setattr(FakeWriter, "add_scalar", full)
    trained = train(trainers.nnUNetTrainerHeadOnly, prepared)
    assert Path(trained.output_folder, "checkpoint_final.pth").is_file()
    said = Path(trained.log_file).read_text()
    assert said.count("WARNING: TensorBoard gets no more values (OSError: no space left on device)") == 1


def test_a_continued_training_hides_what_it_does_again_and_validation_alone_hides_nothing(prepared, writers):
    plans = with_overrides(prepared, epochs=2)
    trained = train(trainers.nnUNetTrainerHeadOnly, prepared, plans=plans)
    Path(trained.output_folder, "checkpoint_final.pth").rename(Path(trained.output_folder, "checkpoint_latest.pth"))
    content = torch.load(Path(trained.output_folder, "checkpoint_latest.pth"), weights_only=False)
    torch.save(content | {"current_epoch": 1, "logging": {k: v[:1] for k, v in content["logging"].items()}},
               Path(trained.output_folder, "checkpoint_latest.pth"))
    build(trainers.nnUNetTrainerHeadOnly, prepared, plans=plans, resume=True).run_training()
    validated = build(trainers.nnUNetTrainerHeadOnly, prepared, plans=plans)
    validated.initialize()
    validated.board.log_summary("final_val/foreground_dice", 0.5)
    assert [writer.purge_step for writer in writers] == [0, 1, None]


def test_regions_are_drawn_with_later_ones_on_top():
    regions = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]]).bool()
    assert live._flat(regions).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("options", [
    {"configuration": "2d"},
    {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}, "values": (1, 2, 3),
     "regions_class_order": [1, 2, 3]}], ids=["2d", "regions"])
def test_overlays_of_slices_and_of_regions(tmp_path, monkeypatch, writers, options):
    prepared = prepare(tmp_path, **options).activate(monkeypatch)
    trainer = build(trainers.nnUNetTrainerHeadOnly, prepared, configuration=options.get("configuration", "3d_fullres"))
    trainer.on_train_start()
    batch = next(trainer.dataloader_val)
    assert trainer._overlay(batch).shape == (64, 128, 3)


def test_without_tensorboard_nothing_is_written(prepared, monkeypatch):
    monkeypatch.setattr(live, "find_spec", lambda _: None)
    trainer = build(trainers.nnUNetTrainerHeadOnly, prepared)
    assert trainer.logger.loggers == [] and trainer.board is None


def test_tensorboard_reads_what_was_written(prepared, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(sys.modules, "tensorflow", None)
    trained = train(trainers.nnUNetTrainerLoRA, prepared)
    found = EventAccumulator(str(Path(trained.output_folder, "tensorboard"))).Reload()
    assert [event.step for event in found.Scalars("dice/organ")] == [0, 1, 2]
    assert [event.value for event in found.Scalars("loss/training")] == pytest.approx(
        [float(loss) for loss in trained.logger.get_value("train_losses", None)])
    assert found.Tags()["images"] == ["prediction, truth"]


def test_wandb_gets_the_same_through_nnunets_own_logger(prepared, monkeypatch, writers):
    from nnunetv2.training.logging import nnunet_logger

    logged, summary, started = {}, {}, {}
    run = SimpleNamespace(config=SimpleNamespace(update=lambda _: None), step=0, summary=summary,
                          log=lambda values, step: logged.setdefault(step, {}).update(values))
    monkeypatch.setattr(nnunet_logger, "wandb", SimpleNamespace(init=lambda **options: started.update(options) or run))
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.setenv("nnUNet_wandb_mode", "offline")
    train(trainers.nnUNetTrainerGradualUnfreezing, prepared)
    assert started["mode"] == "offline"
    assert sorted(logged) == [0, 1, 2] and {"train_losses", "stage", "dice_per_class_or_region/class_2"} <= set(logged[2])
    assert {"strength/kept", "strength/dice"} <= set(summary) and len(writers) == 1


@pytest.mark.parametrize(("epochs", "epochs_drawn"), [(5, [1, 4, 5]), (4, [1, 4])])
def test_the_progress_is_drawn_first_last_and_seldom_between(prepared, monkeypatch, epochs, epochs_drawn):
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    drawn, clock = [], iter(range(0, 1000, 8))
    monkeypatch.setattr(LocalLogger, "plot_progress_png",
                        lambda logger, _: drawn.append(len(logger.get_value("lrs", None))))
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    train(trainers.nnUNetTrainerHeadOnly, prepared, plans=with_overrides(prepared, epochs=epochs))
    assert drawn == epochs_drawn
