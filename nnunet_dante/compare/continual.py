"""Backward and forward transfer: what adding labels cost the old ones, and what keeping these cost the new ones.

As in Lifelong nnU-Net (Gonzalez et al. 2023, Scientific Reports 13), per test case: backward transfer is the Dice of
the donor's labels after the training minus before it; forward transfer is the Dice of the new labels minus that of
plain fine-tuning, which may forget the old ones. There it is given relative to plain fine-tuning, here in Dice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .results import RunResult
from .study import Mean, Shots, Study, case_means, mean_over_cases, mean_score
from .tables import MISSING, Cell, Table, by_shots, mean_text


def transfer_table(study: Study) -> Table | None:
    """Return backward and forward transfer of every method; None unless the donor finds some of the labels only.

    The donor's labels are those of which it finds something before any training.
    """
    zero_shot = study.of(study.references["zero_shot"] or "")
    old = [label for label in study.labels if (mean := mean_score(zero_shot, label=label)) and mean.value > 0]
    new = [label for label in study.labels if label not in old]
    reference = study.references["full_fine_tuning"]
    if not old or not new:
        return None

    def cell(runs: list[RunResult], shots: Shots) -> Cell | None:
        changes = {"backward": _change(((run, zero_shot[0]) for run in runs), old),
                   "forward": _change(((run, study.partner(run, reference)) for run in runs), new)}
        said = [MISSING if mean is None else mean_text(mean, digits=3, sign="+") for mean in changes.values()]
        return " / ".join(said), {name: None if mean is None else mean.value for name, mean in changes.items()}

    note = (f"Backward transfer: Dice of {', '.join(old)} minus the untouched donor's; a label that the network does "
            f"not have any more counts as Dice 0. Forward transfer: Dice of {', '.join(new)} minus that of {reference} "
            "with the same training cases. In brackets: 95 % bootstrap interval over the test cases.")
    table = by_shots(study, "transfer", "Backward / forward transfer", cell, note, zero_shot=False)
    return table if table.records else None


def _change(pairs: Iterable[tuple[RunResult, RunResult | None]], labels: Sequence[str]) -> Mean | None:
    """Return the mean change of the Dice of labels from the second run of each pair to the first, on the same cases."""
    changes = []
    for run, before in pairs:
        if before is None:
            continue
        for label in labels:
            theirs = case_means(before.cases, label=label)
            mine = dict.fromkeys(theirs, 0.0) | case_means(run.cases, label=label)
            changes.append({f"{case}|{label}": mine[case] - dice for case, dice in theirs.items()})
    return mean_over_cases([change for change in changes if change])
