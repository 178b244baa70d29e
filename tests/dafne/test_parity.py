"""Exported files segment in dafne-dl as nnU-Net's predictor does from the image file, in a few whole runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tiny
import torch
from dafne_client import as_stored, client, shown

from nnunet_dante.dafne.export import export_model
from nnunet_dante.models.donor import open_donor
from nnunet_dante.models.network import build_network
from nnunet_dante.training.launch import VARIABLE, trainers_folder

REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
TURN = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]]) @ np.array(
    [[1.0, 0.0, 0.0], [0.0, 0.98, -0.199], [0.0, 0.199, 0.98]])


@dataclass(frozen=True)
class Case:
    """A model and an image: the axes of the stored file lead where `codes` says, `oblique` turns them a little."""

    configuration: str = "3d_fullres"
    codes: str = "RAS"
    oblique: bool = False
    shape: tuple = (26, 22, 19)
    spacing_mm: tuple = (1.0, 1.0, 1.0)
    plane: str = "axial"
    mirroring: bool = False
    channels: int = 1
    reader: str | None = None
    trainer: str | None = None
    plans: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)


CASES = {
    "ras": Case(), "lps": Case(codes="LPS", plane="sagittal"), "oblique": Case(oblique=True, plane="coronal"),
    "reoriented": Case(codes="PIL", reader="NibabelIOWithReorient", oblique=True),
    "resampled": Case(spacing_mm=(0.8, 1.3, 1.1), mirroring=True),
    "thick slices": Case(spacing_mm=(0.9, 0.9, 4.0), shape=(28, 30, 9),
                         plans={"spacing_mm": (3.0, 1.0, 1.0), "patch": (8, 16, 16)}),
    "transposed": Case(spacing_mm=(4.0, 1.0, 1.2), shape=(9, 26, 24), codes="LAS",
                       plans={"transpose": (2, 0, 1), "spacing_mm": (4.0, 1.0, 1.0)}),
    "residual": Case(plans={"architecture": "ResidualEncoderUNet"}, codes="LAS", mirroring=True),
    "spatial adapter": Case(codes="LPS", trainer="nnUNetTrainerSpatialAdapter"),
    "adaptformer": Case(plans={"architecture": "ResidualEncoderUNet"}, trainer="nnUNetTrainerAdaptFormer"),
    "ct": Case(plans={"normalization": "CTNormalization"}, codes="LPS"),
    "regions": Case(model={"labels": REGIONS, "regions_class_order": [1, 2]}, mirroring=True),
    "two contrasts": Case(channels=2, codes="LPS"),
    "2d": Case("2d", shape=(27, 24, 1), codes="LPS"),
    "2d resampled": Case("2d", shape=(27, 24, 1), spacing_mm=(0.8, 1.25, 5.0), mirroring=True),
    "2d coronal": Case("2d", shape=(24, 1, 22), plane="coronal", plans={"transpose": (1, 0, 2)}),
}


def balanced(folder: Path) -> None:
    """Move the head's biases so that no label wins everywhere: random heads have a favourite."""
    donor, path = open_donor(folder), next(folder.glob("fold_*/*.pth"))
    network = build_network(donor.plans, donor.dataset_json, donor.configuration,
                            trainer_name=donor.network_trainer).eval()
    network.load_state_dict(donor.weights)
    head, dim = network.decoder.seg_layers[-1], len(donor.plans["configurations"][donor.configuration]["patch_size"])
    with torch.no_grad():
        head.weight *= 30
        logits = network(torch.randn(1, head_inputs(network), *[16] * dim))[0]
        head.bias -= logits.mean(dim=(0, *range(2, logits.ndim)))
    content = torch.load(path, weights_only=False)
    torch.save(content | {"network_weights": network.state_dict()}, path)


def head_inputs(network) -> int:
    return next(p.shape[1] for p in network.encoder.parameters() if p.ndim > 2)


