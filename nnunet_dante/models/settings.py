"""The "dante" block of a plans file: where a training starts, and the numbers and options it overrides.

Overrides with a flag of `nnunet-dante transfer` stand under "overrides", all others under "options". They stand apart
because version 0.1.0 refuses overrides that it does not know; it reads these plans without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from .. import __version__
from ..errors import ConfigurationError
from ..types import Plans
from .overrides import OVERRIDES, checked_overrides, known_overrides

FORMAT = 1


class StartWeights(msgspec.Struct):
    """What the block says of one configuration. Unknown fields pass: they may belong to a later version.

    Plans travel inside checkpoints, so the name of a file from elsewhere must not lead out of the data set's folder.
    """

    file: Annotated[str, msgspec.Meta(pattern=r"\A[^/\\]+\.pth\Z")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    donor: dict[str, Any] = {}
    label_map: dict[str, str | None] = {}  # the data set's name -> the donor's, None for a new one
    channel_map: dict[str, str | None] = {}
    inverted_channels: list[str] = []
    mirroring_axes: list[Literal[0, 1, 2]] | None = None  # None: unknown
    geometry: Literal["donor", "target"] = "donor"  # whose spacing and patch size
    encoder_only: bool = False  # the donor had no decoder, so that the decoder in the file is random
    network_trainer: str = "nnUNetTrainer"


class DanteBlock(msgspec.Struct):
    """The whole block, as this version and 0.1.0 write it."""

    format: Literal[1]
    version: str = ""
    start_weights: dict[str, StartWeights] = {}
    overrides: dict[str, Any] = {}
    options: dict[str, Any] = {}


def new_dante_block(configuration: str, entry: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the block for one configuration's start weights."""
    return with_overrides({"format": FORMAT, "version": __version__, "start_weights": {configuration: dict(entry)}},
                          checked_overrides(overrides))


def with_overrides(block: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the block with exactly these overrides."""
    options = {name: value for name, value in overrides.items() if name not in OVERRIDES}
    block = {name: value for name, value in block.items() if name != "options"}
    return {**block, "overrides": {name: value for name, value in overrides.items() if name in OVERRIDES},
            **({"options": options} if options else {})}


def read_dante_block(plans: Plans) -> dict[str, Any]:
    """Return the plans' "dante" block, validated; without one, empty "start_weights" and "overrides".

    Its "overrides" hold the options, too. Names that no method of this version has are kept, unchecked: they may belong
    to a later version, or to a method of the user's own.

    Raises:
        ConfigurationError: the block is damaged or of a newer format.
    """
    block = plans.get("dante")
    if block is None:
        return {"format": FORMAT, "version": __version__, "start_weights": {}, "overrides": {}}
    if not isinstance(block, dict) or block.get("format") != FORMAT:
        found = block.get("format") if isinstance(block, dict) else block
        raise ConfigurationError(f'The "dante" block of plans {plans.get("plans_name")!r} has format {found!r}; this '
                                 f"version ({__version__}) reads format {FORMAT}. Install a newer nnunet-dante, or run "
                                 "`nnunet-dante transfer` again.")
    try:
        msgspec.convert(block, DanteBlock)
    except msgspec.ValidationError as error:
        raise ConfigurationError(
            f'The "dante" block of plans {plans.get("plans_name")!r} is damaged: {error}. It needs a .pth file name '
            "without folders, a sha256 of 64 hex digits, and mirroring axes among 0, 1 and 2. Run `nnunet-dante "
            "transfer` again, into plans of another name (-p).") from error
    overrides = {**block.get("options", {}), **block.get("overrides", {})}
    unknown = {name: value for name, value in overrides.items() if name not in known_overrides()}
    known = checked_overrides({name: value for name, value in overrides.items() if name not in unknown})
    kept = {name: value for name, value in block.items() if name != "options"}
    return {"start_weights": {}, **kept, "overrides": known | unknown}
