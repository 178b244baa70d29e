"""Two real volumes become two nnU-Net data sets of two cases each: the left half and the right half of one spine.

The cut is the midsagittal plane of the labelled spine; the halves share no voxel and keep their place in the world.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from ..errors import ConfigurationError

VERTEBRA = {"vertebral_body": (49, 50), "posterior_elements": tuple(range(41, 49))}
# The cord (60) lies inside the canal; left out, it would punch a hole into the canal's mask.
# The end plates (62), one voxel thin, stay background: the CT does not mark them.
SPINE = VERTEBRA | {"spinal_canal": (60, 61), "intervertebral_disc": (100,)}


@dataclass(frozen=True)
class Modality:
    """One volume, its mask, and the nnU-Net data set it becomes.

    structures: label name -> the integers of the source mask that are merged into it.
    """

    dataset: str
    channel: str
    image: str
    mask: str
    structures: dict[str, tuple[int, ...]]
    train: str
    check: str

    @property
    def labels(self) -> dict[str, int]:
        """Label name -> integer, as in dataset.json."""
        return {"background": 0} | {name: index for index, name in enumerate(self.structures, start=1)}


# nnU-Net picks the normalisation by channel name: "CT" means clipping to the intensities found in the labelled
# structures, every name it does not know (such as "T2w") means z-score per image.
CT = Modality("Dataset801_SpineCT", "CT", "sub-ct_label-22_ct.nii.gz", "sub-ct_seg-subreg_label-22_msk.nii.gz",
              VERTEBRA, train="ct_left", check="ct_right")
MR = Modality("Dataset802_SpineMR", "T2w", "sub-mri_label-6_T2w.nii.gz", "sub-mri_seg-subreg_label-6_msk.nii.gz",
              SPINE, train="mr_left", check="mr_right")


def merge_labels(mask: np.ndarray, structures: dict[str, tuple[int, ...]]) -> np.ndarray:
    """uint8 mask of the same shape: 1, 2, ... in the order of `structures`, 0 elsewhere."""
    merged = np.zeros(mask.shape, np.uint8)
    for index, values in enumerate(structures.values(), start=1):
        merged[np.isin(mask, values)] = index
    return merged


def split_at_midline(image: nibabel.Nifti1Image, mask: nibabel.Nifti1Image,
                     ) -> dict[str, tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]]:
    """Cut image and mask at the midsagittal plane: {"left": (image, mask), "right": (image, mask)}.

    The plane stands at right angles to the voxel axis that runs left-right, at the centre of mass of everything
    labelled, rounded to a boundary between two voxels. "left" is the patient's left. World coordinates are kept.

    Raises:
        ConfigurationError: if image and mask do not lie on one voxel grid, or the mask is empty.
    """
    if image.shape != mask.shape or not np.allclose(image.affine, mask.affine, atol=1e-3):
        raise ConfigurationError(f"image {image.shape} and mask {mask.shape} do not lie on one voxel grid; "
                                 "resample the mask to the image first")
    directions = nibabel.aff2axcodes(image.affine)
    axis = next(i for i, code in enumerate(directions) if code in "LR")
    positions = np.nonzero(np.asanyarray(mask.dataobj))[axis]
    if positions.size == 0:
        raise ConfigurationError("the mask is empty: there is no midline to cut at; check the file")
    cut = round(float(positions.mean()) + 0.5)
    low, high = ("left", "right") if directions[axis] == "R" else ("right", "left")
    parts = {low: slice(None, cut), high: slice(cut, None)}

    def crop(volume, part):
        index = [slice(None)] * 3
        index[axis] = part
        return volume.slicer[tuple(index)]

    return {side: (crop(image, parts[side]), crop(mask, parts[side])) for side in ("left", "right")}


def write_dataset(raw: Path, modality: Modality, files: dict[str, Path]) -> Path:
    """Write `modality` below nnUNet_raw; returns the data set's folder.

    Both halves go to imagesTr (nnU-Net scores the check case after each epoch, it never trains on it); the check
    case lies in imagesTs as well, for prediction.
    """
    folder = raw / modality.dataset
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    image, source = (nibabel.Nifti1Image.from_filename(files[name]) for name in (modality.image, modality.mask))
    merged = merge_labels(np.asanyarray(source.dataobj), modality.structures)
    mask = nibabel.Nifti1Image(merged, source.affine)
    prefix = modality.train.rpartition("_")[0]
    for side, (half, half_mask) in split_at_midline(image, mask).items():
        case = f"{prefix}_{side}"
        for suffix in ("Tr", "Ts") if case == modality.check else ("Tr",):
            nibabel.save(half, folder / f"images{suffix}" / f"{case}_0000.nii.gz")
            nibabel.save(half_mask, folder / f"labels{suffix}" / f"{case}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({
        "name": modality.dataset, "channel_names": {"0": modality.channel}, "labels": modality.labels,
        "numTraining": 2, "file_ending": ".nii.gz", "license": "Apache-2.0 (TPTBox)"}, indent=2))
    return folder


def write_split(preprocessed: Path, modality: Modality) -> Path:
    """Write the one fold: train on one half, check on the other; returns splits_final.json."""
    folder = preprocessed / modality.dataset
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "splits_final.json"
    path.write_text(json.dumps([{"train": [modality.train], "val": [modality.check]}]))
    return path
