"""The "dante" block of a plans file: where a training starts, and the numbers and options it overrides.

"overrides" holds those that have a flag of their own in `nnunet-dante transfer`, "options" holds all others. There are
two entries because version 0.1.0 refuses overrides that it does not know, and ignores "options".
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
    """What the block says about one configuration. Unknown fields are kept, as a later version may have written them.

    Plans are copied into checkpoints and may come from somebody else. So the name of the file must not contain a
    folder: it must not lead out of the folder of the data set.
    """

    file: Annotated[str, msgspec.Meta(pattern=r"\A[^/\\]+\.pth\Z")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    donor: dict[str, Any] = {}
    label_map: dict[str, str | None] = {}  # name of a label in the data set -> its name in the donor, None if new
    channel_map: dict[str, str | None] = {}
    inverted_channels: list[str] = []
    mirroring_axes: list[Literal[0, 1, 2]] | None = None  # None: unknown
    geometry: Literal["donor", "target"] = "donor"  # whose spacing and patch size
    encoder_only: bool = False  # the donor had no decoder, so that the decoder in the file is random
    network_trainer: str = "nnUNetTrainer"


class DanteBlock(msgspec.Struct):
    """The whole block, as both this version and 0.1.0 write it."""

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
    """Return the block with these overrides in place of its own."""
    options = {name: value for name, value in overrides.items() if name not in OVERRIDES}
    block = {name: value for name, value in block.items() if name != "options"}
    return {**block, "overrides": {name: value for name, value in overrides.items() if name in OVERRIDES},
            **({"options": options} if options else {})}


def read_dante_block(plans: Plans) -> dict[str, Any]:
    """Return the "dante" block of plans after a check. Plans without one give empty "start_weights" and "overrides".

    The "overrides" that are returned include the options. Names that no method of this version knows are kept without
    a check: they may belong to a later version, or to the user's own method.

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
