"""What all sites of a federation share: its settings, where its files lie, and which site fits.

    FOLDER/pyproject.toml         the Flower app: settings of the server
    FOLDER/federation.json        settings of the training, the same at every site
    FOLDER/model/                 the start network, as nnU-Net's model folder
    FOLDER/start.safetensors      what is trained, before the first round: an adapter file
    FOLDER/run/                   at the server: the state after each round, and the history
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .. import __version__
from ..datasets.fingerprint import INTENSITY
from ..errors import FederationError
from ..files import read_json
from ..models.checkpoint import file_sha256
from ..types import PathLike

SETTINGS, MODEL, START, RUN = "federation.json", "model", "start.safetensors", "run"
SITE_FILE = "federation_site.json"  # in the folder of a site's data set in nnUNet_preprocessed
CHECKPOINT = Path(MODEL, "fold_all", "checkpoint_final.pth")
PLANS_NAME = "nnUNetFederationPlans"
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FAR = 3.0  # standard deviations of the donor's images
_Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]


class Settings(msgspec.Struct, kw_only=True):
    """The settings of a federation's training.

    method: name of the method; its trainer is nnUNetTrainer + method. averaging: as in `aggregate`. local: what stays
    at each site and is never sent. rounds: of the whole training. epochs: that a site trains in each round. prox:
    strength of the pull to the weights at the start of the round (FedProx, Li 2020, arXiv 1812.06127). labels: rows of
    the head. known: those that the donor knows. heads: head tensor -> dimension of its rows. kept: names of the
    tensors that stay local. sha256: of the start network and of start.safetensors.
    """

    format: Literal[1] = 1
    version: str = __version__
    name: str
    configuration: str
    method: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9]+\Z")]
    averaging: Literal["alternating", "frozen"] = "alternating"
    local: tuple[Literal["norms", "heads"], ...] = ()
    rounds: _Count
    epochs: _Count
    prox: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    overrides: dict[str, Any] = {}
    labels: tuple[str, ...]
    known: tuple[str, ...]
    channels: tuple[str, ...]
    heads: dict[str, Literal[0, 1]]
    kept: tuple[str, ...] = ()
    model_sha256: str
    start_sha256: str

    @property
    def trainer(self) -> str:
        """The name of the trainer class."""
        return f"nnUNetTrainer{self.method}"

    @property
    def foreground(self) -> tuple[str, ...]:
        """The labels without background."""
        return tuple(label for label in self.labels if label != "background")


class Facts(msgspec.Struct, kw_only=True):
    """What a site says of itself before anyone trains.

    federation: SHA-256 of its federation.json. labels: of its data set. draws: those of which it has masks of its own.
    cases: number of training cases. intensities: (mean, standard deviation) of each channel's foreground.
    """

    site: str
    federation: str
    labels: tuple[str, ...]
    draws: tuple[str, ...]
    channels: tuple[str, ...]
    cases: int
    version: str
    nnunetv2: str
    torch: str
    intensities: tuple[tuple[float, float], ...]


class Site(msgspec.Struct, kw_only=True):
    """What `nnunet-dante federate join` writes beside a site's preprocessed data.

    folder: of the federation. fold: of the training. facts: as the server gets them.
    """

    folder: str
    dataset: str
    fold: str
    device: str
    facts: Facts


def read_settings(folder: PathLike, *, files: bool = True) -> Settings:
    """Return the settings of the federation in a folder.

    files: also check that start network and start.safetensors are those for which the settings were written.

    Raises:
        FederationError: a file is missing, damaged, of a newer format, or not the one that the settings name.
    """
    folder = Path(folder)
    try:
        settings = msgspec.convert(read_json(folder / SETTINGS), Settings)
    except (OSError, ValueError) as error:  # a ValidationError is a ValueError
        raise FederationError(f"{folder / SETTINGS} cannot be used ({error}). Give the folder that `nnunet-dante "
                              "federate new` wrote, as the founder of the federation sent it.") from error
    for name, wanted in ((CHECKPOINT, settings.model_sha256), (START, settings.start_sha256)) if files else ():
        if not (file := folder / name).is_file() or file_sha256(file) != wanted:
            raise FederationError(f"{file} is missing or not the file of this federation (its sha256 must begin with "
                                  f"{wanted[:12]}). Copy the folder again, whole.")
    return settings


def read_site(preprocessed: Path) -> Site:
    """Return what `join` wrote into the folder of a data set in nnUNet_preprocessed.

    Raises:
        FederationError: the data set has not joined a federation.
    """
    try:
        return msgspec.convert(read_json(preprocessed / SITE_FILE), Site)
    except (OSError, ValueError) as error:
        raise FederationError(f"{preprocessed.name} has not joined a federation ({error}). Run nnunet-dante federate "
                              f"join FOLDER -d {preprocessed.name} --site NAME.") from error


def misfit(settings: Settings, digest: str, plans: Mapping[str, Any], facts: Facts) -> str | None:
    """Return why a site cannot take part, or None if it can.

    digest: SHA-256 of the server's federation.json. plans: the federation's.
    """
    if not SITE_NAME.fullmatch(facts.site):
        return f"its name is {facts.site!r:.80}; letters, digits, _ and - are allowed"
    if facts.federation != digest:
        return ("it has joined another federation, or another version of this one: federation.json has sha256 "
                f"{facts.federation[:12]}, here {digest[:12]}. Send it this folder, and let it join again")
    if _minor(facts.version) != _minor(__version__):
        return f"it has nnunet-dante {facts.version}, the server {__version__}; install one version everywhere"
    if sorted(settings.labels) != sorted(facts.labels):
        return (f"its data set has the labels {', '.join(facts.labels)}; the federation has "
                f"{', '.join(settings.labels)}")
    if (reason := other_channels(settings, facts.channels)) is not None:
        return reason
    if unknown := set(facts.draws) - set(settings.foreground):
        return f"it draws {min(unknown)}, which is no label of the federation"
    if not facts.draws or facts.cases < 1:
        return f"it has {facts.cases} training cases and draws {', '.join(facts.draws) or 'no label'}"
    return _other_units(settings, plans, facts)


def other_channels(settings: Settings, channels: tuple[str, ...]) -> str | None:
    """Return what is wrong with the channels of a site, or None; the stem's kernels are in the federation's order."""
    if channels == settings.channels:
        return None
    return (f"its data set has the channels {', '.join(channels)}; the federation has {', '.join(settings.channels)}, "
            "in this order")


def _other_units(settings: Settings, plans: Mapping[str, Any], facts: Facts) -> str | None:
    """Return what is wrong with channels that are not normalised by each image itself, such as CT in HU."""
    schemes = plans["configurations"][settings.configuration].get("normalization_schemes", [])
    for i, (channel, scheme, found) in enumerate(zip(settings.channels, schemes, facts.intensities)):
        wanted = plans[INTENSITY].get(str(i), {})
        if scheme == "CTNormalization" and abs(found[0] - wanted["mean"]) > _FAR * wanted["std"]:
            return (f"the mean of its channel {channel} inside the labels is {found[0]:.4g}, and {wanted['mean']:.4g} "
                    f"(standard deviation {wanted['std']:.4g}) in the donor's images. Are the images in another unit?")
    return None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
