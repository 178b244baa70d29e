"""Dice over strength on training, validation and test cases, and what each rule for the strength would have given.

    python benchmarks/hippocampus/curves.py OUT [--shots 1 2 4]     # OUT: written by run.py with strength.toml

Predicts with the checkpoints that strength.toml keeps. A training without unseen cases cannot choose on any, so a rule
must do; the table that is printed, and written with the curves to results/hippocampus/curves.json, compares the rules
on the test cases. Stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tqdm import tqdm

from nnunet_dante.adapters.strength import interpolate, trained_weights
from nnunet_dante.compare.results import read_results
from nnunet_dante.files import write_text_atomically
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.training.strength import dice_of_labels, mean_dice, start_of

RESULT = Path(__file__).parents[1] / "results" / "hippocampus" / "curves.json"
STRENGTHS = [round(0.1 * n, 1) for n in range(11)]
Curves = Mapping[str, Sequence[float]]
RULES: dict[str, Callable[[Curves], float]] = {  # curves of one run -> strength
    "none": lambda _: 0.0, "all": lambda _: 1.0, "half": lambda _: 0.5,
    "what the start lacked": lambda curves: 1 - curves["train"][0],
    "chosen on 4 unseen cases": lambda curves: STRENGTHS[int(np.argmax(curves["val"]))]}


def measure(out: Path, fold: Path) -> dict[str, list[float]]:
    """Return "train", "val" and "test" -> mean Dice at each strength, of the trained fold folder."""
    checkpoint = load_checkpoint_safely(fold / "checkpoint_final.pth")
    plans, dataset_json = (checkpoint["init_args"][key] for key in ("plans", "dataset_json"))
    folder, raw = (out / place / plans["dataset_name"] for place in ("nnUNet_preprocessed", "nnUNet_raw"))
    start = start_of(checkpoint, fold=fold, folder=lambda: folder)
    trained, shots = trained_weights(checkpoint), json.loads((folder / "shots.json").read_text())
    number = int(fold.name.removeprefix("fold_"))
    cases = {"train": next(f["train"] for f in shots["folds"] if f["fold"] == number)} | {k: shots[k] for k in (
        "val", "test")}
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False,
                                perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(fold.parent), (number,), "checkpoint_final.pth")
    reader, curves = predictor.plans_manager.image_reader_writer_class(), {use: [] for use in cases}
    for strength in STRENGTHS:
        predictor.list_of_parameters = [interpolate(start, trained, strength)]
        for use, names in cases.items():
            dice = []
            for name in names:
                image, properties = reader.read_images([str(raw / "imagesTr" / f"{name}_0000.nii.gz")])
                truth = reader.read_seg(str(raw / "labelsTr" / f"{name}{dataset_json['file_ending']}"))[0][0]
                mask = predictor.predict_single_npy_array(image, properties, None, None, False)
                dice += dice_of_labels(truth, mask, predictor.label_manager)
            curves[use].append(mean_dice(dice))
    return curves


def table(known: Mapping[str, dict]) -> str:
    """Return the mean test Dice of each rule, by shift and number of training cases."""
    rows: dict[tuple[str, int], list[Curves]] = {}
    for run in known.values():
        rows.setdefault((run["experiment"], run["shots"]), []).append(run["curves"])
    lines = [f"| shift, training cases | runs | {' | '.join(RULES)} |", "|---" * (len(RULES) + 2) + "|"]
    for (experiment, shots), runs in sorted(rows.items()):
        cells = [f"{np.mean([np.interp(rule(c), STRENGTHS, c['test']) for c in runs]):.3f}" for rule in RULES.values()]
        lines.append(f"| {experiment}, {shots} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    results = options.out / "strength"
    for run in tqdm([r for r in read_results(results) if r.strength is not None and r.shots in options.shots]):
        name = f"{run.experiment} {run.method} k{run.shots:03d} s{run.seed}".lower().replace(" ", "-")
        if name not in known:
            (fold,) = (results / "nnUNet_results").glob(f"*/{run.trainer}__{name}__*/fold_*")
            known[name] = {"experiment": run.experiment, "shots": run.shots, "curves": measure(options.out, fold)}
            write_text_atomically(json.dumps(known, indent=1, sort_keys=True) + "\n", RESULT)
    print(table(known))


if __name__ == "__main__":
    main()
