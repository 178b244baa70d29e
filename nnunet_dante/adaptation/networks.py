"""The networks of a finished adaptation: the one that segments, and those that show by agreeing how sure it is."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..adapters.strength import interpolate, kept_strength, trained_weights
from ..errors import ConfigurationError, StrengthError
from ..files import read_json
from ..models.archive import DEFAULT_CHECKPOINT
from ..models.checkpoint import load_checkpoint_safely
from ..models.donor import Donor, open_donor
from ..models.installed import find_donor
from ..models.network import build_network
from ..training.strength import start_of
from ..transfers.keep import open_folds
from ..types import PathLike, ReadOnlyStateDict
from .running import RECORD
from .steps import Steps

Prepared: TypeAlias = tuple[torch.Tensor, dict[str, Any]]
"""A preprocessed image, shape (channels, ...), and what leads from it back to the grid of its file."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The network that segments, and others of the same form.

    donor: plans, labels and form of all of them.
    final: the weights that segment; of several, nnU-Net takes the mean of what they predict.
    others: kind -> weights of the networks of this kind that are compared with it. "donor": before the training.
        "strength": with more or less of what was learned. "folds": trained on other cases.
    folds: fold folders of the adaptation, each with cases that it did not see; empty for other models.
    steps: the adaptation's folders.
    """

    donor: Donor
    final: Sequence[ReadOnlyStateDict]
    others: Mapping[str, Sequence[ReadOnlyStateDict]]
    folds: Sequence[Path] = ()
    steps: Steps | None = field(default=None, repr=False)


def open_networks(source: PathLike, *, configuration: str | None = None, trust: bool = False) -> Networks:
    """Read the networks of an adaptation, or of any nnU-Net model.

    Args:
        source: folder OUT of `adapt`; or a model folder, an exported zip or a checkpoint.
        configuration: needed if the source holds several models.
        trust: also read a checkpoint that runs code when it is loaded; only if you know its author.

    Raises:
        ConfigurationError: the adaptation is not finished.
        DonorError, UntrustedFileError: the source holds no model that can be used.
    """
    path = find_donor(source).resolve()
    if (path / RECORD).is_file():
        return _of_adaptation(path)
    first = open_donor(source, configuration=configuration, trust=trust)
    weights = [donor.weights for donor in ([first] if first.fold == "all" else open_folds(path, first))]
    return Networks(donor=first, final=weights, others={"folds": weights} if len(weights) > 1 else {})


def _of_adaptation(out: Path) -> Networks:
    done = read_json(out / RECORD)["done"]
    if "files" not in done:
        raise ConfigurationError(f"{out} holds an adaptation that is not finished. Give its command again: "
                                 "nnunet-dante adapt MODEL FOLDER -o OUT. It goes on where it was stopped.")
    folder, fold = Path(out, done["files"]["folder"]).resolve(), done["files"]["fold"]
    if not (folder / f"fold_{fold}" / DEFAULT_CHECKPOINT).is_file():  # OUT was copied without nnU-Net's folders
        return open_networks(out / done["files"]["model"])
    steps = Steps(out, total=0, own_folders=False)
    donor = open_donor(folder, fold=fold)
    folds = [folder / f"fold_{number}" for number in done["folds"]["folds"]]
    others = changed_networks(folder / f"fold_{fold}", steps.folder("nnUNet_preprocessed", donor.dataset_name))
    trained = [load_checkpoint_safely(f / DEFAULT_CHECKPOINT) for f in folds if f.name != f"fold_{fold}"]
    if weights := [c["network_weights"] for c in trained if kept_strength(c)]:  # at strength 0, each is the donor
        others["folds"] = weights
    return Networks(donor=donor, final=[donor.weights], others=others, folds=folds, steps=steps)


def changed_networks(fold: Path, preprocessed: Path) -> dict[str, list[ReadOnlyStateDict]]:
    """Return as "donor" and "strength" the networks that a finished training makes at other strengths.

    fold: folder fold_X. preprocessed: its preprocessed data set. A training from random weights makes no such networks.
    """
    checkpoint = load_checkpoint_safely(fold / DEFAULT_CHECKPOINT)
    try:
        start = start_of(checkpoint, fold=fold, folder=lambda: preprocessed)
    except StrengthError:
        return {}
    kept = kept_strength(checkpoint)
    other = interpolate(start, trained_weights(checkpoint), 0.5 if kept == 1 else 1.0)
    found: dict[str, list[ReadOnlyStateDict]] = {"donor": [start]} if kept else {}
    return found | {"strength": [other]}


class Segmenter:
    """Segment images with nnU-Net's own code, in this process."""

    def __init__(self, donor: Donor, device: str):
        self.manager = PlansManager(dict(donor.plans))
        self.configuration = self.manager.get_configuration(donor.configuration)
        if self.configuration.previous_stage_name is not None:
            raise ConfigurationError(f"{donor.configuration} is the second stage of a cascade, which reads the result "
                                     "of the first; use nnUNetv2_predict.")
        self.dataset_json = dict(donor.dataset_json)
        self.labels = self.manager.get_label_manager(self.dataset_json)
        self.ending = str(self.dataset_json["file_ending"])
        self.reader = self.manager.image_reader_writer_class()
        network = build_network(donor.plans, donor.dataset_json, donor.configuration, deep_supervision=False,
                                trainer_name=donor.network_trainer, trust=donor.trust)
        with contextlib.redirect_stdout(io.StringIO()):  # it says what it does without a GPU
            self.predictor = nnUNetPredictor(device=torch.device(device), allow_tqdm=False)
            self.predictor.manual_initialization(network, self.manager, self.configuration, None, self.dataset_json,
                                                 donor.network_trainer, donor.mirroring_axes or None)

    def prepare(self, images: Sequence[Path]) -> Prepared:
        """Preprocess the files of an image, one per channel."""
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case([str(file) for file in images], None, self.manager,
                                                    self.configuration, self.dataset_json)
        return torch.from_numpy(data), properties

    def masks_of(self, prepared: Prepared, networks: Mapping[str, Sequence[ReadOnlyStateDict]]) -> dict[
            str, list[np.ndarray]]:
        """Return kind -> the mask of each network of this kind, predicted without mirroring."""
        return {kind: [self.mask(prepared, [weights], mirroring=False) for weights in same]
                for kind, same in networks.items()}

    def mask(self, prepared: Prepared, weights: Sequence[ReadOnlyStateDict], *, mirroring: bool = True) -> np.ndarray:
        """Return the mask on the grid of the image's file, axes as nnU-Net's reader gives them.

        mirroring: average over mirrored images, as nnU-Net does; takes 8 times as long with three axes.
        """
        data, properties = prepared
        self.predictor.list_of_parameters, self.predictor.use_mirroring = list(weights), mirroring
        logits = self.predictor.predict_logits_from_preprocessed_data(data).cpu()
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, self.manager, self.configuration, self.labels, properties,
            num_threads_torch=torch.get_num_threads())
