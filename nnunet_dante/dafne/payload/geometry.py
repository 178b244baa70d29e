"""Shipped: from a volume as Dafne shows it to the network's grid, and back. nnU-Net's preprocessing, in its order.

Dafne's arrays are (rows, cols) or (rows, cols, slices), with a RAS+ affine in that order of axes.
nnU-Net's are (slices, rows, cols) of the file as its training data were stored: `orientation`, such as "RAS".
"""

from __future__ import annotations

import itertools

import numpy as np

WORLD = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
SHOWN = {0: "IAL", 1: "ILP", 2: "PLS"}  # where rows, cols, slices lead on Dafne's screen, by the world axis of slices


def network_axes(settings):
    """Where the network's three axes lead, such as ("S", "A", "R"): file axes reversed, then nnU-Net's transpose."""
    reverse = settings["orientation"][::-1]
    return [reverse[t] for t in settings["transpose"]]


def shown_affine(settings, resolution):
    """Affine of an image of which only the plane is known: its axes lead as Dafne shows that plane."""
    slice_axis = WORLD[network_axes(settings)[0]][0] if settings["dimension"] == 2 else 2
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (code, size) in enumerate(zip(SHOWN[slice_axis], resolution)):
        world, sign = WORLD[code]
        affine[world, axis] = sign * size
    return affine


def known_affine(settings, data):
    """Return the (4, 4) affine of the volume or slice in `data`; refuse if it is unknown.

    A network that is shown a mirrored image takes left for right, and nobody would see it in the masks.

    For files without an affine Dafne makes one from the voxel size. So a diagonal affine without origin does not say
    where left and head are.
    """
    resolution = [abs(float(r)) for r in np.ravel(data.get("resolution", ()))]
    if settings["dimension"] == 2:
        if len(resolution) < 2 or not min(resolution[:2]) > 0:
            raise ValueError(f"The slice does not say how large its pixels are (resolution {resolution}), in mm along "
                             "rows and columns. Load an image file that does.")
        return shown_affine(settings, [*resolution[:2], 100.0])  # thick slices: resampled one by one
    affine = data.get("affine")
    affine = None if affine is None else np.asarray(affine, dtype=float)
    if settings["as_shown"]:
        if affine is not None:
            resolution = np.linalg.norm(affine[:3, :3], axis=0)
        if len(resolution) == 3:
            return shown_affine(settings, resolution)
    elif affine is not None and affine.shape == (4, 4) and np.all(np.isfinite(affine)):
        matrix = affine[:3, :3]
        bare = np.allclose(matrix, np.diag(np.abs(np.diag(matrix)))) and not np.any(affine[:3, 3])
        if not bare and abs(np.linalg.det(matrix)) > 1e-9:
            return affine
    given = None if affine is None else affine.tolist()
    raise ValueError(f"The image does not say how it lies in the patient (affine {given}, resolution {resolution}), "
                     "and this model would confuse left and right, or head and feet. Load the original NIfTI or "
                     "DICOM files instead of an array without orientation.")


def voxel_size(affine, axes):
    """Return the lengths of the affine's columns in mm. Rounding errors of a rotation are removed: 0.5 stays 0.5."""
    sizes = [float(np.linalg.norm(affine[:3, axis])) for axis in axes]
    return [round(s, 6) if abs(round(s, 6) - s) < 5e-7 * s else s for s in sizes]


def placement(settings, affine):
    """Return (axes, flips): the image's axis behind each of the network's, and which of them run backwards."""
    matrix = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    world_of = max(itertools.permutations(range(3)), key=lambda p: sum(abs(matrix[w, a]) for a, w in enumerate(p)))
    axes, flips = [], []
    for network_axis, code in enumerate(network_axes(settings)):
        world, sign = WORLD[code]
        axes.append(world_of.index(world))
        if matrix[world, axes[-1]] * sign < 0:
            flips.append(network_axis)
    return axes, flips


def turn(array, geometry):
    """Bring (rows, cols, slices) into the network's axes."""
    return np.ascontiguousarray(np.flip(array.transpose(geometry["axes"]), geometry["flips"]))


def turn_back(array, geometry):
    """Undo `turn`."""
    return np.flip(array, geometry["flips"]).transpose(np.argsort(geometry["axes"]))


def separate_axis(spacing, new_spacing, *, force=None, threshold=3):
    """Return the axis with thick slices, which is resampled by itself, or None."""
    if force is False:
        return None
    for candidate in (spacing, new_spacing):
        thick = np.flatnonzero(np.isclose(candidate, np.max(candidate), rtol=1e-6, atol=0))
        if force or np.max(candidate) / np.min(candidate) > threshold:
            return int(thick[0]) if len(thick) == 1 else None
    return None


def resample(array, shape, spacing, new_spacing, how):
    """Bring (channels, *old shape) to (channels, *shape) with the resampling function that the plans name."""
    if tuple(array.shape[1:]) == tuple(shape) or how["function"] == "no_resampling_hack":
        return array
    options = how["kwargs"]
    axis = separate_axis(spacing, new_spacing, force=options.get("force_separate_z", how["force_separate_z"]),
                         threshold=options.get("separate_z_anisotropy_threshold", 3))
    if how["function"] == "resample_torch_fornnunet":
        return resample_linear(array, shape, axis, options)
    return resample_spline(array, shape, axis, options.get("order", 3), options.get("order_z", 0))


