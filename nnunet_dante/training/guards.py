"""The part of the trainer that ends a training early: on a plateau cleanly, on NaN or infinity with an error."""

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
_TOLERATED = 20  # steps in a row that a GradScaler may skip before the training counts as broken


class _Plateau(Exception):
    """Ends nnU-Net's loop over the epochs."""


class StoppingMixin(_Base):
    """Stop when the training loss is on a plateau (option stop_patience), and when loss or weights are not finite."""

    def run_training(self) -> None:
        """Run nnU-Net's loop; a plateau ends it as its last epoch would."""
        try:
            super().run_training()
        except _Plateau as reason:
            self.print_to_log_file(str(reason))
            self.on_train_end()

    def on_epoch_start(self) -> None:
        """Stop before the epoch if the last ones brought nothing. This depends on the logged losses alone.

        So a training that has stopped stops again when it is continued. Epochs count from the one at which the last
        group opens, and the size prior begins: before it, a plateau says nothing about what comes.
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
        """Start counting steps whose numbers are not finite."""
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
        """Return whether the gradient is finite. A GradScaler lowers its scale where not; without one, look at all."""
        if self.grad_scaler is not None:
            return self.loss_scale >= scale
        return not not_finite((n, p.grad) for n, p in self.bare_network.named_parameters() if p.grad is not None)

    def _step_not_finite(self, what: str, batch: dict) -> None:
        """Stop the training, unless a GradScaler has skipped this step and has not skipped too many in a row."""
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
        """Check the weights after each epoch: no loss has shown yet what the last step made of them."""
        super().on_train_epoch_end(train_outputs)
        if bad := not_finite_weights(self.bare_network):
            self._stop(f"after the last step of epoch {self.current_epoch} {describe_not_finite(bad)}")

    def refuse_not_finite(self, weights: ReadOnlyStateDict, file: str) -> None:
        """Never let a checkpoint with NaN or infinite weights take the place of a good one."""
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
    """Return whether the mean loss of the last 10 epochs is less than 0.001 below that of `patience` epochs before.

    FSEFT's rule (arXiv 2303.17051; there with a patience of 20). Never with a patience of 0, nor in the first
    10 + patience epochs.
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
    """Return how many tensors are not finite, and the first of them."""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} tensors hold NaN or infinite numbers: {', '.join(names[:_SHOWN])}{more}"
