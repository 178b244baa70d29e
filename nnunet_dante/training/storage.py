"""The part of the trainer that loses no work when a training is killed or a file cannot be written.

nnU-Net continues (`--c`) from the first there is of checkpoint_final, checkpoint_latest and checkpoint_best. Each is
written whole or not at all; this sees to it that the three and the adapter belong together at any moment.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import DonorError, StorageError
from ..files import cannot_write
from ..models.checkpoint import load_checkpoint_safely
from .strength import START

_Base: Any = object
_LATEST, _BEST = "checkpoint_latest.pth", "checkpoint_best.pth"
_RESULTS = ("checkpoint_final.pth", _LATEST, _BEST, "adapter.safetensors", START)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)


class StorageMixin(_Base):
    """Keep the files of a fold folder complete and from the same training; stop when they cannot be written."""

    save_every: int
    _best_ema: Any

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device("cuda")):  # noqa: B008 - nnU-Net compares signatures
        with self._results():
            super().__init__(plans, configuration, fold, dataset_json, device)
        log = Path(self.log_file)  # nnU-Net goes on without a log, and would train until the first checkpoint
        if self.local_rank == 0 and not (log.is_file() and log.stat().st_size):
            raise cannot_write(log, OSError(errno.EACCES, "nothing can be written into this folder"))

    @contextmanager
    def _results(self) -> Iterator[None]:
        """Turn nnU-Net's errors on writing results into this package's."""
        try:
            yield
        except OSError as error:
            folder = Path(getattr(self, "output_folder", None) or "")
            file = Path(error.filename or folder)
            ours = file.is_relative_to(folder.parent) or folder.is_relative_to(file)  # that, or a folder on the way
            if error.errno in _NO_ROOM or (error.errno in _NO_ACCESS and error.filename and ours):
                raise cannot_write(folder if folder.is_relative_to(file) else file, error) from error
            raise

    def run_training(self) -> None:
        """Say how to go on when a result cannot be written."""
        try:
            with self._results():
                super().run_training()
        except StorageError as error:
            raise StorageError(f"Training stopped in epoch {self.current_epoch}: {error} With --c the training goes on "
                               f"from the last checkpoint in {self.output_folder}.") from error

    def on_train_start(self) -> None:
        """Remove temporary files that killed processes have left."""
        if self.local_rank == 0:
            for name in _RESULTS:
                for file in Path(self.output_folder).glob(f".{name}.*.tmp"):
                    file.unlink(missing_ok=True)
        super().on_train_start()

    def set_aside(self) -> None:
        """Rename what an earlier training left in this folder: --c and `compare` must not take it for this one's."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        folder, moved = Path(self.output_folder), []
        logs = [file for file in folder.glob("training_log*.txt") if file != Path(self.log_file)]
        for old in filter(Path.exists, [*(folder / name for name in (*_RESULTS, "validation")), *logs]):
            previous = old.with_name(f"{old.name}.previous")
            if previous.is_dir():
                shutil.rmtree(previous)
            old.replace(previous)
            moved.append(old.name)
        if moved:
            self.print_to_log_file(f"This folder held an earlier training. These of its files and folders are now "
                                   f"called NAME.previous: {', '.join(moved)}.")

    def on_epoch_end(self) -> None:
        """Save the best checkpoint before the latest, which nnU-Net saves without this epoch's best score.

        A training continued from there would take a worse epoch for its best, or lose the best to a kill in between.
        """
        every, self.save_every = self.save_every, self.num_epochs + 1
        super().on_epoch_end()
        self.save_every = every
        if self.current_epoch % every == 0 and self.current_epoch < self.num_epochs:
            self.save_after(self.current_epoch, _LATEST)

    def save_after(self, epochs: int, name: str) -> None:
        """Save a checkpoint from which a training goes on after so many epochs; nnU-Net counts one more."""
        self.current_epoch = epochs - 1
        self.save_checkpoint(str(Path(self.output_folder, name)))
        self.current_epoch = epochs

    def read_checkpoint(self, file: str) -> dict[str, Any]:
        """Return the content of a checkpoint of this training.

        Raises:
            DonorError: it cannot be read.
        """
        try:
            return load_checkpoint_safely(file, trust=True)
        except DonorError as error:
            others = [name for name in _RESULTS[:3] if name != Path(file).name and Path(file).with_name(name).is_file()]
            raise DonorError(f"{error} Without a copy, move it away: --c then "
                             + (f"continues from {others[0]}." if others else "starts anew.")) from error

    def keep_best(self) -> None:
        """Let no epoch that is trained again replace a better checkpoint_best; with workers it may come out worse."""
        file = Path(self.output_folder, _BEST)
        if self.logger.resume and file.is_file():
            scores = (self._best_ema, self.read_checkpoint(str(file))["_best_ema"])
            self._best_ema = max((score for score in scores if score is not None and score == score),
                                 default=None)