def resample_spline(array, shape, axis, order, order_z):
    """Splines of `order`; along a separate `axis` of `order_z`. The type of the numbers stays (half for logits)."""
    from scipy.ndimage import map_coordinates
    from skimage.transform import resize

    result = np.zeros((len(array), *shape), array.dtype)
    for old, new in zip(array, result):
        old = old.astype(float, copy=False)
        if axis is None:
            new[...] = resize(old, shape, order, mode="edge", anti_aliasing=False)
            continue
        plane = [n for i, n in enumerate(shape) if i != axis]
        slices = np.stack([resize(s, plane, order, mode="edge", anti_aliasing=False)
                           for s in np.moveaxis(old, axis, 0)], axis)
        along = (np.arange(shape[axis]) + 0.5) * (old.shape[axis] / shape[axis]) - 0.5
        if order_z == 0:
            nearest = np.clip(np.floor(along + 0.5).astype(int), 0, old.shape[axis] - 1)
            new[...] = np.take(slices, nearest, axis)
        else:
            grid = np.meshgrid(*(along if i == axis else np.arange(n) for i, n in enumerate(shape)), indexing="ij")
            new[...] = map_coordinates(slices, grid, order=order_z, mode="nearest")
    return result


def resample_linear(array, shape, axis, options):
    """Linear in three dimensions; with a separate `axis` linear in its planes and then nearest along it."""
    import torch

    interpolate, x = torch.nn.functional.interpolate, torch.from_numpy(array).float()
    if axis is None:
        return interpolate(x[None], tuple(shape), mode="trilinear")[0].numpy()
    mode = options.get("mode", "linear")
    planes = x.movedim(axis + 1, 1)
    plane = [n for i, n in enumerate(shape) if i != axis]
    planes = interpolate(planes.flatten(0, 1)[None], plane, mode="bilinear" if mode == "linear" else mode)[0]
    x = planes.unflatten(0, (len(array), -1)).movedim(1, axis + 1)
    return interpolate(x[None], tuple(shape), mode=options.get("aniso_axis_mode", "nearest-exact"))[0].numpy()


def unscaled(image):
    """Undo how Dafne rescales intensities on loading, where the image without it has whole numbers only.

    Dafne multiplies by 100 where the maximum is below 10, and divides by 10 while it is above 10000. This does
    not matter to z-scores, but a CT would get other Hounsfield units.
    """
    if image.max() < 1000 and image.min() < 0 and not np.any(np.fmod(image, 100)):
        return image / 100
    if not 1000 < image.max() <= 10000 or not np.any(np.abs(image - np.rint(image)) > 0.005):
        return image
    for factor in (10.0, 100.0):
        scaled = image.astype(float) * factor
        if np.all(np.abs(scaled - np.rint(scaled)) < 6e-4 * factor):  # float32 is that coarse at 10000
            return np.rint(scaled).astype(image.dtype)
    return image


def normalize(image, mask, how):
    """Normalise one cropped channel (float32) as the plans say; `mask` is where any channel is not zero."""
    scheme, numbers = how["scheme"], how["intensities"]
    if scheme == "ZScoreNormalization":
        if how["masked"]:
            inside = image[mask]
            image[mask] = (inside - inside.mean()) / max(inside.std(), 1e-8)
            return image
        return (image - image.mean()) / max(image.std(), 1e-8)
    if scheme == "RescaleTo01Normalization":
        image = image - image.min()
        return image / max(image.max(), 1e-8)
    image = unscaled(image)
    if scheme == "CTNormalization":
        clipped = np.clip(image, numbers["percentile_00_5"], numbers["percentile_99_5"])
        return (clipped - numbers["mean"]) / max(numbers["std"], 1e-8)
    return image / 255 if scheme == "RGBTo01Normalization" else image


def preprocess(settings, channels, affine):
    """Turn, crop, normalise, resample.

    Args:
        channels: list of (rows, cols, slices) arrays. affine: (4, 4), array indices to mm in RAS+.

    Returns:
        (image (channels, *network grid) float32, geometry); image is None where there is nothing but zeros.
    """
    from scipy.ndimage import binary_fill_holes

    axes, flips = placement(settings, affine)
    geometry = {"axes": axes, "flips": flips}
    image = np.stack([turn(np.nan_to_num(np.asarray(c, np.float32)), geometry) for c in channels])
    geometry["shape"] = image.shape[1:]
    inside = np.any(image != 0, axis=0)
    if not inside.any():
        return None, geometry
    inside = binary_fill_holes(inside)
    found = [np.flatnonzero(inside.any(axis=tuple(o for o in range(3) if o != a))) for a in range(3)]
    geometry["crop"] = tuple(slice(int(f[0]), int(f[-1]) + 1) for f in found)
    image, inside = image[(slice(None), *geometry["crop"])], inside[geometry["crop"]]
    spacing = voxel_size(affine, axes)
    target = [*spacing[:3 - len(settings["spacing_mm"])], *settings["spacing_mm"]]
    shape = [max(1, round(old / new * n)) for n, old, new in zip(image.shape[1:], spacing, target)]
    geometry |= {"cropped_shape": image.shape[1:], "spacing": spacing, "network_spacing": target}
    image = np.stack([normalize(c, inside, how) for c, how in zip(image.copy(), settings["normalization"])])
    return resample(image.astype(np.float32, copy=False), shape, spacing, target, settings["resample_data"]), geometry
