"""Models as Dafne would have them, from the shipped sources alone: exec'd one by one, without dafne_dl."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from nnunet_dante.dafne.settings import settings_for
from nnunet_dante.dafne.sources import function_of, sources
from nnunet_dante.models.checkpoint import unique_tensors
from nnunet_dante.models.donor import open_donor


class Model:
    """What the shipped functions use of DynamicTorchModel."""

    def __init__(self, functions, *, model_id="one", weights=None):
        self.functions, self.model_id, self.timestamp_id, self.is_delta = functions, model_id, 1_700_000_000, False
        for name, source in functions.items():
            setattr(self, name.removesuffix("_function"), function_of(source, name))
        self.model = self.init_model()
        if weights is not None:
            self.set_weights(weights)

    def set_weights(self, weights):
        self.weights_to_model(self, weights)

    def get_weights(self):
        return self.model_to_weights(self)

    def get_empty_copy(self):
        other = Model(self.functions, model_id=self.model_id)
        other.timestamp_id, other.is_delta = self.timestamp_id, self.is_delta
        return other

    def copy(self):
        other = self.get_empty_copy()
        other.set_weights(self.weight_copy(self.get_weights()))
        return other

    def apply(self, data):
        return self.apply_model(self, data)

    def learn(self, data, outputs, bs=5, min_images=5):
        self.incremental_learn(self, data, outputs, bs, min_images)


def settings_of(folder, *, orientation="RAS", as_shown=False, mirroring=False, tile_step=0.5, **learning):
    settings = settings_for(open_donor(folder), orientation=orientation, as_shown=as_shown, mirroring=mirroring,
                            tile_step=tile_step)
    settings["learning"] |= learning
    return settings


def balanced(folder, *, seed=0):
    """Give a random network heads whose rows compete, so that no label fills the image; returns the folder."""
    import torch

    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint, generator = torch.load(file, weights_only=False), torch.Generator().manual_seed(seed)
    for key, tensor in checkpoint["network_weights"].items():
        if ".seg_layers." in key and tensor.ndim > 1:  # rows of zero sum: norm and activation left features alike
            rows = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(rows - rows.mean(1, keepdim=True))
        elif ".seg_layers." in key:
            tensor.zero_()
    torch.save(checkpoint, file)
    return folder


def load(folder, **options):
    """The model of a model folder."""
    return Model(sources(settings_of(folder, **options)), weights=unique_tensors(open_donor(folder).weights))


def predictor(folder, *, mirroring=False, tile_step=0.5):
    """nnU-Net's own predictor for the folder's fold 0."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    built = nnUNetPredictor(tile_step_size=tile_step, use_mirroring=mirroring, perform_everything_on_device=False,
                            device=torch.device("cpu"), allow_tqdm=False)
    built.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    return built


def nnunet_labels(built, channels, spacing_mm):
    """Label map (i, j, k) that nnU-Net predicts for the channels (i, j, k) of a file with these voxel sizes."""
    image = np.stack([c.transpose(2, 1, 0) for c in channels]).astype(np.float32)
    found = built.predict_single_npy_array(image, {"spacing": list(spacing_mm[::-1])}, None, None, False)
    return found.transpose(2, 1, 0)


def rotation(degrees):
    """Rotation about the axes in turn."""
    total = np.eye(3)
    for (a, b), angle in zip(itertools.combinations(range(3), 2), np.deg2rad(degrees)):
        turn = np.eye(3)
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        total = turn @ total
    return total


def affine_of(code, spacing_mm, *, degrees=(0, 0, 0), origin=(-30.0, 12.0, 7.0)):
    """Affine of a file whose axes lead as `code` says, tilted by `degrees`."""
    axes = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (letter, size) in enumerate(zip(code, spacing_mm)):
        world, sign = axes[letter]
        affine[world, column] = sign * size
    affine[:3, :3] = rotation(degrees) @ affine[:3, :3]
    affine[:3, 3] = origin
    return affine


def shown(array, affine, plane):
    """Array and affine as Dafne turns them for the screen (contract, 2): axial, sagittal or coronal."""
    from nibabel import Nifti1Image

    code = {"axial": "PLS", "sagittal": "IAL", "coronal": "ILP"}[plane]
    turned = Nifti1Image(array, affine).as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(code)))
    return np.asarray(turned.dataobj), turned.affine


def dice(a, b):
    total = a.sum(dtype=float) + b.sum(dtype=float)
    return 1.0 if total == 0 else 2 * float(np.logical_and(a, b).sum()) / total


def namespace(**values):
    return SimpleNamespace(**copy.deepcopy(values))
