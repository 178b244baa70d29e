"""Live logs in TensorBoard, where it is installed, and nnU-Net's progress figure, which is not drawn after every epoch.

TensorBoard shows curves by label, learning rate, stages, overlays, and strengths.

nnU-Net hands every value that it logs to all loggers in `MetaLogger.loggers`; its own one for W&B stands there, too.
Nothing here changes a training: it draws no random number, and an error ends the logs and not the training.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..peft.modes import full_resolution
from .strength import organs

_Base: Any = object
_PICTURES = 5  # epochs with overlays
_ENLARGED = 4  # pixels per voxel
_REDRAWN = 20.0  # seconds between two figures of the progress; drawing takes longer than a short epoch
_NAMES = {"lrs": "learning rate", "train_losses": "loss/training", "val_losses": "loss/validation",
          "mean_fg_dice": "dice/mean", "ema_fg_dice": "dice/moving average"}


class TensorBoardLogger:
    """A logger of nnU-Net that writes TensorBoard files.

    folder: of the files. names: nnU-Net's names of values -> names in TensorBoard, where they differ.
    say: receives a warning.
    """

    def __init__(self, folder: Path, names: Mapping[str, str], say: Callable[[str], object]):
        self.folder, self.names, self.say = folder, _NAMES | dict(names), say
        self.writer: Any = None
        self.broken, self.began = False, 0.0

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Do nothing: the plans and debug.json in the folder of the results hold the settings."""

    def log(self, key: str, value: float, step: int) -> None:
        """Write a value of an epoch; of its two time stamps, write the time between."""
        if key == "epoch_start_timestamps":
            self.began = value
            return
        if key == "epoch_end_timestamps":
            key, value = "seconds per epoch", value - self.began
        self._scalar(key, value, step, first_step=step)

    def log_summary(self, key: str, value: float | Mapping[str, float]) -> None:
        """Write a value of the whole training, or a curve of values by their share in per cent."""
        curve = value if isinstance(value, Mapping) else {"0": value}
        for share, one in curve.items():
            self._scalar(key, one, round(100 * float(share)))

    def _scalar(self, key: str, value: float, step: int, **options: int) -> None:
        self.write(lambda writer: writer.add_scalar(self.names.get(key, key), value, step), **options)

    def write(self, add: Callable[[Any], object], *, first_step: int | None = None) -> None:
        """Let `add` write with TensorBoard's writer, which is opened with the first value.

        first_step: what is there of this step and later ones, from before a training was continued, is not shown.
        """
        if self.broken:
            return
        try:
            if self.writer is None:
                sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))  # else it imports TensorFlow
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.folder), purge_step=first_step)
            add(self.writer)
            self.writer.flush()
        except Exception as error:  # whatever TensorBoard raises, such as on a full disk
            self.broken = True
            self.say(f"WARNING: TensorBoard gets no more values ({type(error).__name__}: {error}); the training goes "
                     "on.")


class LiveMixin(_Base):
    """Let nnU-Net's logger write TensorBoard files, and add what it does not log."""

    board: TensorBoardLogger | None = None
    shown: dict | None = None  # a batch of this epoch's validation
    drawn, redraw = -math.inf, True  # when the progress figure was drawn; whether it lacks the last epoch

    def initialize(self) -> None:
        """Add TensorBoard to nnU-Net's loggers, where it is installed, and let them draw the progress less often."""
        super().initialize()
        self.draw_progress, self.logger.plot_progress_png = self.logger.plot_progress_png, self._draw_seldom
        if self.local_rank == 0 and find_spec("tensorboard"):
            names = {"final_val/foreground_dice": "final validation/mean"}
            for number, (name, organ) in enumerate(zip(self.foreground_names, organs(self.label_manager)), start=1):
                names |= {f"dice_per_class_or_region/class_{number}": f"dice/{name}",
                          f"final_val/class_{organ}_dice": f"final validation/{name}"}
            self.board = TensorBoardLogger(Path(self.output_folder, "tensorboard"), names, self.print_to_log_file)
            self.logger.loggers.append(self.board)

    def on_train_epoch_start(self) -> None:
        """Log the stage of a method that opens the network in stages."""
        super().on_train_epoch_start()
        schedule, self.shown = self.training_plan.schedule, None
        if len(schedule.stages) > 1:
            for logger in self.logger.loggers:
                logger.log("stage", schedule.stages.index(schedule.stage(self.current_epoch)), self.current_epoch)

    def validation_step(self, batch: dict) -> dict:
        """Remember the first batch of an epoch whose overlay is drawn."""
        outputs = super().validation_step(batch)
        if self.board is not None and self.shown is None:
            self.shown = batch
        return outputs

    def on_epoch_end(self) -> None:
        """Say how much memory the training has taken, and in a few epochs draw what the network makes of a patch."""
        epoch, batch = self.current_epoch, self.shown
        if self.board is not None and batch is not None and epoch in np.linspace(
                0, self.num_epochs - 1, _PICTURES).astype(int):
            self.board.write(lambda writer: writer.add_image("prediction, truth", self._overlay(batch), epoch,
                                                             dataformats="HWC"))
        super().on_epoch_end()
        if (mib := self.memory.peak_mib()) is not None:
            self.print_to_log_file(f"Most memory so far: {mib:.0f} MiB")

    def _draw_seldom(self, folder: str) -> None:
        self.redraw = time.monotonic() - self.drawn < _REDRAWN
        if not self.redraw:
            self.draw_progress(folder)
            self.drawn = time.monotonic()

    @torch.no_grad()
    def _overlay(self, batch: dict) -> np.ndarray:
        """Return a slice of the batch's first patch with the prediction, and beside it with the truth.

        The result has shape (height, 2 width, 3), uint8.
        """
        from ..datasets.gather.preview import outlined

        logits = full_resolution(self.bare_network(batch["data"][:1].to(self.device)))[0]  # (heads, [z,] y, x)
        target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        if self.label_manager.has_regions:
            maps = [_flat(logits > 0), _flat(target[0].to(logits.device) > 0)]
        else:
            maps = [logits.argmax(0), target[0, 0]]
        image, prediction, truth = (t.cpu().numpy() for t in (batch["data"][0, 0], *maps))
        if image.ndim == 3:
            place = int((truth > 0).sum((1, 2)).argmax())
            image, prediction, truth = image[place], prediction[place], truth[place]
        low, high = np.percentile(image, (1, 99))
        grey = np.clip((image - low) / max(high - low, 1e-9), 0, 1)
        size = (_ENLARGED * image.shape[1], _ENLARGED * image.shape[0])
        return np.hstack([outlined(grey, np.maximum(labels, 0), size) for labels in (prediction, truth)])

    def on_train_end(self) -> None:
        """Draw the whole progress, if the last epoch did not; log the strength that is kept, and the Dice at each."""
        super().on_train_end()
        if self.local_rank == 0 and self.redraw:
            self.draw_progress(self.output_folder)
        for logger in self.logger.loggers if self.kept_strength is not None else ():
            logger.log_summary("strength/kept", self.kept_strength["value"])
            if curve := self.kept_strength.get("curve"):
                logger.log_summary("strength/dice", {f"{strength:g}": dice for strength, dice in curve})


def _flat(regions: torch.Tensor) -> torch.Tensor:
    """Return a label map of regions, shape (regions, ...), as (...): later regions lie on top."""
    numbers = torch.arange(1, len(regions) + 1, device=regions.device).reshape(-1, *[1] * (regions.ndim - 1))
    return (regions * numbers).amax(0)
