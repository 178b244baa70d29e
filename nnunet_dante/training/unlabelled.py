"""What the size prior needs of the data: images without masks as the network sees them, and organ sizes in masks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from ..datasets.images import image_files, reading
from ..errors import ConfigurationError
from ..models.labels import channel_names
from ..types import DatasetJson
from .size_prior import Volume


def unlabelled_volumes(folder: Path, *, plans: PlansManager, configuration: ConfigurationManager,
                       dataset_json: DatasetJson) -> list[Volume]:
    """Return the images of `folder` (CASE_0000 and so on), preprocessed by nnU-Net and kept in memory as float32.

    Raises:
        ConfigurationError: there are none, or one has another number of channels than the data set.
        TransferError: one cannot be read.
    """
    ending = dataset_json["file_ending"]
    cases = image_files(folder, ending)
    if not cases:
        raise ConfigurationError(f"size_prior needs images without masks, but {folder} holds no CASE_0000{ending}; put "
                                 f"them there, name another folder with size_images, or set size_prior to 0.")
    return [_volume(name, list(map(str, files)), plans, configuration, dataset_json) for name, files in cases.items()]


def _volume(name: str, files: list[str], plans: PlansManager, configuration: ConfigurationManager,
            dataset_json: DatasetJson) -> Volume:
    expected = len(channel_names(dataset_json))
    preprocessor = configuration.preprocessor_class(verbose=False)
    with reading(Path(files[0]).parent, f"image {name}"):
        data, _, properties = preprocessor.run_case(files, None, plans, configuration, dataset_json)
    if len(data) != expected:
        raise ConfigurationError(f"size_prior: image {name} in {Path(files[0]).parent} has {len(data)} channels, the "
                                 f"data set {expected}; give every image all channels (_0000, _0001, ...).")
    return Volume(name=name, data=torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)),
                  voxel_mm3=voxel_mm3(properties, plans, configuration))


def voxel_mm3(properties: dict[str, Any], plans: PlansManager, configuration: ConfigurationManager) -> float:
    """Return the volume of a preprocessed voxel, mm^3; 2d configurations keep each image's own distance of slices."""
    spacing = [float(s) for s in configuration.spacing]
    own = [float(properties["spacing"][axis]) for axis in plans.transpose_forward]
    return float(np.prod([*own[:len(own) - len(spacing)], *spacing]))


def organ_sizes_mm3(dataset: Any, labels: Iterable[int | tuple[int, ...]], *, plans: PlansManager,
                    configuration: ConfigurationManager) -> np.ndarray:
    """Return the size of each label or region in each preprocessed training mask, shape (cases, labels).

    dataset: nnU-Net's, with `identifiers` and `load_case`.
    """
    wanted = [np.atleast_1d(label) for label in labels]
    sizes = []
    for case in dataset.identifiers:
        _, mask, _, properties = dataset.load_case(case)
        values, counts = np.unique(mask[:], return_counts=True)
        voxel = voxel_mm3(properties, plans, configuration)
        sizes.append([voxel * counts[np.isin(values, label)].sum() for label in wanted])
    return np.array(sizes, float)
