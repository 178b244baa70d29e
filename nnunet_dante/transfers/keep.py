"""Which labels a transfer keeps although nobody drew them: what the options and "annotated" of dataset.json ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..datasets.dataset import Target
from ..errors import ConfigurationError, DonorError, TransferError
from ..models.archive import find_models, is_archive
from ..models.donor import Donor, open_donor
from ..models.installed import find_donor
from ..types import PathLike
from .complete import Completion, complete, readable_channels
from .union import ALL, NONE, join_labels


def completed_target(donor: Donor, target: Target, *, keep: Sequence[str], rename: Mapping[str, str], into: str | None,
                     rehearse: PathLike | None, share: float, invert: Sequence[str],
                     folds: Callable[[], Sequence[Donor]],
                     ) -> tuple[Donor, Target, Completion | None, tuple[str, ...]]:
    """Return the donor under the names of the data set, the data set to train on, how it was completed, and notes.

    keep, rename, into, rehearse, share, invert: as in `transfer`. folds: returns the donor in all folds that predict.

    Raises:
        ConfigurationError, TransferError: as `complete` and `rename_labels`, or the options do not go together.
    """
    donor, notes = rename_labels(donor, rename), list[str]()
    wanted = bool(keep) and list(keep) != [NONE]
    if not keep and target.undrawn:
        try:
            readable_channels(donor, target)
            join_labels(target.dataset_json, donor.dataset_json, cases=target.own, undrawn=target.undrawn, keep=())
            wanted = True
        except TransferError as error:
            notes.append(f"the donor cannot complete labels that were not drawn. {error}")
    if wanted and invert:
        raise ConfigurationError(f"--invert {invert[0]} and --keep-labels do not go together: to complete your masks, "
                                 "the donor has to read your images as they are. Invert the images instead.")
    for name, value in {"into": into, "rehearse": rehearse}.items():
        if value is not None and not wanted:
            raise ConfigurationError(f"--{name} {value} is about a completed data set, but nothing is completed; add "
                                     f"--keep-labels {ALL}, or leave it out.")
    completion = None
    if wanted:
        readable_channels(donor, target)  # before the other folds are read
        target, completion = complete([rename_labels(one, rename) for one in folds()], target, keep=keep, into=into,
                                      rehearse=rehearse, share=share)
        notes += completion.implausible
    if target.undrawn:
        notes.append(f"in {len(target.undrawn)} of {len(target.cases)} cases not every label was drawn: the trainers "
                     "of this package leave these labels out of loss and scores there; others take them as background")
    return donor, target, completion, tuple(notes)


def open_folds(source: PathLike, donor: Donor) -> list[Donor]:
    """Return `donor` in each of its folds, as nnU-Net predicts with them: all numbered ones, else the donor alone.

    Raises:
        DonorError, UntrustedFileError: as `open_donor`; or a fold has other plans or labels.
    """
    path = find_donor(source)
    if path.is_file() and not is_archive(path):
        return [donor]
    models = find_models(path)
    own = [model for model in models if model.name.split("__")[-1] == donor.configuration] or models
    names = [file.parent.name.removeprefix("fold_") for model in own[:1] for file in model.weights
             if file.name == donor.checkpoint_name]
    found = [donor if name == donor.fold else open_donor(
        source, configuration=donor.configuration, fold=name, checkpoint=donor.checkpoint_name, trust=donor.trust)
             for name in names if name.isdecimal()]
    if odd := [fold.fold for fold in found if (fold.plans, fold.dataset_json) != (donor.plans, donor.dataset_json)]:
        raise DonorError(f"Fold {odd[0]} of {donor.source} has other plans or labels than fold {donor.fold}, so they "
                         "cannot predict together. Choose one with --fold.")
    return found or [donor]


def rename_labels(donor: Donor, names: Mapping[str, str]) -> Donor:
    """Return the donor with other names of labels, old -> new, so that they match those of a data set.

    Raises:
        ConfigurationError: the donor has no label of an old name, or already one of a new name.
    """
    if not names:
        return donor
    labels = dict(donor.dataset_json["labels"])
    for old, new in names.items():
        if old not in labels or old in ("background", "ignore"):
            raise ConfigurationError(f"--rename {old}={new}: the donor has no such label; it has "
                                     f"{', '.join(name for name in labels if name not in ('background', 'ignore'))}.")
        if new in labels and new not in names:
            raise ConfigurationError(f"--rename {old}={new}: the donor already has a label {new!r}, and two labels "
                                     "cannot have one name. Choose another, or rename that one too.")
    if len({names.get(name, name) for name in labels}) < len(labels):
        raise ConfigurationError(f"--rename gives two labels of the donor one name, among {', '.join(names.values())}.")
    renamed = {names.get(name, name): value for name, value in labels.items()}
    return replace(donor, dataset_json={**donor.dataset_json, "labels": renamed})
