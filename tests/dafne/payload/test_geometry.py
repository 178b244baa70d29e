"""payload/geometry.py: turning is exact and reversible, preprocessing is nnU-Net's, scaled intensities are found out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from nnunetv2.preprocessing.normalization import default_normalization_schemes as schemes
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from shipped import affine_of, shown

from nnunet_dante.dafne.payload import geometry

CODES = ["".join(pair[side] for pair, side in zip(order, sides)) for order in itertools.permutations(("RL", "AP", "SI"))
         for sides in itertools.product((0, 1), repeat=3)]
SPACINGS = [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (1.0, 1.0, 5.0), (0.7, 0.9, 2.2), (0.24, 1.25, 1.25), (3.1, 1.0, 1.0)]


def settings(**changes):
    return {"dimension": 3, "orientation": "RAS", "as_shown": False, "transpose": [0, 1, 2]} | changes


@pytest.mark.parametrize("code", CODES)
def test_every_orientation_is_turned_into_the_files_own_and_back(code):
    file = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    affine = affine_of(code, (1.0, 2.0, 3.0), degrees=(10, -8, 5))
    for plane, transpose in itertools.product(("axial", "sagittal", "coronal"), itertools.permutations(range(3))):
        view, view_affine = shown(file, affine, plane)
        axes, flips = geometry.placement(settings(orientation=code, transpose=list(transpose)), view_affine)
        turned = geometry.turn(view, {"axes": axes, "flips": flips})
        assert np.array_equal(turned, file.transpose(2, 1, 0).transpose(transpose))
        assert np.array_equal(geometry.turn_back(turned, {"axes": axes, "flips": flips}), view)
        assert geometry.voxel_size(view_affine, axes) == [(3.0, 2.0, 1.0)[t] for t in transpose]


@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("transpose", [[0, 1, 2], [1, 0, 2], [2, 0, 1]])
def test_a_slice_is_turned_as_the_slice_of_its_volume(code, transpose):
    file, size = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6), (1.0, 2.0, 3.0)
    flat = settings(orientation=code, transpose=transpose, dimension=2)
    plane = {"S": "axial", "I": "axial", "R": "sagittal", "L": "sagittal"}.get(geometry.network_axes(flat)[0], "coronal")
    view, view_affine = shown(file, affine_of(code, size), plane)
    resolution = np.linalg.norm(view_affine[:3, :2], axis=0)
    axes, flips = geometry.placement(flat, geometry.known_affine(flat, {"resolution": resolution}))
    found = {geometry.turn(view[:, :, [i]], {"axes": axes, "flips": flips}).tobytes() for i in range(view.shape[2])}
    expected = {np.ascontiguousarray(s[None]).tobytes() for s in file.transpose(2, 1, 0).transpose(transpose)}
    assert found == expected


@pytest.mark.parametrize(("spacing", "new"), itertools.product(SPACINGS, SPACINGS))
@pytest.mark.parametrize("force", [None, True, False])
def test_thick_slices_are_recognised_as_nnunet_does(spacing, new, force):
    separate, axis = determine_do_sep_z_and_axis(force, spacing, new)
    assert geometry.separate_axis(spacing, new, force=force) == (axis if separate else None)


@pytest.mark.parametrize(("old_shape", "new_shape"), [((6, 9, 8), (9, 7, 12)), ((5, 9, 8), (5, 12, 10)),
                                                      ((12, 9, 8), (4, 9, 8)), ((1, 9, 8), (1, 13, 6))])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("order", "order_z", "dtype"), [(3, 0, np.float32), (1, 0, np.float16), (3, 1, np.float32)])
def test_splines_are_nnunets(old_shape, new_shape, spacing, order, order_z, dtype):
    data = np.random.default_rng(0).normal(size=(2, *old_shape)).astype(dtype)
    kwargs = {"order": order, "order_z": order_z, "force_separate_z": None}
    how = {"function": "resample_data_or_seg_to_shape", "kwargs": kwargs, "force_separate_z": False}
    found = geometry.resample(data, new_shape, spacing, (1.0, 1.0, 1.0), how)
    expected = resample_data_or_seg_to_shape(data, new_shape, spacing, (1.0, 1.0, 1.0), is_seg=False, **kwargs)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 if dtype == np.float32 else 2e-3)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("force", [None, False])
def test_linear_resampling_is_nnunets(spacing, force):
    data = np.random.default_rng(0).normal(size=(2, 6, 9, 8)).astype(np.float32)
    how = {"function": "resample_torch_fornnunet", "kwargs": {"force_separate_z": force}, "force_separate_z": None}
    found = geometry.resample(data, (9, 7, 12), spacing, (1.0, 1.0, 1.0), how)
    expected = resample_torch_fornnunet(data, (9, 7, 12), spacing, (1.0, 1.0, 1.0), force_separate_z=force)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scheme", ["ZScoreNormalization", "CTNormalization", "NoNormalization",
                                    "RescaleTo01Normalization", "RGBTo01Normalization"])
def test_normalisation_is_nnunets(scheme, masked):
    image = np.random.default_rng(0).uniform(3, 250, (5, 6, 7)).astype(np.float32)
    mask = image > 40
    numbers = {"mean": 80.0, "std": 33.0, "percentile_00_5": 12.0, "percentile_99_5": 201.0}
    found = geometry.normalize(image.copy(), mask, {"scheme": scheme, "masked": masked, "intensities": numbers})
    expected = getattr(schemes, scheme)(masked, numbers).run(image.copy(), np.where(mask, 0, -1))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32


def rescaled(image):
    """What Dafne's client does on loading (contract, 2)."""
    if image.max() < 10:
        return image * 100
    while image.max() > 10000:
        image = image / 10
    return image


@pytest.mark.parametrize(("low", "high"), [(-1924, -124), (-900, 9), (-1024, 3071), (-1024, 10000), (-1000, 15000),
                                           (-1024, 30000), (-100, 99000), (-2000, 120000)])
def test_rescaled_hounsfield_units_are_restored(low, high):
    image = np.random.default_rng(0).integers(low, high, (12, 12, 12)).astype(np.float32)
    image[0, 0, 0], image[-1, -1, -1] = low, high
    np.testing.assert_array_equal(geometry.unscaled(rescaled(image).astype(np.float32)), image)


def test_other_images_are_left_alone():
    rng = np.random.default_rng(0)
    for image in (rng.normal(0, 300, (9, 9, 9)), rng.integers(0, 255, (9, 9, 9)), rng.uniform(-1000, 3000, (9, 9, 9))):
        image = image.astype(np.float32)
        assert geometry.unscaled(image) is image


def test_a_tilted_affine_of_single_precision_has_the_voxel_size_of_the_file():
    for size in (1.0, 0.5, 1.25, 0.48828125, 0.7):
        affine = affine_of("RAS", (size, 3 * size, size), degrees=(17, 33, -12)).astype(np.float32)
        assert np.allclose(geometry.voxel_size(affine, [0, 1, 2]), (size, 3 * size, size), rtol=3e-7, atol=0)
        if round(size, 2) == size:
            assert geometry.voxel_size(affine, [0, 2]) == [size, size]
    affine = affine_of("RAS", (0.7, 3.5, 3.5), degrees=(17, 33, -12)).astype(np.float32)
    assert geometry.separate_axis(geometry.voxel_size(affine, [2, 1, 0]), (1.0, 1.0, 1.0)) is None  # two are thick
