"""`nnunet-dante federate join`: prepare a site's data for a federation, and check that they fit."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from .. import __version__
from ..datasets.dataset import Target, open_target
from ..datasets.fingerprint import INTENSITY
from ..errors import FederationError
from ..files import read_json, write_text_atomically
from ..models.checkpoint import file_sha256
from ..models.labels import channel_names
from ..training.launch import best_device
from ..transfers.match import match_names
from ..transfers.transfer import transfer
from ..transfers.union import NONE
from ..types import PathLike
from .settings import (
    MODEL,
    PLANS_NAME,
    SETTINGS,
    SITE_FILE,
    SITE_NAME,
    Facts,
    Settings,
    Site,
    misfit,
    other_channels,
    read_settings,
)
from .state import spelled


def join_federation(folder: PathLike, dataset: str | int, *, site: str, fold: str | None = None,
                    device: str | None = None, num_processes: int | None = None) -> Site:
    """Prepare a data set for a federation: complete its masks, preprocess it, and write what the rounds need.

    Labels of the federation that the data set lacks are completed by the start network (as `transfer` does with
    keep_labels), in a data set of their own.

    Args:
        folder: of the federation, as its founder sent it.
        dataset: number or name of the site's data set below nnUNet_raw.
        site: name of the site in the history. fold: whose validation cases give the Dice; default 0, or `all` for one
            case. device: cuda, mps or cpu; default: the best there is. num_processes: for preprocessing.

    Raises:
        FederationError: the data set does not fit; the message says why.
        TransferError, ConfigurationError, DonorError: as `transfer`.
    """
    folder = Path(folder).resolve()
    settings = read_settings(folder)
    if not SITE_NAME.fullmatch(site):
        raise FederationError(f"--site is {site!r}; give up to 64 letters, digits, _ and -.")
    target = open_target(dataset)
    channels = tuple(spelled(name, settings.channels) for name in channel_names(target.dataset_json))
    if (reason := other_channels(settings, channels)) is not None:
        raise FederationError(f"{target.name} does not fit this federation: {reason}.")
    missing, draws = _compare_labels(settings, target)
    report = transfer(folder / MODEL, target.name, plans_name=PLANS_NAME, keep_labels=missing,
                      overrides=settings.overrides, preprocess=True, num_processes=num_processes)
    prepared = open_target(report.dataset)
    plans = read_json(prepared.preprocessed / f"{PLANS_NAME}.json")
    fold = fold or report.fold
    federation = file_sha256(folder / SETTINGS)
    facts = Facts(
        site=site, federation=federation, draws=draws, cases=_training_cases(prepared, fold), version=__version__,
        labels=tuple(spelled(name, settings.labels) for name in prepared.dataset_json["labels"] if name != "ignore"),
        channels=channels, nnunetv2=version("nnunetv2"), torch=version("torch"),
        intensities=tuple((float(channel["mean"]), float(channel["std"]))
                          for channel in prepared.fingerprint()[INTENSITY].values()))
    if reason := misfit(settings, federation, plans, facts):
        raise FederationError(f"{prepared.name} does not fit this federation: {reason}.")
    joined = Site(folder=str(folder), dataset=prepared.name, fold=fold, facts=facts,
                  device=device or best_device())
    write_text_atomically(msgspec.json.format(msgspec.json.encode(joined), indent=2).decode(),
                          prepared.preprocessed / SITE_FILE)
    return joined


def _compare_labels(settings: Settings, target: Target) -> tuple[list[str], tuple[str, ...]]:
    """Return `keep_labels` of the transfer, and the labels that the site draws.

    Raises:
        FederationError: the data set has a label that the federation does not have, or lacks one that nobody knows.
    """
    own: list[Any] = [name for name in target.dataset_json["labels"] if name not in ("background", "ignore")]
    if unknown := [name for name, i in zip(own, match_names(own, settings.labels)) if i is None]:
        raise FederationError(f"{target.name} has the label {unknown[0]!r}, and the federation has "
                              f"{', '.join(settings.foreground)}. Give it the federation's name in dataset.json if it "
                              "is the same structure; otherwise the founder has to make the federation with it.")
    missing = [name for name, i in zip(settings.foreground, match_names(settings.foreground, own)) if i is None]
    if unknown := [name for name in missing if name not in settings.known]:
        raise FederationError(f"{target.name} lacks the label {unknown[0]}, and the donor does not know it, so it "
                              f'cannot complete your masks. Add {unknown[0]} to "labels" of your dataset.json with a '
                              'new number, and write into "annotated" which labels you have drawn in each case; then '
                              "it is left out of the loss.")
    everywhere = frozenset.intersection(*(target.undrawn.get(case, frozenset()) for case in target.own))
    new = [name for labels in target.undrawn.values() for name in labels
           if spelled(name, settings.labels) not in settings.known]
    if new and missing:
        raise FederationError(f"{target.name} lacks {missing[0]}, and {new[0]}, which the donor does not know, was not "
                              f'drawn in every case. Add {missing[0]} to "labels" and "annotated" of dataset.json as '
                              "well: then nothing is completed, and both are left out of the loss where nobody drew "
                              "them.")
    draws = sorted(spelled(name, settings.labels) for name in own if name not in everywhere)
    return missing or ([NONE] if new else []), tuple(draws)


def _training_cases(target: Target, fold: str) -> int:
    folds = target.folds()
    if fold != "all" and not (fold.isdecimal() and int(fold) < len(folds)):
        raise FederationError(f"--fold is {fold!r}; {target.name} has the folds 0 to {len(folds) - 1}, and `all`.")
    return len(target.own) if fold == "all" else len(folds[int(fold)]["train"])
