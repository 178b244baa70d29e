"""One network out of five folds: `adapter merge` against nnU-Net's ensemble, and fold `all` with the folds' strength.

    python benchmarks/hippocampus/soups.py OUT      # OUT: written by run.py with strength.toml

Trains LoRA on five folds of the 16 training cases of each shift, merges the adapters with equal weights, and trains
fold `all`, which takes over the mean of the strengths that the folds chose. Then predicts the 13 test cases: each fold
alone, the ensemble of the folds, the merged network, fold `all`. Writes results/hippocampus/soups.json. Stopped at any
moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np

EXPERIMENTS = {"acquisition shift": "Dataset843_HippocampusTarget", "virtual scanner": "Dataset844_HippocampusVirtual",
               "task shift": "Dataset843_HippocampusTarget"}
TRAINER, FOLDS = "nnUNetTrainerLoRA", 5
RESULT = Path(__file__).parents[1] / "results" / "hippocampus" / "soups.json"


def prepare(out: Path, here: Path, experiment: str) -> tuple[Path, str]:
    """Give an experiment a preprocessed folder of its own that holds the 16 training cases alone, in five folds."""
    source = out / "nnUNet_preprocessed" / EXPERIMENTS[experiment]
    folder = here / experiment.replace(" ", "_") / "nnUNet_preprocessed" / source.name
    plans = "nnUNetProtocol" + experiment.title().replace(" ", "")
    if not (folder / "splits_final.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        pool = json.loads((folder / "shots.json").read_text())["pool"]
        for file in (folder / f"{plans}_3d_fullres").iterdir():  # fold `all` trains on whatever is there
            if not any(file.name.startswith(case) for case in pool):
                file.unlink()
        (folder / "shots.json").unlink()
        content = json.loads((folder / f"{plans}.json").read_text())
        content["dante"]["overrides"] |= {"epochs": 50, "iterations": 6, "val_iterations": 2, "lr": 0.01}
        (folder / f"{plans}.json").write_text(json.dumps(content))
        folds = [{"train": [c for c in pool if c not in pool[n::FOLDS]], "val": pool[n::FOLDS]} for n in range(FOLDS)]
        (folder / "splits_final.json").write_text(json.dumps(folds))
    return folder, plans


def nnunet_dante(*arguments: object, environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-m", "nnunet_dante.cli", *map(str, arguments)], check=True, env=environment)


def train_and_merge(out: Path, here: Path, experiment: str) -> Path:
    """Return the folder of the trained model, with the merged network as fold 5."""
    folder, plans = prepare(out, here, experiment)
    root = folder.parents[1]
    environment = os.environ | {
        "nnUNet_raw": str(out / "nnUNet_raw"), "nnUNet_preprocessed": str(root / "nnUNet_preprocessed"),
        "nnUNet_results": str(root / "nnUNet_results"), "nnUNet_compile": "f", "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1"}
    model = root / "nnUNet_results" / folder.name / f"{TRAINER}__{plans}__3d_fullres"
    for fold in (*range(FOLDS), "all"):
        if not (model / f"fold_{fold}" / "validation" / "summary.json").is_file():
            nnunet_dante("train", folder.name, "3d_fullres", fold, "-p", plans, "-tr", TRAINER, "-device", "cpu",
                         environment=environment)
    merged, base = model / "merged.safetensors", folder / f"{plans}_3d_fullres_start.pth"
    (model / f"fold_{FOLDS}").mkdir(exist_ok=True)
    nnunet_dante("adapter", "merge", *(model / f"fold_{n}" / "adapter.safetensors" for n in range(FOLDS)), "-o", merged,
                 "--base", base, environment=environment)
    nnunet_dante("adapter", "apply", base, merged, "-o", model / f"fold_{FOLDS}" / "checkpoint_final.pth",
                 environment=environment)
    return model


def measure(out: Path, model: Path, experiment: str) -> dict:
    """Return the mean Dice on the test cases, and the seconds of prediction, of each way to use the folds."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_dante.benchmark.worker import Scored, score_cases
    from nnunet_dante.compare.study import case_means
    from nnunet_dante.datasets.images import Case
    from nnunet_dante.models.checkpoint import load_checkpoint_safely

    torch.set_num_threads(1)
    raw = out / "nnUNet_raw" / EXPERIMENTS[experiment]
    names = json.loads((out / "nnUNet_preprocessed" / raw.name / "shots.json").read_text())["test"]
    cases = {name: Case(images=(raw / "imagesTr" / f"{name}_0000.nii.gz",), mask=raw / "labelsTr" / f"{name}.nii.gz")
             for name in names}
    test = Scored(cases=cases, labels=json.loads((raw / "dataset.json").read_text())["labels"])
    found: dict = {}
    ways = {f"fold {n}": (n,) for n in range(FOLDS)}
    ways |= {"ensemble": tuple(range(FOLDS)), "merged": (FOLDS,), "all": ("all",)}
    for way, folds in ways.items():
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False,
                                    perform_everything_on_device=False)
        predictor.initialize_from_trained_model_folder(str(model), folds, "checkpoint_final.pth")
        began = time.perf_counter()
        scores = score_cases(predictor, test, tolerance_mm=1.0)
        found[way] = {"dice": float(np.mean(list(case_means(scores).values()))),
                      "seconds": round(time.perf_counter() - began, 2)}
        if way in ("all", *(f"fold {n}" for n in range(FOLDS))):
            kept = load_checkpoint_safely(model / f"fold_{folds[0]}" / "checkpoint_final.pth")["dante"]["strength"]
            found[way] |= {"strength": kept["value"], "rule": kept["rule"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()
    results = {}
    for experiment in EXPERIMENTS:
        model = train_and_merge(out, out / "soups", experiment)
        results[experiment] = measure(out, model, experiment)
        print(experiment, json.dumps(results[experiment], indent=1))
    RESULT.write_text(json.dumps({"date": date.today().isoformat(), "trainer": TRAINER, "results": results}, indent=1)
                      + "\n")


if __name__ == "__main__":
    main()
