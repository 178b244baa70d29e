"""payload/apply.py: the shipped functions segment as nnU-Net's predictor does, however the image lies."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from shipped import affine_of, balanced, dice, load, nnunet_labels, predictor, shown

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "centre": 3}
TWO = {"0": "T1", "1": "T2"}


def volume(shape, *, seed=0, scale=1.0, border=2):
    """Smooth blobs in a border of zeros, which nnU-Net crops away."""
    from scipy.ndimage import gaussian_filter

    image = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    image = image / image.std() * scale + 0.3 * scale
    inner = np.zeros(shape, bool)
    inner[tuple(slice(border, n - border) if n > 1 else slice(None) for n in shape)] = True
    return np.where(inner, image, 0).astype(np.float32)


def edit_plans(folder, edit):
    """Change the plans of a model folder, in plans.json and checkpoint."""
    plans = json.loads((folder / "plans.json").read_text())
    edit(plans)
    (folder / "plans.json").write_text(json.dumps(plans))
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["init_args"]["plans"] = plans
    torch.save(checkpoint, file)
    return folder


def expected_masks(model, labels):
    return {label["name"]: np.isin(labels, label["values"]) for label in model.model.settings["labels"]}


def compare(folder, *, shape=(22, 27, 19), spacing=(1.0, 1.0, 1.0), code="RAS", degrees=(0, 0, 0), plane="axial",
            channels=1, scale=1.0, **options):
    """Dice of each label between the shipped functions and nnU-Net."""
    model, built = load(balanced(folder), orientation=code, **options), predictor(folder, **options)
    files = [volume(shape, seed=s, scale=scale) for s in range(channels)]
    affine = affine_of(code, spacing, degrees=degrees)
    views = [shown(file, affine, plane) for file in files]
    data = {"image": views[0][0], "affine": views[0][1], "resolution": np.linalg.norm(views[0][1][:3, :3], axis=0)}
    data |= {f"image{i}": view for i, (view, _) in enumerate(views[1:], start=2)}
    found = model.apply(data)
    expected = expected_masks(model, nnunet_labels(built, files, spacing))
    assert list(found) == list(expected)
    assert all(m.dtype == np.uint8 and m.shape == data["image"].shape and set(np.unique(m)) <= {0, 1}
               for m in found.values())
    assert sum(m.sum() > 50 for m in expected.values()) >= 2, "the case shows nothing"
    return {name: dice(shown(mask, affine, plane)[0], found[name]) for name, mask in
            ((name, mask.astype(np.uint8)) for name, mask in expected.items())}


def assert_same(scores):
    assert min(scores.values()) >= 0.999, scores


@pytest.mark.parametrize("plane", ["axial", "sagittal", "coronal"])
@pytest.mark.parametrize(("code", "degrees"), [("RAS", (0, 0, 0)), ("LPS", (0, 0, 0)), ("RAS", (14, -9, 20)),
                                               ("PIR", (-12, 5, 8))], ids=["RAS", "LPS", "oblique", "oblique PIR"])
def test_a_volume_in_any_orientation_and_plane(tmp_path, code, degrees, plane):
    assert_same(compare(tiny.write_model_folder(tmp_path), code=code, degrees=degrees, plane=plane))


@pytest.mark.parametrize("scheme", ["ZScoreNormalization", "CTNormalization", "NoNormalization",
                                    "RescaleTo01Normalization"])
def test_every_normalisation(tmp_path, scheme):
    assert_same(compare(tiny.write_model_folder(tmp_path, normalization=scheme)))


def test_z_scores_within_the_mask(tmp_path):
    def masked(plans):
        plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True]

    assert_same(compare(edit_plans(tiny.write_model_folder(tmp_path), masked)))


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.9, 1.3), (0.8, 0.8, 3.9), (3.9, 0.8, 0.8)])
def test_resampling_from_and_to_other_voxels(tmp_path, architecture, spacing):
    assert_same(compare(tiny.write_model_folder(tmp_path, architecture=architecture), spacing=spacing))


@pytest.mark.parametrize("target", [(4.0, 1.0, 1.0), (1.5, 1.5, 1.5)])
@pytest.mark.parametrize("function", ["resample_torch_fornnunet", "resample_data_or_seg_to_shape"])
def test_every_resampling_function(tmp_path, function, target):
    def resampled(plans):
        config = plans["configurations"]["3d_fullres"]
        for part in ("data", "seg", "probabilities"):
            config[f"resampling_fn_{part}"] = function
            if "torch" in function:
                config[f"resampling_fn_{part}_kwargs"] = {
                    "is_seg": part == "seg", "force_separate_z": False if part == "probabilities" else None,
                    "memefficient_seg_resampling": False}

    folder = edit_plans(tiny.write_model_folder(tmp_path, spacing_mm=target), resampled)
    assert_same(compare(folder, spacing=(0.9, 1.1, 3.6), shape=(24, 26, 17)))


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_transposed_axes(tmp_path, transpose):
    folder = tiny.write_model_folder(tmp_path, transpose=transpose, patch=(16, 12, 20))
    assert_same(compare(folder, spacing=(1.2, 0.8, 1.0), plane="sagittal"))


def test_regions_and_several_contrasts(tmp_path):
    folder = tiny.write_model_folder(tmp_path, labels=REGIONS, channel_names=TWO, regions_class_order=[1, 2, 3])
    assert_same(compare(folder, channels=2))


@pytest.mark.parametrize("tile_step", [0.5, 0.8, 1.0])
def test_mirroring_and_step(tmp_path, tile_step):
    assert_same(compare(tiny.write_model_folder(tmp_path), mirroring=True, tile_step=tile_step))


def only_along(folder, axes):
    """Let the checkpoint allow mirroring along these axes alone."""
    file = folder / "fold_0" / "checkpoint_final.pth"
    torch.save(torch.load(file, weights_only=False) | {"inference_allowed_mirroring_axes": axes}, file)
    return folder


@pytest.mark.parametrize("axes", [None, (0,), (1,), (2,), (0, 2)])
def test_mirroring_along_the_axes_of_the_training_alone_in_the_order_of_a_transposed_network(tmp_path, axes):
    folder = tiny.write_model_folder(tmp_path, transpose=(1, 2, 0), patch=(16, 12, 20))
    assert_same(compare(only_along(folder, axes), spacing=(1.2, 0.8, 1.0), code="LPS", mirroring=True))


def test_a_volume_smaller_than_the_patch(tmp_path):
    assert_same(compare(tiny.write_model_folder(tmp_path, patch=(28, 32, 24))))


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)], ids=["axial", "sagittal"])
@pytest.mark.parametrize(("code", "axes"), [("RAS", None), ("LPS", None), ("LPS", (0,)), ("RAS", (1,))])
def test_a_slice_as_a_file_of_one_slice(tmp_path, code, axes, transpose):
    folder = balanced(tiny.write_model_folder(tmp_path, configuration="2d", transpose=transpose, spacing_mm=(1, 0.8, 1.1)))
    only_along(folder, axes)
    model, built = load(folder, orientation=code, mirroring=True), predictor(folder, mirroring=True)
    plane, axis = ("axial", 2) if transpose[0] == 0 else ("sagittal", 0)
    shape = [30, 37, 25]
    shape[axis] = 1
    file, spacing = volume(shape), (0.9, 0.7, 1.2)
    labels = nnunet_labels(built, [file], spacing)
    view, affine = shown(file, affine_of(code, spacing), plane)
    found = model.apply({"image": view[..., 0], "resolution": np.linalg.norm(affine[:3, :2], axis=0)})
    for name, mask in expected_masks(model, labels).items():
        assert mask.sum() > 20
        assert dice(shown(mask.astype(np.uint8), affine_of(code, spacing), plane)[0][..., 0], found[name]) >= 0.999


def counted(model):
    """Count the network's forward passes from here on."""
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def case():
    view, affine = shown(volume((20, 20, 20)), affine_of("RAS", (1, 1, 1)), "axial")
    return {"image": view, "affine": affine, "resolution": [1, 1, 1]}


