"""Masks as nnU-Net reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def segmentation_reader(plans: Mapping[str, Any]) -> Callable[[Path], tuple[np.ndarray, Sequence[float]]]:
    """Return file -> (mask, spacing in mm along its axes), with the reader that the plans name."""
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    reader = recursive_find_reader_writer_by_name(plans["image_reader_writer"])()

    def read(file: Path) -> tuple[np.ndarray, Sequence[float]]:
        mask, properties = reader.read_seg(str(file))
        return mask[0], [float(mm) for mm in properties["spacing"]]

    return read
