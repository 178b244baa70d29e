"""Shipped: segment one image or volume in Dafne, with nnU-Net's sliding window and label decision."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import torch

from .geometry import known_affine, preprocess, resample, turn_back


def contrasts(settings, data):
    """Return the channels as (rows, cols, slices) arrays; Dafne sends the displayed contrast first, without names."""
    image, wanted = np.asarray(data["image"]), settings["channels"]
    if image.ndim != settings["dimension"]:
        message = f"This model segments {settings['dimension']}D images; it was given the shape {image.shape}."
        try:
            from dafne_dl.interfaces import WrongDimensionalityError
        except ImportError:
            raise ValueError(message) from None
        raise WrongDimensionalityError(message)
    others = [np.asarray(data[k]) for k in ("image1", *(f"image{i}" for i in range(2, len(wanted) + 2)))
              if data.get(k) is not None]
    found = [image, *others]
    if len(found) != len(wanted) or any(c.shape != image.shape for c in found):
        raise ValueError(f"This model needs {len(wanted)} contrasts of one shape, in the order {', '.join(wanted)}; it "
                         f"was given {len(found)} of the shapes {[c.shape for c in found]}. Load them in this order "
                         "and show the first one when you segment.")
    return [c[..., None] if c.ndim == 2 else c for c in found]


def gaussian(patch):
    """Weight of a patch's voxels: a Gaussian of sigma = size / 8 with maximum 10, nowhere 0."""
    from scipy.ndimage import gaussian_filter

    point = np.zeros(patch)
    point[tuple(n // 2 for n in patch)] = 1
    smooth = gaussian_filter(point, [n / 8 for n in patch], 0, mode="constant", cval=0)
    weight = torch.from_numpy(smooth / (smooth.max() / 10)).half()
    return torch.where(weight == 0, weight[weight != 0].min(), weight)


def window_starts(size, patch, step):
    """Evenly spaced starts of windows of `patch` voxels, at most `step` * patch apart, that cover `size` voxels."""
    count = int(np.ceil((size - patch) / (patch * step))) + 1
    return [int(np.round((size - patch) / max(count - 1, 1) * i)) for i in range(count)]


def windows(shape, patch, step):
    """Yield the index of each window into (channels, *shape); a 2D patch covers one slice at a time."""
    starts = [window_starts(n, p, step) for n, p in zip(shape[-len(patch):], patch)]
    for corner in itertools.product(*(range(n) for n in shape[:-len(patch)]), *starts):
        spatial = corner[-len(patch):]
        yield (slice(None), *corner[:-len(patch)], *(slice(s, s + p) for s, p in zip(spatial, patch)))


def mirrored_mean(network, x, axes):
    """Mean of the logits over all mirrorings of x (batch, channels, *space) along `axes`."""
    total = network(x)
    combinations = [c for n in range(len(axes)) for c in itertools.combinations([a + 2 for a in axes], n + 1)]
    for dims in combinations:
        total += torch.flip(network(torch.flip(x, dims)), dims)
    return total / (len(combinations) + 1) if combinations else total


def logits_of(network, image, settings, storage):
    """Gaussian-weighted mean of the windows' logits, half precision: (heads, *image shape), kept on `storage`."""
    device, patch = next(network.parameters()).device, settings["patch"]
    lacking = [max(p - n, 0) for p, n in zip(patch, image.shape[-len(patch):])]
    padding = [(n // 2, n - n // 2) for n in lacking]
    image = torch.nn.functional.pad(image, [side for pair in reversed(padding) for side in pair]).to(storage)
    weight = gaussian(patch).to(storage)
    total = torch.zeros((settings["architecture"]["heads"], *image.shape[1:]), dtype=torch.half, device=storage)
    weights = torch.zeros(image.shape[1:], dtype=torch.half, device=storage)
    with torch.inference_mode(), torch.autocast(device.type, enabled=device.type == "cuda"):
        for place in windows(image.shape[1:], patch, settings["tile_step"]):
            x = image[place][None].contiguous().to(device)
            total[place] += mirrored_mean(network, x, settings["mirroring"])[0].to(storage) * weight
            weights[place[1:]] += weight
    total /= weights
    if torch.isinf(total).any():
        raise ValueError("The network's output overflows; the model file may be damaged. Get it again.")
    for axis, ((below, above), size) in enumerate(zip(padding, total.shape[-len(patch):]), total.ndim - len(patch)):
        total = total.narrow(axis, below, size - below - above)
    return total


def predict(network, image, settings):
    """Return the logits as numpy. If the GPU lacks memory, the image stays on the CPU; then the network, too."""
    device, cpu = next(network.parameters()).device, torch.device("cpu")
    for storage in dict.fromkeys((device, cpu)):
        try:
            return logits_of(network, image, settings, storage).to(cpu).numpy()
        except RuntimeError as error:
            if device == cpu or "out of memory" not in str(error).lower():
                raise
        torch.cuda.empty_cache()
    try:
        return logits_of(network.to(cpu), image, settings, cpu).numpy()
    finally:
        network.to(device)


def label_map(logits, settings):
    """Return each voxel's label: that of the largest logit; of regions, the last one of a probability above 0.5."""
    if not settings["region_order"]:
        return logits.argmax(0).astype(np.uint8 if len(logits) < 256 else np.uint16)
    labels = np.zeros(logits.shape[1:], np.uint8 if max(settings["region_order"]) < 256 else np.uint16)
    for row, value in zip(torch.sigmoid(torch.from_numpy(logits).float()).numpy(), settings["region_order"]):
        labels[row > 0.5] = value
    return labels


def segment_image(network, channels, affine):
    """Return the label map (rows, cols, slices) of the channels."""
    settings = network.settings
    image, geometry = preprocess(settings, channels, affine)
    labels = np.zeros(geometry["shape"], np.uint8)
    if image is not None:
        logits = predict(network, torch.from_numpy(image), settings)
        logits = resample(logits, geometry["cropped_shape"], geometry["network_spacing"], geometry["spacing"],
                          settings["resample_logits"])
        found = label_map(logits, settings)
        labels = labels.astype(found.dtype)
        labels[geometry["crop"]] = found
    return turn_back(labels, geometry)


def apply(model, data):
    """Return {label: uint8 mask of 0 and 1, shaped as data["image"]}, every label every time.

    Dafne asks once per label for the same volume, so the last answer is remembered until the image or a weight changes.

    Raises:
        ValueError: contrasts or orientation are missing.
        WrongDimensionalityError: a slice was given to a 3D model, or a volume to a 2D model.
    """
    network = model.model
    channels = contrasts(network.settings, data)
    affine = known_affine(network.settings, data)
    digest = hashlib.sha256(affine.tobytes())
    for channel in channels:
        digest.update(f"{channel.shape}{channel.dtype}".encode() + channel.tobytes())
    key = (digest.digest(), *((p.data_ptr(), p._version) for p in network.parameters()))
    if getattr(network, "remembered", (None,))[0] != key:
        network.remembered = (key, segment_image(network, channels, affine))
    labels = network.remembered[1].reshape(np.shape(data["image"]))
    return {label["name"]: np.isin(labels, label["values"]).astype(np.uint8) for label in network.settings["labels"]}
