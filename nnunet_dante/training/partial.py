"""The part of the trainer for labels that were drawn in some cases only, and for cases that are rehearsed.

Which labels were drawn in which case stands in dataset.json (`datasets/annotated.py`). A label that was not drawn is
neither learned nor scored in this case. Without such an entry nothing here changes a training.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import load_summary_json, save_summary_json
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn

from ..datasets.annotated import REHEARSED, foreground, undrawn_labels, without_cases
from ..models.labels import head_names
from ..types import DatasetJson
from .strength import mean_dice, organs

_ABSENT = -1e4  # a logit whose probability is 0, also in half precision
_FINEST = 20  # rehearsed cases are repeated so often that their share of the patches is met up to about this fraction
_Base: Any = object


class MarginalLoss(nn.Module):
    """nnU-Net's loss, in which labels that were not drawn in a sample count as background.

    Softmax labels: p'_0 = p_0 + sum of p_k over the labels k that were not drawn, and p'_k = 0, which is the marginal
    loss of Shi et al. 2021 (Medical Image Analysis 70). So the network is free to find an undrawn label wherever
    background is drawn, and only there. Sigmoid regions: the outputs of undrawn ones are left out, as in MultiTalent
    (Ulrich et al. 2023). An output that is left out adds a constant to the loss, and nothing to the gradient.

    undrawn: set before each batch; (batch, outputs), True for labels that were not drawn. None: all were.
    """

    def __init__(self, loss: nn.Module, *, regions: bool = False) -> None:
        super().__init__()
        self.loss, self.regions = loss, regions
        self.undrawn: Tensor | None = None

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (batch, outputs, *space) and of a target as nnU-Net's loss takes it."""
        if self.undrawn is None or not self.undrawn.any():
            return self.loss(output, target)
        undrawn = self.undrawn.to(output.device)
        hidden = undrawn.reshape(*undrawn.shape, *[1] * (output.ndim - 2))  # (batch, outputs, 1, ...)
        if self.regions:
            ignored = hidden.new_zeros(len(hidden), target.shape[1] - hidden.shape[1], *hidden.shape[2:])
            target = target.masked_fill(torch.cat([hidden, ignored], 1), 0)
            return self.loss(output.masked_fill(hidden, _ABSENT), target)
        output = output.float()
        others = output[:, 1:].masked_fill(~hidden[:, 1:], -torch.inf)
        background = torch.cat([output[:, :1], others], 1).logsumexp(1, keepdim=True)
        drawn = output[:, 1:].masked_fill(hidden[:, 1:], _ABSENT)
        # A voxel of an undrawn label would cost 1e4; the ignore label, one above the outputs, stays as it is.
        table = torch.cat([undrawn, undrawn.new_zeros(len(undrawn), 1)], 1)
        lost = table.gather(1, target.flatten(1).long().clamp(0, table.shape[1] - 1)).reshape(target.shape)
        return self.loss(torch.cat([background, drawn], 1), target.masked_fill(lost, 0))


def mixed(own: Sequence[str], rehearsed: Sequence[str], share: float) -> list[str]:
    """Return cases to draw patches from evenly, some several times, so that `share` of the draws are rehearsed ones."""
    wanted = Fraction(share / (1 - share) * len(own) / len(rehearsed))  # draws of a rehearsed case per one of an own
    ratio = wanted.limit_denominator(_FINEST) if wanted >= 1 else 1 / (1 / wanted).limit_denominator(_FINEST)
    return [*list(own) * ratio.denominator, *list(rehearsed) * ratio.numerator]


def drawn_summary(summary: dict[str, Any], hidden: Mapping[str, Collection[Any]], ending: str) -> dict[str, Any]:
    """Return what nnU-Net's validation found, without the labels that were not drawn in a case.

    Args:
        summary: as nnU-Net's `load_summary_json` returns it.
        hidden: case -> its undrawn labels or regions, as the summary names them.
        ending: of the files of cases.
    """
    cases = []
    for case in summary["metric_per_case"]:
        lost = hidden.get(Path(case["reference_file"]).name.removesuffix(ending), ())
        cases.append(case | {"metrics": {label: dict.fromkeys(found, math.nan) if label in lost else found
                                         for label, found in case["metrics"].items()}})
    mean = {label: {name: mean_dice([case["metrics"][label][name] for case in cases]) for name in found}
            for label, found in summary["mean"].items()}
    foreground_mean = {name: mean_dice([found[name] for label, found in mean.items() if label != 0])
                       for name in summary["foreground_mean"]}
    return {"metric_per_case": cases, "mean": mean, "foreground_mean": foreground_mean}


