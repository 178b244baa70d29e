"""What `nnunet-dante adapt` makes of 16 cases when nobody chooses anything, beside the methods of the protocol.

    python benchmarks/hippocampus/adapt.py OUT      # OUT: written by run.py with strength.toml

For each shift, `adapt` gets the donor and a folder with the protocol's 16 training cases; only the length of a training
is set, to that of the protocol. Its four validation cases are not used. The result predicts the 13 test cases, without
mirroring as in the protocol. Writes results/hippocampus/adapt.json. Stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import date
from pathlib import Path

import numpy as np

EXPERIMENTS = {"acquisition shift": ("Dataset843_HippocampusTarget", "source"),
               "virtual scanner": ("Dataset844_HippocampusVirtual", "source"),
               "task shift": ("Dataset843_HippocampusTarget", "merged")}  # experiment: data set, donor
RESULT = Path(__file__).parents[1] / "results" / "hippocampus" / "adapt.json"


def write_folder(raw: Path, pool: list[str], folder: Path) -> None:
    """Write a data set that holds the cases of `pool` alone, as links."""
    for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for case in pool:
            if not (file := folder / part / f"{case}{ending}").exists():
                os.link(raw / part / file.name, file)
    content = json.loads((raw / "dataset.json").read_text()) | {"numTraining": len(pool)}
    (folder / "dataset.json").write_text(json.dumps(content))


def measure(model: Path, raw: Path, test: list[str]) -> float:
    """Return the mean Dice of the model's fold `all` on the test cases."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_dante.benchmark.worker import Scored, score_cases
    from nnunet_dante.compare.study import case_means
    from nnunet_dante.datasets.images import Case

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False,
                                perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(model), ("all",), "checkpoint_final.pth")
    cases = {name: Case(images=(raw / "imagesTr" / f"{name}_0000.nii.gz",), mask=raw / "labelsTr" / f"{name}.nii.gz")
             for name in test}
    labels = json.loads((raw / "dataset.json").read_text())["labels"]
    scores = score_cases(predictor, Scored(cases=cases, labels=labels), tolerance_mm=1.0)
    return float(np.mean(list(case_means(scores).values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()
    os.environ |= {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
    from nnunet_dante import adapt

    results = {}
    for experiment, (dataset, donor) in EXPERIMENTS.items():
        here, raw = out / "adapt" / experiment.replace(" ", "_"), out / "nnUNet_raw" / dataset
        shots = json.loads((out / "nnUNet_preprocessed" / dataset / "shots.json").read_text())
        write_folder(raw, shots["pool"], here / "folder")
        began = time.perf_counter()
        made = adapt(out / "donors" / donor, here / "folder", here / "out", name="Dataset843_Hippocampus", device="cpu",
                     overrides={"epochs": 50, "iterations": 6, "val_iterations": 2})
        model = next((here / "out" / "nnUNet_results").glob("*/*/fold_all/checkpoint_final.pth")).parents[1]
        results[experiment] = {"trainer": model.name.split("__")[0], "strength": made.strength,
                               "unseen cases of the folds": dict(made.dice), "test": measure(model, raw, shots["test"]),
                               "minutes": round((time.perf_counter() - began) / 60, 1)}
        print(experiment, json.dumps(results[experiment]), flush=True)
        RESULT.write_text(json.dumps({"date": date.today().isoformat(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
