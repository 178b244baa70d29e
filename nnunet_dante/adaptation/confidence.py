"""How sure a segmentation is, without a true mask: how far other networks agree with it; and how well that tells.

On images that no network saw, networks that differ a little agree where they are right (Roy et al. 2019, NeuroImage
195:11). Whether this holds for a user's data is tested on the cases that a fold did not see.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas
from tqdm import tqdm

from ..datasets.annotated import foreground, read_undrawn
from ..datasets.images import case_files
from ..files import csv_text, read_json, write_text_atomically
from ..training.strength import dice_of_labels, mean_dice, of_drawn, unseen_cases
from ..types import ReadOnlyStateDict
from .networks import Networks, Segmenter, changed_networks

UNSEEN = "confidence_unseen.csv"
FEWEST = 10  # cases; with fewer, a rank correlation must be above 0.65 to differ from chance
_MOST = 50


def agreement(mask: np.ndarray, others: Mapping[str, Sequence[np.ndarray]], segmenter: Segmenter) -> dict[str, float]:
    """Return the agreement (Dice) of a mask with those of other networks.

    others: kind of network -> its masks, each of the shape of `mask`. segmenter: knows the labels.
    Returns "confidence", the mean over kinds; each kind, the mean over its networks and the labels; and
    "confidence LABEL" for each label. Labels that neither mask has do not count; nan where nothing is left.
    """
    dice = {kind: [dice_of_labels(mask, other, segmenter.labels) for other in masks] for kind, masks in others.items()}
    kinds = {kind: mean_dice([mean_dice(row) for row in rows]) for kind, rows in dice.items()}
    by_label = {f"confidence {name}": mean_dice([mean_dice([row[n] for row in rows]) for rows in dice.values()])
                for n, name in enumerate(foreground(segmenter.dataset_json))}
    return {"confidence": mean_dice(list(kinds.values())), **kinds, **by_label}


def on_unseen(networks: Networks, segmenter: Segmenter) -> pandas.DataFrame:
    """Return confidence and true Dice of cases that a fold did not see; the result stays in a file of the adaptation.

    The masks are those of nnU-Net's validation. The other folds were trained on these cases, so that their agreement
    would look better than it is on new images; it is left out.
    """
    assert networks.steps is not None
    file = networks.steps.out / UNSEEN
    if not file.is_file():
        raw, preprocessed = (networks.steps.folder(name, networks.donor.dataset_name)
                             for name in ("nnUNet_raw", "nnUNet_preprocessed"))
        content = read_json(raw / "dataset.json")
        cases, undrawn = case_files(raw, content), read_undrawn(raw)
        todo = [(fold, mask) for fold in networks.folds
                for mask in sorted((fold / "validation").glob(f"*{segmenter.ending}"))]
        todo = sorted(random.Random(0).sample(todo, min(_MOST, len(todo))))
        rows, fold_of, others = [], Path(), dict[str, list[ReadOnlyStateDict]]()
        for fold, path in tqdm(todo, desc="testing the confidence", unit="case", disable=None):
            if fold != fold_of:
                fold_of, others = fold, changed_networks(fold, preprocessed)
            name = path.name.removesuffix(segmenter.ending)
            mask, truth = (segmenter.reader.read_seg(str(f))[0][0] for f in (path, cases[name].mask))
            found = segmenter.masks_of(segmenter.prepare(cases[name].images), others)
            dice = of_drawn(dice_of_labels(truth, mask, segmenter.labels), content, undrawn.get(name, ()))
            rows.append({"case": name, "dice": mean_dice(dice), **agreement(mask, found, segmenter)})
        write_text_atomically(csv_text(rows), file)
    return pandas.read_csv(file, dtype={"case": str})


def correlation(unseen: pandas.DataFrame) -> str:
    """Return in one sentence how the confidence goes with the true Dice (Spearman's rank correlation)."""
    known = unseen.dropna(subset=["dice", "confidence"])
    if len(known) < FEWEST:
        return (f"Only {unseen_cases(len(known))}: too few to tell how far the confidence follows the true Dice "
                f"({FEWEST} are needed).")
    rank = partial(known["dice"].corr, method="spearman")
    parts = ", ".join(f"{kind} alone {rank(known[kind]):.2f}" for kind in ("donor", "strength") if kind in known)
    return (f"On {unseen_cases(len(known))}, the rank correlation (Spearman) of confidence and true Dice is "
            f"{rank(known['confidence']):.2f} ({parts}); 1 means the same order, 0 none. The folds' part of the "
            "confidence cannot be tested, because each of these cases was seen by the other folds.")
