"""The part of the trainer that makes sure that no work is lost if a training is killed or a file cannot be written.

nnU-Net continues (`--c`) from the first that exists of checkpoint_final, checkpoint_latest and checkpoint_best. Each
file is written whole or not at all. This mixin keeps the three checkpoints and the adapter consistent with each other.
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
        log = Path(self.log_file)  # nnU-Net continues without a log, and would only fail at the first checkpoint
        if self.local_rank == 0 and not (log.is_file() and log.stat().st_size):
            raise cannot_write(log, OSError(errno.EACCES, "nothing can be written into this folder"))

    @contextmanager
    def _results(self) -> Iterator[None]:
        """Turn errors that come from writing results into a `StorageError`."""
        try:
            yield
        except OSError as error:
            folder = Path(getattr(self, "output_folder", None) or "")
            file = Path(error.filename or folder)
            ours = file.is_relative_to(folder.parent) or folder.is_relative_to(file)  # or a folder above it
            if error.errno in _NO_ROOM or (error.errno in _NO_ACCESS and error.filename and ours):
                raise cannot_write(folder if folder.is_relative_to(file) else file, error) from error
            raise

    def run_training(self) -> None:
        """Train as nnU-Net does; if a result cannot be written, the error says how to continue."""
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
        """Rename the results of an earlier training in this folder, so that --c and `compare` cannot mix the two up."""
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
        """Save checkpoint_latest after checkpoint_best, and with the best score of this epoch.

        nnU-Net saves checkpoint_latest first, with the old best score. A training that continues from it could take a
        worse epoch for its best, and a kill between the two would lose the best checkpoint.
        """
        every, self.save_every = self.save_every, self.num_epochs + 1
        super().on_epoch_end()
        self.save_every = every
        if self.current_epoch % every == 0 and self.current_epoch < self.num_epochs:
            self.save_after(self.current_epoch, _LATEST)

    def save_after(self, epochs: int, name: str) -> None:
        """Save a checkpoint that says that so many epochs are done; nnU-Net writes `current_epoch` + 1."""
        self.current_epoch = epochs - 1
        self.save_checkpoint(str(Path(self.output_folder, name)))
        self.current_epoch = epochs

    def read_checkpoint(self, file: str) -> dict[str, Any]:
        """Return the content of a checkpoint of this training.

        Raises:
            DonorError: the file cannot be read; the message says how to continue.
        """
        try:
            return load_checkpoint_safely(file, trust=True)
        except DonorError as error:
            others = [name for name in _RESULTS[:3] if name != Path(file).name and Path(file).with_name(name).is_file()]
            raise DonorError(f"{error} Without a copy, move it away: --c then "
                             + (f"continues from {others[0]}." if others else "starts anew.")) from error

    def keep_best(self) -> None:
        """After --c, keep the score of the checkpoint_best on disk, so that no worse epoch replaces that file."""
        file = Path(self.output_folder, _BEST)
        if self.logger.resume and file.is_file():
            scores = (self._best_ema, self.read_checkpoint(str(file))["_best_ema"])
            self._best_ema = max((score for score in scores if score is not None and score == score),
                                 default=None)
