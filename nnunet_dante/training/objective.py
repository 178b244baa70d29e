"""The part of the trainer that adds terms to nnU-Net's loss: L2-SP, EWC and the size prior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_raw
from torch import distributed

from ..errors import ConfigurationError
from ..models.labels import head_names
from ..models.network import head_rows
from ..peft.regularisation import ExtendedLoss, StartPenalty, Weight, diagonal_fisher, trained_weights
from ..types import StateDict
from .size_prior import Gradient, SizePrior, organ_sizes_mm3, unlabelled_volumes
from .strength import organs

_Base: Any = object


class ObjectiveMixin(_Base):
    """Add the terms of the options l2_sp, ewc and size_prior to nnU-Net's loss.

    Without these options, this mixin changes nothing.
    """

    loss: Any

    def initialize(self) -> None:
        """Start without additional terms."""
        self.start_penalty: StartPenalty | None = None
        self.resumed_penalty: dict[str, StateDict] | None = None
        self.size_prior: SizePrior | None = None
        self.size_gradient: Gradient = []
        self.size_ratios: list[list[float]] = []
        super().initialize()

    def on_train_start(self) -> None:
        """Add the terms to nnU-Net's loss before the first step, when the data loaders already exist."""
        super().on_train_start()
        terms: list[Any] = []
        if self.run_method.l2_sp or self.run_method.ewc:
            self.start_penalty = self._start_penalty()
            terms.append(self.start_penalty.gradients)
        if self.run_method.size_prior:
            self.size_prior = self._size_prior()
            terms.append(lambda: self.size_gradient)
        if terms:
            self.loss = ExtendedLoss(self.loss, terms)

    def _start_penalty(self) -> StartPenalty:
        method, network = self.run_method, self.bare_network
        weights = trained_weights(network, [p for g in self.training_plan.groups for _, p in g.parameters])
        if (state := self.resumed_penalty) is None:
            state = {"start": self._start_values(weights),
                     "fisher": self._fisher(weights) if method.ewc else {}}
        return StartPenalty(weights, start=state["start"], l2_sp=method.l2_sp, ewc=method.ewc, fisher=state["fisher"])

    @property
    def loss_scale(self) -> float:
        """The factor by which a GradScaler multiplies the loss; 1 without a GradScaler."""
        return self.grad_scaler.get_scale() if self.grad_scaler is not None else 1.0

    @property
    def known_rows(self) -> list[int]:
        """The rows of the segmentation head that start as the donor's, and the background row if there are any."""
        donors = (self.start_entry or {}).get("label_map", {})
        return [row for row, name in enumerate(head_names(self.dataset_json))
                if donors.get(name) is not None or (name == "background" and any(donors.values()))]

    def _start_values(self, weights: dict[str, Weight]) -> StateDict:
        """Return the values to which weights are pulled: a copy of them, but 0 for rows of new labels (Li 2018)."""
        start = {name: weight.detach().clone() for name, weight in weights.items() if isinstance(weight, torch.Tensor)}
        known = self.known_rows
        for name, dim in head_rows(self.bare_network).items():
            if name in start:
                rows = start[name].movedim(dim, 0)
                rows[[row for row in range(len(rows)) if row not in known]] = 0
        return start

    def _fisher(self, weights: dict[str, Weight]) -> StateDict:
        batches = self.num_val_iterations_per_epoch
        images = (next(self.dataloader_train)["data"].to(self.device) for _ in range(batches))
        fisher = diagonal_fisher(self.bare_network, weights, images, rows=self.known_rows,
                                 sigmoid=self.label_manager.has_regions)
        if self.is_ddp:
            for values in fisher.values():
                distributed.all_reduce(values)
                values /= distributed.get_world_size()
        self.print_to_log_file(f"EWC: Fisher information of the start weights on {batches} batches of training images, "
                               f"for labels drawn from the start network's own prediction.")
        return fisher

    def _size_prior(self) -> SizePrior:
        if self.is_cascaded or self.label_manager.has_ignore_label:
            reason = "masks with an ignore label are not complete" if self.label_manager.has_ignore_label else \
                "a cascade needs predictions of its first stage for the images without masks"
            raise ConfigurationError(f"size_prior={self.run_method.size_prior!r} cannot be used here: {reason}; set it "
                                     f"to 0.")
        plans, configuration, method = self.plans_manager, self.configuration_manager, self.run_method
        folder = Path(str(nnUNet_raw), plans.dataset_name, method.size_images)  # an absolute path stays the same
        volumes = unlabelled_volumes(folder, plans=plans, configuration=configuration, dataset_json=self.dataset_json)
        sizes = self._expected_sizes()
        mib = sum(volume.data.nbytes for volume in volumes) / 2**20
        self.print_to_log_file(f"Size prior: {len(volumes)} images of {folder} ({mib:.0f} MiB in memory); expected "
                               f"sizes in ml", {self.foreground_names[self.foreground_rows.index(row)]:
                                                round(size / 1000, 2) for row, size in sizes.items()})
        return SizePrior(volumes=volumes, sizes_mm3=sizes, weight=method.size_prior, margin=method.size_margin,
                         patch=configuration.patch_size, batch=self.batch_size,
                         probabilities=torch.sigmoid if self.label_manager.has_regions else _softmax)

    @property
    def foreground_rows(self) -> list[int]:
        """The network's output of each of `foreground_names`."""
        return list(range(len(self.foreground_names))) if self.label_manager.has_regions \
            else list(self.label_manager.foreground_labels)

    def _expected_sizes(self) -> dict[int, float]:
        """Return {output of the network: mean size in mm^3 over the training masks that contain the organ}."""
        masks = self.dataset_class(self.preprocessed_dataset_folder, self.do_split()[0])
        sizes = organ_sizes_mm3(masks, organs(self.label_manager), plans=self.plans_manager,
                                configuration=self.configuration_manager)
        for name, column in zip(self.foreground_names, sizes.T):
            if not column.all():
                self.print_to_log_file(f"WARNING: size_prior expects every image to show the whole of {name}, but "
                                       f"{np.sum(column == 0)} of {len(column)} training masks hold none of it.")
        found = {row: float(column[column > 0].mean()) for row, column in zip(self.foreground_rows, sizes.T)
                 if column.any()}
        if not found:
            raise ConfigurationError("size_prior: no training mask of this fold holds any organ, so no size is known; "
                                     "set it to 0.")
        return found

    def on_train_epoch_start(self) -> None:
        """Reset the size prior in every epoch, so that a continued training computes the same as one without a stop."""
        super().on_train_epoch_start()
        self.size_gradient, self.size_ratios, self.size_visits, self.steps_to_visit = [], [], 0, 0

    def train_step(self, batch: dict) -> dict:
        """Train one step; in the second half of the epochs, first measure an image without a mask if it is due."""
        if self.size_prior is not None and 2 * self.current_epoch >= self.num_epochs:
            if self.steps_to_visit == 0:
                self._visit(self.size_prior)
            self.steps_to_visit -= 1
        return super().train_step(batch)

    def _visit(self, prior: SizePrior) -> None:
        """Measure one image, and keep its gradient for as many steps as the image has batches of tiles.

        To measure an image in every step would cost many times as much as the step itself. This way, the size prior
        costs about as much as the training.
        """
        rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if self.is_ddp else (0, 1)
        volume = prior.choose(self.current_epoch, self.size_visits * ranks + rank)
        ratios, self.size_gradient = prior.measure(self.bare_network, volume, loss_scale=self.loss_scale)
        self.size_ratios.append(ratios)
        self.size_visits += 1
        self.steps_to_visit = prior.steps(volume)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the values of the terms; the loss in the log is nnU-Net's own."""
        super().on_train_epoch_end(train_outputs)
        if self.start_penalty is not None:
            self.print_to_log_file(f"Penalty on the distance from the start weights: {self.start_penalty.value():.5g}")
        if self.size_ratios and self.size_prior is not None:
            names = [self.foreground_names[self.foreground_rows.index(row)] for row in self.size_prior.sizes_mm3]
            mean = np.mean(self.size_ratios, 0)
            self.print_to_log_file(f"Predicted / expected size, {len(self.size_ratios)} images without masks:",
                                   {name: round(float(ratio), 3) for name, ratio in zip(names, mean)})


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(1)
