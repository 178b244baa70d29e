"""What each label of a donor lost or gained in a network that learned it from masks which the donor completed.

Two questions with two answers. Is the label better or worse than the donor's? That needs a mask from a person: the
label was drawn in the case, or its completed mask was corrected. How far is it from the donor's? That can be said of
every case, but where the mask is the donor's own prediction, it is all that can be said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.annotated import read_completed
from ..errors import ResultError
from .metrics import dice
from .results import CaseScores
from .study import Shots, Study, case_means, mean_over_cases
from .tables import MISSING, Table, Value, mean_text

_NOTES = (
    "Lost or gained: Dice now minus Dice of the donor, on unseen cases in which a person drew the label or corrected "
    "its completed mask; in brackets, the 95 % bootstrap interval over these cases. A corrected mask began as the "
    "donor's, which favours the donor a little. \"not known\": the masks of this label are the donor's own "
    "predictions, so no number says whether it became better or worse.",
    "Agreement: Dice between the network and the donor, on all unseen cases. It says how much a label changed, and "
    "not whether it became better. Lost and gained voxels: those that only the donor, or only the network, gives the "
    "label, as a share of the donor's. Voxels in which you drew another label are left out of these three.")


def label_changes(truth: np.ndarray, network: np.ndarray, donor: np.ndarray, *, labels: Mapping[str, int],
                  donor_values: Mapping[str, int], completed: Collection[str]) -> dict[str, dict[str, float]]:
    """Return what one case says about each label of the donor.

    Args:
        truth, network: integer masks of the data set and of the network's prediction, of one shape.
        donor: the donor's own prediction, in its own numbers.
        labels: name -> value in `truth` and `network`. donor_values: name -> value in `donor`.
        completed: the labels that the donor completed in this case; all others were drawn.

    Returns:
        Label -> "donor" and "network": Dice against the mask of a person, nan where there is none; "agreement": Dice
        between both; "lost" and "gained": voxels of only the donor, or only the network, by the donor's voxels.
    """
    changes = {}
    for name, value in donor_values.items():
        others = [v for other, v in labels.items() if other not in (*completed, name, "background")]
        free = ~np.isin(truth, others)  # where you drew another label, or "ignore", you are right
        own, before, after = truth == labels[name], (donor == value) & free, (network == labels[name]) & free
        from_a_person = name not in completed or bool((own != before).any())
        size = int(before.sum())
        changes[name] = {
            "donor": dice(own, donor == value) if from_a_person else np.nan,
            "network": dice(own, network == labels[name]) if from_a_person else np.nan,
            "agreement": dice(before, after),
            "lost": int((before & ~after).sum()) / size if size else np.nan,
            "gained": int((after & ~before).sum()) / size if size else np.nan}
    return changes


def against_donor(masks: Mapping[str, Path], truth: Callable[[str], Path], raw: Path | None, labels: Mapping[str, Any],
                  read: Callable[[Path], tuple[np.ndarray, Any]]) -> CaseScores:
    """Return `label_changes` of each case of which the donor's prediction is there; {} if no donor completed masks.

    Args:
        masks: case -> the network's prediction. truth: returns the file of a case's mask.
        raw: folder of the data set in nnUNet_raw, where `transfer --keep-labels` left the donor's predictions.
        labels: "labels" of dataset.json.
        read: returns a mask and its spacing.

    Raises:
        ResultError: a prediction of the donor has another shape than the mask.
    """
    record = read_completed(raw)
    plain = {name: int(value) for name, value in labels.items() if not isinstance(value, list)}
    values = {name: int(value) for name, value in record.get("donor_values", {}).items() if name in plain}
    found: CaseScores = {}
    for case, file in masks.items():
        prediction = Path(raw or "", "donorTr", file.name)
        if case not in record.get("completed", {}) or not prediction.is_file():
            continue
        arrays = [np.rint(read(path)[0]).astype(int) for path in (truth(case), file, prediction)]
        if arrays[2].shape != arrays[0].shape:
            raise ResultError(f"{prediction} has shape {arrays[2].shape}, the mask of the case {arrays[0].shape}. "
                              "Delete it, and run the transfer again.")
        found[case] = label_changes(*arrays, labels=plain, donor_values=values, completed=record["completed"][case])
    return found


def kept_table(study: Study, shots: Shots) -> Table | None:
    """Return the table of what each label of the donor lost or gained; None if no donor completed masks."""
    rows, records = [], list[Mapping[str, Value]]()
    for method in study.methods:
        runs = [run for run in study.of(method, shots) if run.against_donor]
        labels = dict.fromkeys(label for run in runs for case in run.against_donor.values() for label in case)
        for label in labels:
            draws = {kind: [case_means(run.against_donor, kind, label) for run in runs]
                     for kind in ("donor", "network", "agreement", "lost", "gained")}
            change = mean_over_cases([{case: after[case] - before[case] for case in before.keys() & after.keys()}
                                      for before, after in zip(draws["donor"], draws["network"])])
            means = {kind: mean_over_cases(values) for kind, values in draws.items()}
            numbers: dict[str, Value] = {kind: None if mean is None else mean.value
                                         for kind, mean in {"change": change, **means}.items()}
            cases = len({case for run in runs for case in run.against_donor})
            rows.append([label.replace("_", " "), method,
                         "not known" if change is None else f"{mean_text(change, digits=3, sign='+')}, "
                         f"{change.cases} of {cases} cases",
                         *(MISSING if mean is None else f"{mean.value:{form}}" for mean, form in zip(
                             means.values(), (".3f", ".3f", ".3f", ".1%", ".1%")))])
            records.append({"experiment": study.name, "method": method, "shots": study.shots_name(shots),
                            "label": label, "cases": cases, "cases_of_a_person": change.cases if change else 0,
                            **numbers})
    return Table(name=f"kept_{study.shots_name(shots)}", rows=rows, records=records, notes=_NOTES,
                 title=study.title(f"What each label of the donor lost or gained, {study.cases_name(shots)}"),
                 head=["label", "method", "lost or gained", "Dice of the donor", "Dice now", "agreement with the donor",
                       "voxels lost", "voxels gained"]) if rows else None