class PartialLabelsMixin(_Base):
    """Leave labels out of loss and pseudo Dice in cases in which they were not drawn, and rehearse cases."""

    dataset_json: DatasetJson
    undrawn: Mapping[str, frozenset[str]] = {}
    rehearsal: Mapping[str, Any] = {}
    marginal_loss: MarginalLoss | None = None

    def initialize(self) -> None:
        """Read which labels were drawn. Checkpoints do not get it, as cases may have the names of patients."""
        self.undrawn = undrawn_labels(self.dataset_json)
        self.rehearsal = self.dataset_json.get(REHEARSED, {})
        self.dataset_json = self.my_init_kwargs["dataset_json"] = without_cases(self.dataset_json)
        super().initialize()

    def _build_loss(self) -> nn.Module:
        """Put the marginal loss around nnU-Net's, inside deep supervision."""
        loss = super()._build_loss()
        if not self.undrawn:
            return loss
        deep = isinstance(loss, DeepSupervisionWrapper)
        self.marginal_loss = MarginalLoss(loss.loss if deep else loss, regions=self.label_manager.has_regions)
        if not deep:
            return self.marginal_loss
        loss.loss = self.marginal_loss
        return loss

    def _hide(self, loss: MarginalLoss, cases: Sequence[str]) -> None:
        names = head_names(self.dataset_json)
        loss.undrawn = torch.tensor([[name in self.undrawn.get(case, ()) for name in names] for case in cases])

    def train_step(self, batch: dict) -> dict:
        """Tell the loss which labels were drawn in the cases of this batch."""
        if self.marginal_loss is not None:
            self._hide(self.marginal_loss, batch["keys"])
        return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        """Validate case by case where labels were not drawn, and leave these out of the counts of the pseudo Dice."""
        if self.marginal_loss is None:
            return super().validation_step(batch)
        steps = []
        for i, case in enumerate(batch["keys"]):
            target = batch["target"]
            one = [part[i:i + 1] for part in target] if isinstance(target, list) else target[i:i + 1]
            self._hide(self.marginal_loss, [case])
            step = super().validation_step({"data": batch["data"][i:i + 1], "target": one, "keys": [case]})
            hidden = [name in self.undrawn.get(case, ()) for name in foreground(self.dataset_json)]
            steps.append({key: value if key == "loss" else np.where(hidden, 0, value) for key, value in step.items()})
        return {key: np.mean([step[key] for step in steps], 0) if key == "loss" else sum(step[key] for step in steps)
                for key in steps[0]}

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, and take labels that were not drawn out of its summary.json."""
        super().perform_actual_validation(save_probabilities)
        file = Path(self.output_folder, "validation", "summary.json")
        if self.undrawn and self.local_rank == 0 and file.is_file():
            of_name = dict(zip(foreground(self.dataset_json), organs(self.label_manager)))
            hidden = {case: [of_name[name] for name in names] for case, names in self.undrawn.items()}
            summary = drawn_summary(load_summary_json(str(file)), hidden, self.dataset_json["file_ending"])
            save_summary_json(summary, str(file))
            self.print_to_log_file(f"Mean Validation Dice of the labels that were drawn: "
                                   f"{summary['foreground_mean']['Dice']}")

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return training and validation cases without the rehearsed ones."""
        rehearsed = set(self.rehearsal.get("cases", ()))
        training, validation = super().do_split()
        return [case for case in training if case not in rehearsed], [c for c in validation if c not in rehearsed]

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """Return nnU-Net's two data sets; the one to train on draws the rehearsed cases, too, in their share."""
        training, validation = super().get_tr_and_val_datasets()
        if rehearsed := self.rehearsal.get("cases"):
            training.identifiers = mixed(training.identifiers, rehearsed, self.rehearsal["share"])
        return training, validation