def write_images(case: Case, folder: Path, rng) -> list[Path]:
    signs = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    directions = np.zeros((3, 3))
    for axis, code in enumerate(case.codes):
        world, sign = signs[code]
        directions[world, axis] = sign * case.spacing_mm[axis]
    affine = np.eye(4)
    affine[:3, :3] = (TURN if case.oblique else np.eye(3)) @ directions
    affine[:3, 3] = (-31.0, 12.5, 70.0)
    paths = []
    for channel in range(case.channels):
        voxels = rng.normal(0.4, 0.4, case.shape).astype(np.float32)
        for axis, n in enumerate(case.shape):  # a border of zeros that is cropped away, not alike on both sides
            if n > 12:
                np.moveaxis(voxels, axis, 0)[:2 + axis] = 0
                np.moveaxis(voxels, axis, 0)[-1:] = 0
        paths.append(folder / f"case_{channel:04d}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(voxels, affine), paths[-1])
    return paths


def predicted_by_nnunet(folder: Path, images: list[Path], output: Path, mirroring: bool) -> np.ndarray:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=mirroring, perform_everything_on_device=False,
                                device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=(0,))
    predictor.predict_from_files_sequential([[str(p) for p in images]], [str(output)])
    return np.asarray(nibabel.load(f"{output}.nii.gz").dataobj)


SEGMENT = """
import pickle
for number in range(int(arguments[1])):
    with open(f"{arguments[0]}/{number}.pkl", "rb") as stream:
        path, data = pickle.load(stream)
    masks = load(path).apply(data)
    assert all(m.dtype == np.uint8 and m.shape == data["image"].shape for m in masks.values())
    np.savez(f"{arguments[0]}/{number}.npz", **masks)
"""


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def results(tmp_path_factory, monkeypatch_module):
    """Case -> (nnU-Net's label map, {label: mask of the client}), both as stored in the file."""
    import pickle

    root, rng, expected, images = tmp_path_factory.mktemp("parity"), np.random.default_rng(0), {}, {}
    monkeypatch_module.setenv(VARIABLE, str(trainers_folder()))
    for number, (name, case) in enumerate(CASES.items()):
        folder = tiny.write_model_folder(
            root / name, configuration=case.configuration, seed=number,
            channel_names={str(c): f"contrast {c}" for c in range(case.channels)}, **case.model, **case.plans)
        if case.reader:
            replace_reader(folder, case.reader)
        if case.trainer:
            tiny.add_modules(folder, case.trainer)
        balanced(folder)
        paths = write_images(case, root / name, rng)
        expected[name] = predicted_by_nnunet(folder, paths, root / name / "nnunet", case.mirroring)
        export_model(folder, root / f"model{number}.model", mirroring=case.mirroring,
                     orientation=None if case.reader else case.codes)
        images[name] = nibabel.load(paths[0])
        volumes = [shown(nibabel.load(p), case.plane) for p in paths]
        arrays = [v.get_fdata(dtype=np.float32) for v in volumes]
        data = {"image": arrays[0], "resolution": np.linalg.norm(volumes[0].affine[:3, :3], axis=0),
                "affine": volumes[0].affine, "split_laterality": False, "classification": "Tiny"}
        data |= {f"image{c + 2}": array for c, array in enumerate(arrays[1:])}
        if case.configuration == "2d":
            data = {"image": arrays[0][..., 0], "resolution": data["resolution"][:2], "split_laterality": True}
        (root / f"{number}.pkl").write_bytes(pickle.dumps((str(root / f"model{number}.model"), data)))
    client(SEGMENT, root, len(CASES), home=root / "home")
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        with np.load(root / f"{number}.npz") as masks:
            found[name] = {label: as_stored(m[..., None] if m.ndim == 2 else m, images[name], case.plane)
                           for label, m in masks.items()}
    return {name: (expected[name], found[name]) for name in CASES}


def replace_reader(folder: Path, reader: str) -> None:
    path = next(folder.glob("fold_*/*.pth"))
    content = torch.load(path, weights_only=False)
    content["init_args"]["plans"]["image_reader_writer"] = reader
    torch.save(content, path)
    file = folder / "plans.json"
    file.write_text(file.read_text().replace("SimpleITKIO", reader))


@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_nnunet(results, name):
    expected, found = results[name]
    values = {"whole": (1, 2), "core": (2,)} if name == "regions" else {"organ": (1,), "lesion": (2,)}
    assert set(found) == set(values)
    for label, numbers in values.items():
        truth = np.isin(expected, numbers)
        assert 0.01 < truth.mean() < 0.9, f"{label} covers {truth.mean():.3f}: the comparison would say nothing"
        dice = 2 * np.sum(truth & (found[label] > 0)) / (truth.sum() + np.sum(found[label] > 0))
        assert dice >= 0.999, label
