"""Names for the types that cross module borders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor  # the names alone must not import it

StateDict: TypeAlias = dict[str, "Tensor"]
"""A network's weights under their stock nnU-Net keys; several keys may hold the same tensor (aliases)."""

Plans: TypeAlias = dict[str, Any]
"""The content of an nnU-Net plans JSON."""

DatasetJson: TypeAlias = dict[str, Any]
"""The content of an nnU-Net dataset.json."""

ReadOnlyStateDict: TypeAlias = Mapping[str, "Tensor"]
PathLike: TypeAlias = str | Path
