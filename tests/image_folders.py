"""Folders of images and masks as people have them, written by the libraries that they use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import SimpleITK

SHAPE = (14, 12, 9)  # x, y, z


def volume(array: np.ndarray, *, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), codes: str = "LPS",
           turned_deg: float = 0.0) -> SimpleITK.Image:
    """An image with this array (x, y, z) whose axes lead where `codes` says, turned about z."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing[:array.ndim])
    image.SetOrigin(origin[:array.ndim])
    if array.ndim == 3:
        column = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
        axes = np.array([column[c] for c in codes], float).T
        a = np.deg2rad(turned_deg)
        turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        image.SetDirection((turn @ axes).ravel().tolist())
    return image


def case(seed: int = 0, *, shape=SHAPE, values=(1, 2), dtype=np.int16, **place) -> tuple[SimpleITK.Image, SimpleITK.Image]:
    """An image with noise and a box per value, and its mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint8)
    for n, value in enumerate(values):
        mask[tuple(slice(2 + 3 * n, 5 + 3 * n) if axis == 0 else slice(2, 6) for axis in range(len(shape)))] = value
    image = (100 * (mask > 0) + rng.integers(0, 40, shape)).astype(dtype)
    return volume(image, **place), volume(mask, **place)


def write(image: SimpleITK.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))
    return path


def only(mask: SimpleITK.Image, value: int) -> SimpleITK.Image:
    return SimpleITK.Cast(mask == value, SimpleITK.sitkUInt8)


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Path -> hash and date of each file below a folder, and the names of its folders."""
    return {str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder",
                                         p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def array(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