def test_the_last_answer_is_remembered_until_image_or_weights_change(tmp_path):
    model, data = load(tiny.write_model_folder(tmp_path)), case()
    calls, first = counted(model), model.apply(data)
    first["organ"][:] = 7  # the client draws into what it was given
    n = len(calls)
    again = model.apply({**data, "classification": "Tiny, Left", "split_laterality": False})
    assert len(calls) == n
    assert set(np.unique(again["organ"])) <= {0, 1}
    model.apply(data | {"image": data["image"] * 2})
    assert len(calls) == 2 * n
    model.set_weights({k: v * 0.5 for k, v in model.get_weights().items()})
    model.apply(data)
    assert len(calls) == 3 * n


def test_nothing_but_zeros_has_no_label(tmp_path):
    found = load(tiny.write_model_folder(tmp_path)).apply(case() | {"image": np.zeros((20, 20, 20))})
    assert {k: int(v.sum()) for k, v in found.items()} == {"organ": 0, "lesion": 0}


@pytest.mark.parametrize(("change", "message"), [
    ({"affine": None}, "does not say how it lies"),
    ({"affine": np.diag([1.0, 1.0, 1.0, 1.0])}, "does not say how it lies"),
    ({"affine": np.full((4, 4), np.nan)}, "does not say how it lies"),
    ({"image": np.ones((20, 20))}, "segments 3D images"),
    ({"image2": np.ones((20, 20, 20))}, "needs 1 contrasts")])
def test_what_would_be_segmented_wrongly_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(tiny.write_model_folder(tmp_path)).apply(case() | change)


def test_a_missing_contrast_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="2 contrasts of one shape, in the order T1, T2"):
        load(tiny.write_model_folder(tmp_path, channel_names=TWO)).apply(case())


def test_images_without_orientation_can_be_taken_as_shown(tmp_path):
    model, data = load(tiny.write_model_folder(tmp_path), orientation="LPS", as_shown=True), case()
    assert model.apply({"image": data["image"], "resolution": [1, 1, 1]})["organ"].any()
