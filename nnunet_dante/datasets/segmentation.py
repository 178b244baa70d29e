"""Masks as nnU-Net reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError


def segmentation_reader(plans: Mapping[str, Any]) -> Callable[[Path], tuple[np.ndarray, Sequence[float]]]:
    """Return file -> (mask, spacing in mm along its axes), with the reader that the plans name.

    Raises:
        ConfigurationError: the plans name something else than a reader of nnU-Net.
    """
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    found = recursive_find_reader_writer_by_name(name := str(plans.get("image_reader_writer")))
    if not (isinstance(found, type) and issubclass(found, BaseReaderWriter)):  # it finds what its modules import, too
        raise ConfigurationError(f"image_reader_writer of the plans is {name!r:.80}, which is no reader of nnU-Net. "
                                 "Use the plans.json that nnU-Net wrote.")
    reader = found()

    def read(file: Path) -> tuple[np.ndarray, Sequence[float]]:
        mask, properties = reader.read_seg(str(file))
        return mask[0], [float(mm) for mm in properties["spacing"]]

    return read
