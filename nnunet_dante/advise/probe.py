"""What a pretrained network does on a few training cases before any training: its Dice, and where its gradients are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from ..datasets.images import Case
from ..errors import ConfigurationError, TransferError
from ..methods.groups import parameter_groups
from ..models.labels import has_regions, head_names
from ..peft.modes import full_resolution
from ..training.partial import MarginalLoss
from ..types import DatasetJson, Plans


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One preprocessed patch around the structures of a case: image (1, c, *size), labels (1, 1, *size) as integers.

    undrawn: labels that were not drawn in this case.
    """

    image: Tensor
    labels: Tensor
    undrawn: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured on the patches.

    dice: known label -> mean over the patches where it is, or is predicted. dice_inverted: the same where the network
    sees the images with bright and dark exchanged. gradients: parameter group, head first -> ||g|| / ||w||.
    """

    dice: dict[str, float]
    dice_inverted: dict[str, float]
    gradients: dict[str, float]


def cut_patches(cases: Sequence[Case], plans: Plans, configuration: str, dataset_json: DatasetJson,
                known: Sequence[str]) -> list[Patch]:
    """Preprocess each case in memory as training would, and cut one patch around a label, in turn one of `known`.

    Raises:
        ConfigurationError: the configuration is the second stage of a cascade.
        TransferError: a case cannot be preprocessed.
    """
    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    if config.previous_stage_name is not None:
        raise ConfigurationError(f"-c {configuration} is the second stage of a cascade, which reads the result of the "
                                 f"first; ask for {config.previous_stage_name} instead.")
    preprocessor, patches = config.preprocessor_class(verbose=False), []
    rows = _rows(dataset_json)
    wanted = [rows[name] for name in known] or [tuple({v for values in rows.values() for v in values} - {0})]
    for number, case in enumerate(cases):
        try:
            image, labels, _ = preprocessor.run_case([str(p) for p in case.images], str(case.mask), manager, config,
                                                     dataset_json)
        except Exception as error:  # whatever a reader or nnU-Net raises on a damaged file
            raise TransferError(f"{case.mask.name} cannot be preprocessed ({type(error).__name__}: {error}). "
                                "Run `nnUNetv2_plan_and_preprocess --verify_dataset_integrity` to find the cause."
                                ) from error
        patches.append(_cut(image, labels[0], config.patch_size, wanted[number % len(wanted)]))
    return patches


def _cut(image: np.ndarray, labels: np.ndarray, patch_size: Sequence[int], wanted: Sequence[int]) -> Patch:
    """Cut around the median voxel of `wanted`, else of any label, else of the image; pad with zeros as nnU-Net does."""
    labels = np.maximum(labels, 0).astype(np.int64)  # nnU-Net marks what lies outside the image's nonzero part with -1
    size = [1] * (labels.ndim - len(patch_size)) + list(patch_size)  # a 2d network reads slices
    places = next(p for p in (np.isin(labels, wanted), labels > 0, labels == 0) if p.any())
    centre = np.median(np.argwhere(places), 0).astype(int)
    start = [max(0, min(c - s // 2, n - s)) for c, s, n in zip(centre, size, labels.shape)]
    window = tuple(slice(a, a + s) for a, s in zip(start, size))
    missing = [(0, s - n) for s, n in zip(size, labels[window].shape)]
    cut_image = np.pad(image[(slice(None), *window)], [(0, 0), *missing])
    cut_labels = np.pad(labels[window], missing)
    return Patch(image=torch.from_numpy(cut_image).float().reshape(1, len(image), *patch_size),
                 labels=torch.from_numpy(cut_labels).reshape(1, 1, *patch_size))


def probe(network: nn.Module, patches: Sequence[Patch], dataset_json: DatasetJson, *, known: Sequence[str],
          batch_dice: bool = False) -> Probe:
    """Measure Dice of the `known` labels as they are and with inverted contrast, and one gradient over all patches.

    The loss is nnU-Net's own, Dice and cross entropy at full resolution. The network is in evaluation mode and keeps
    its weights. ||g|| / ||w|| is the relative gradient norm of Lee et al. 2023 (Surgical Fine-Tuning, Auto-RGN), here
    for each parameter group.
    """
    network.eval().zero_grad()
    device = next(network.parameters()).device
    loss, straight, inverted = MarginalLoss(_loss(dataset_json, batch_dice), regions=has_regions(dataset_json)), [], []
    for patch in patches:
        image, labels = patch.image.to(device), patch.labels.to(device)
        loss.undrawn = torch.tensor([[name in patch.undrawn for name in head_names(dataset_json)]])
        logits = full_resolution(network(image))
        (loss(logits, _loss_target(labels, dataset_json)) / len(patches)).backward()
        straight.append(_dice(logits, labels, dataset_json, patch.undrawn))
        with torch.no_grad():
            inverted.append(_dice(full_resolution(network(-image)), labels, dataset_json, patch.undrawn))
    gradients = {}
    for group in parameter_groups(network):
        weights = [p for _, p in group.parameters]
        gradients[group.name] = _norm([p.grad for p in weights]) / max(_norm(weights), 1e-12)
    network.zero_grad()
    return Probe(dice=_means(straight, known), dice_inverted=_means(inverted, known), gradients=gradients)


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return float(sum(float(t.detach().double().square().sum()) for t in tensors if t is not None)) ** 0.5


def _rows(dataset_json: DatasetJson) -> dict[str, tuple[int, ...]]:
    """Head row -> the values in the masks that belong to it."""
    return {name: tuple(int(v) for v in np.ravel(dataset_json["labels"][name])) for name in head_names(dataset_json)}


def _ignored(labels: Tensor, dataset_json: DatasetJson) -> Tensor:
    return labels == int(dataset_json["labels"].get("ignore", -1))


def _loss(dataset_json: DatasetJson, batch_dice: bool) -> nn.Module:
    ignore = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order")).ignore_label
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "ddp": False}
    if has_regions(dataset_json):
        return DC_and_BCE_loss({}, {**dice, "do_bg": True}, use_ignore_label=ignore is not None,
                               dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_CE_loss({**dice, "do_bg": False}, {}, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)


def _loss_target(labels: Tensor, dataset_json: DatasetJson) -> Tensor:
    if not has_regions(dataset_json):
        return labels
    regions = [torch.isin(labels, labels.new_tensor(values)) for values in _rows(dataset_json).values()]
    ignored = [_ignored(labels, dataset_json)] if "ignore" in dataset_json["labels"] else []
    return torch.cat([*regions, *ignored], 1).float()


def _dice(logits: Tensor, labels: Tensor, dataset_json: DatasetJson, undrawn: frozenset[str]) -> dict[str, float]:
    """Dice of every row that was drawn and that the labels or the prediction hold; nnU-Net's rule."""
    rows, valid = _rows(dataset_json), ~_ignored(labels, dataset_json)[:, 0]
    winner, found = logits.detach().argmax(1), {}
    for row, (name, values) in enumerate(rows.items()):
        truth = torch.isin(labels[:, 0], labels.new_tensor(values)) & valid
        predicted = (logits[:, row] > 0 if has_regions(dataset_json) else winner == row) & valid
        if name not in undrawn and (truth.any() or predicted.any()):
            found[name] = float(2 * (truth & predicted).sum() / (truth.sum() + predicted.sum()))
    return found


def _means(found: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    values = {name: [f[name] for f in found if name in f] for name in names}
    return {name: sum(v) / len(v) for name, v in values.items() if v}
