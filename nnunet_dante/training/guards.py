"""The part of the trainer that ends a training early: on a plateau of the loss, or with an error on NaN or infinity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..errors import NonFiniteError
from ..models.checkpoint import not_finite
from ..types import ReadOnlyStateDict

_Base: Any = object
_TOLERATED = 20  # if a GradScaler skips so many steps in a row, the training ends with an error


class _Plateau(Exception):
    """Raised to leave nnU-Net's loop over the epochs."""


class StoppingMixin(_Base):
    """Stop a training if its loss is on a plateau (option stop_patience), or if loss or weights are not finite."""

    def run_training(self) -> None:
        """Run nnU-Net's loop; if the loss is on a plateau, end it as after its last epoch."""
        try:
            super().run_training()
        except _Plateau as reason:
            self.print_to_log_file(str(reason))
            self.on_train_end()

    def on_epoch_start(self) -> None:
        """Stop before an epoch if the loss is on a plateau.

        This depends only on the logged losses, so a training that stopped here stops again when it is continued. Only
        epochs count in which all groups are open and the size prior is active: a plateau before that does not tell how
        the loss will go on.
        """
        patience, first = self.run_method.stop_patience, self.training_plan.schedule.stages[-1].first_epoch
        if self.run_method.size_prior:
            first = max(first, math.ceil(self.num_epochs / 2))
        losses = self.logger.get_value("train_losses", None)[first:self.current_epoch]
        if on_plateau(losses, patience=patience):
            raise _Plateau(f"Stopped after {self.current_epoch} of {self.num_epochs} epochs: the mean training loss of "
                           f"{WINDOW} epochs fell by less than {MIN_GAIN} in {patience} epochs (stop_patience).")
        super().on_epoch_start()

    def on_train_start(self) -> None:
        """Start to count the steps with numbers that are not finite."""
        super().on_train_start()
        self.broken_steps: list[tuple[int, int]] = []  # epoch and step of those in a row

    def on_train_epoch_start(self) -> None:
        """Count the steps of this epoch."""
        super().on_train_epoch_start()
        self.step_in_epoch = 0

    def train_step(self, batch: dict) -> dict:
        """Stop at a loss or a gradient that is not finite."""
        scale = self.loss_scale
        outputs = super().train_step(batch)
        if np.isfinite(outputs["loss"]) and self._finite_gradient(scale):
            self.broken_steps = []
        else:
            what = "a gradient is not finite" if np.isfinite(outputs["loss"]) else f"the loss is {outputs['loss']}"
            self._step_not_finite(what, batch)
        self.step_in_epoch += 1
        return outputs

    def _finite_gradient(self, scale: float) -> bool:
        """Return whether the gradient is finite. A GradScaler lowers its scale if it is not."""
        if self.grad_scaler is not None:
            return self.loss_scale >= scale
        return not not_finite((n, p.grad) for n, p in self.bare_network.named_parameters() if p.grad is not None)

    def _step_not_finite(self, what: str, batch: dict) -> None:
        """Stop the training, unless a GradScaler skipped this step and has not skipped too many in a row."""
        self.broken_steps.append((self.current_epoch, self.step_in_epoch))
        bad = not_finite_weights(self.bare_network)
        where = f"epoch {self.current_epoch}, step {self.step_in_epoch}"
        if self.grad_scaler is not None and not bad and len(self.broken_steps) < _TOLERATED:
            self.print_to_log_file(f"Mixed precision: {what} in {where}, so this step was skipped and the loss scale "
                                   f"lowered to {self.loss_scale:g}. A few such steps are normal.")
            return
        where += f" (cases {', '.join(map(str, batch.get('keys', ()))) or 'unknown'})"
        epoch, step = self.broken_steps[0]
        self._stop(f"{what} in {where}, not finite since epoch {epoch}, step {step}; "
                   + (describe_not_finite(bad) if bad else "all weights are finite, so look for NaN in these images"))

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Check the weights after each epoch, because no loss has been computed since the last step."""
        super().on_train_epoch_end(train_outputs)
        if bad := not_finite_weights(self.bare_network):
            self._stop(f"after the last step of epoch {self.current_epoch} {describe_not_finite(bad)}")

    def refuse_not_finite(self, weights: ReadOnlyStateDict, file: str) -> None:
        """Stop before a checkpoint with NaN or infinite weights is written over a good one."""
        if bad := not_finite(weights.items()):
            self._stop(f"{Path(file).name} is not written: {describe_not_finite(bad)}")

    def _stop(self, what: str) -> None:
        good = [name for name in ("checkpoint_latest.pth", "checkpoint_best.pth")
                if Path(self.output_folder, name).is_file()]
        message = (f"Training stopped: {what}. "
                   + (f"{' and '.join(good)} in {self.output_folder} are from before. " if good else "")
                   + f"Lower the learning rate (lr is {self.run_method.lr:g}), or look for NaN, infinite or extreme "
                     f"values in the images.")
        self.print_to_log_file(message)
        raise NonFiniteError(message)


WINDOW = 10
MIN_GAIN = 1e-3


def on_plateau(losses: Sequence[float], *, patience: int) -> bool:
    """Return whether the mean loss of 10 epochs has fallen by less than 0.001 within the last `patience` epochs.

    This is FSEFT's rule (arXiv 2303.17051), which uses a patience of 20. The result is False with a patience of 0, and
    in the first 10 + patience epochs.
    """
    if patience < 1 or len(losses) < WINDOW + patience:
        return False
    now = sum(losses[-WINDOW:]) / WINDOW
    before = sum(losses[-WINDOW - patience:-patience]) / WINDOW
    return before - now < MIN_GAIN


_SHOWN = 5


def not_finite_weights(network: nn.Module) -> list[str]:
    """Return the names of parameters and buffers that hold NaN or infinite numbers, each tensor once."""
    return not_finite([*network.named_parameters(), *network.named_buffers()])


def describe_not_finite(names: list[str]) -> str:
    """Return a text with the number of these tensors and the names of the first."""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} tensors hold NaN or infinite numbers: {', '.join(names[:_SHOWN])}{more}"
