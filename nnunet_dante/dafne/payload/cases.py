"""Shipped: the images and masks that the client gives for learning, brought to the network's grid."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from .apply import contrasts
from .geometry import known_affine, preprocess, turn


def annotated(settings, data, outputs):
    """Return (channels, affine, {label: mask}) for every image with a mask of a label of this model.

    For volumes the client gives a dict of masks in place of a list, with one label only per volume. If an image comes
    several times, its masks are joined. A label that is empty in all images was not drawn: it is unknown, not absent.
    """
    names = {label["name"] for label in settings["labels"]}
    cases: dict = {}
    for number in range(len(data["image_list"])):
        try:
            channels, affine = given(settings, data, number)
            drawn = outputs.get(number, {}) if isinstance(outputs, dict) else outputs[number]
            masks = {k: mask_of(settings, v) for k, v in drawn.items() if k in names and v is not None}
        except (ValueError, IndexError, TypeError) as error:
            print(f"Image {number} was left out: {error}")
            continue
        digest = hashlib.sha256(affine.tobytes() + b"".join(c.tobytes() for c in channels)).digest()
        masks = {k: v for k, v in masks.items() if v.shape == channels[0].shape}
        cases.setdefault(digest, (channels, affine, {}))[2].update(masks)
    drawn = {k for _, _, masks in cases.values() for k, v in masks.items() if v.any()}
    known = [(channels, affine, {k: v for k, v in masks.items() if k in drawn})
             for channels, affine, masks in cases.values()]
    return [case for case in known if case[2]]


def mask_of(settings, mask):
    """Return a mask of the client as boolean (rows, cols, slices); see `given` for the axes of volumes."""
    mask = np.asarray(mask) != 0
    return np.moveaxis(mask, 0, -1) if settings["dimension"] == 3 else mask[..., None]


def given(settings, data, number):
    """Return channels and affine of one image as `apply` would get them.

    A volume comes as (slices, rows, cols) although `apply` gets (rows, cols, slices), with the whole volume's affine.
    """
    image = {k[:-len("_list")]: np.asarray(v[number]) for k, v in data.items()
             if k.startswith("image") and k.endswith("_list") and len(v) > number}
    if settings["dimension"] == 3:
        image = {k: np.moveaxis(v, 0, -1) for k, v in image.items()}
    affines = data.get("affine")
    place = {"resolution": data.get("resolution", ()), "affine": None if affines is None else affines[number]}
    return contrasts(settings, image), known_affine(settings, place)


def prepare(settings, channels, affine, masks):
    """Return tensors on the network's grid: image (channels, *grid) and masks (labels, *grid), -1 where unknown."""
    image, geometry = preprocess(settings, channels, affine)
    if image is None:
        return None
    grid = image.shape[1:]
    target = torch.full((len(settings["labels"]), *grid), -1, dtype=torch.int8)
    for row, label in enumerate(settings["labels"]):
        if label["name"] in masks:
            mask = masks[label["name"]].reshape(channels[0].shape)
            mask = torch.from_numpy(turn(mask, geometry)[geometry["crop"]]).float()
            target[row] = torch.nn.functional.interpolate(mask[None, None], grid, mode="trilinear")[0, 0] > 0.5
    return torch.from_numpy(image), target


def cut(case, patch, rng):
    """Cut a patch at a random place, or with `rng` None around the masks; outside the image is 0, and no target (-2).

    As in nnU-Net, a third of the random places lie on masks. More would hide what happens to labels that lie elsewhere.

    Returns (image (channels, *patch), target (labels, *patch)).
    """
    image, target = case
    drawn = torch.nonzero((target > 0).any(0))
    shape = image.shape[1:]
    if rng is None or (len(drawn) and rng.random() < 0.33):
        centre = drawn.float().mean(0).round().long() if rng is None else drawn[rng.integers(len(drawn))]
    else:
        centre = torch.tensor([int(rng.integers(n)) for n in shape])
    size = (1,) * (3 - len(patch)) + tuple(patch)
    starts = [int(min(max(int(c) - s // 2, 0), max(n - s, 0))) for c, s, n in zip(centre, size, shape)]
    place = (slice(None), *(slice(a, a + s) for a, s in zip(starts, size)))
    image, target = image[place], target[place]
    lacking = [s - n for s, n in zip(size, image.shape[1:])]
    pad = [side for n in reversed(lacking) for side in (n // 2, n - n // 2)]
    image = torch.nn.functional.pad(image, pad)
    target = torch.nn.functional.pad(target, pad, value=-2)
    return image.reshape(len(image), *patch), target.reshape(len(target), *patch)


def completed(target, logits, settings):
    """Return probabilities (batch, heads, *patch): the user's masks, and elsewhere what the old network predicts.

    In a softmax network, the labels that the user drew are impossible outside their masks (-1: not drawn); the others
    keep their proportions there. So a network that predicts a label as before has nothing to learn about it.
    """
    if settings["region_order"]:
        return torch.where(target >= 0, target, torch.sigmoid(logits))
    logits = logits.clone()
    logits[:, 1:][target >= 0] = -torch.inf
    drawn = target.clamp_min(0).float()
    count = drawn.sum(1, keepdim=True)
    masks = torch.cat((torch.zeros_like(count), drawn), 1) / count.clamp_min(1)
    return torch.where(count > 0, masks, torch.softmax(logits, 1))
