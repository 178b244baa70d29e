"""Evidence for `transfer --keep-labels`: a donor that knows Anterior learns Posterior, and is to keep Anterior.

    python benchmarks/keep_labels.py TASK04 OUT [--minutes 60] [--donor-epochs 10]

The donor is trained by stock nnU-Net on the source acquisition of the hippocampus data, in which only Anterior is
drawn. In the target acquisition only Posterior is drawn. Methods, each with 1 and 4 cases in three draws and with all
16 cases, scored on target cases with both labels drawn:

    your labels       stock fine-tuning on the target's labels alone; its head has no Anterior
    head only         head surgery: the head has both labels, but the masks hold Posterior alone
    kept              `--keep-labels all`, with all that was learned
    kept, strength    the same, with as much of it as helps on the validation cases
    kept, rehearsal   `--keep-labels all --rehearse`
    partial           cases that each show one of the two labels, in turn; no donor speaks: marginal loss, all 16 cases
    all drawn         both labels drawn in every case: the ceiling

All train FineTune at one learning rate. One process, one thread; stopped at any moment or by --minutes, the same
command goes on. OUT/runs holds one file per run, OUT/report the report of `compare`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import nibabel
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "hippocampus"))
OLD, NEW = "Anterior", "Posterior"
TRAINING = {"epochs": 30, "iterations": 10, "val_iterations": 2, "lr": 0.01}
NAMES = {851: "Old", 852: "New", 853: "Both", 854: "HeadOnly", 855: "Partial"}
METHODS = {  # name: data set, strength
    "your labels": ("New", 1), "head only": ("HeadOnly", 1), "kept": ("NewCompleted", 1),
    "kept, strength": ("NewCompleted", "auto"), "kept, rehearsal": ("NewRehearsed", 1), "partial": ("Partial", 1),
    "all drawn": ("Both", 1)}


def write_data_set(root: Path, number: int, source: Path, cases: list[str], *, labels: dict[str, int],
                   drawn: dict[int, int], annotated: dict[str, list[str]] | None = None) -> None:
    """Write a raw data set; `drawn`: value in the Decathlon's masks -> value here, others are background."""
    folder = root / f"Dataset{number}_{NAMES[number]}"
    shutil.rmtree(folder, ignore_errors=True)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for case in cases:
        (folder / "imagesTr" / f"{case}_0000.nii.gz").symlink_to((source / "imagesTr" / f"{case}.nii.gz").resolve())
        mask = nibabel.load(source / "labelsTr" / f"{case}.nii.gz")
        values, shown = np.asarray(mask.dataobj), np.zeros(mask.shape, np.uint8)
        for old, new in drawn.items():
            if annotated is None or next(name for name, v in labels.items() if v == new) in annotated[case]:
                shown[values == old] = new
        nibabel.save(nibabel.Nifti1Image(shown, mask.affine), folder / "labelsTr" / f"{case}.nii.gz")
    content = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, **labels}, "numTraining": len(cases),
               "file_ending": ".nii.gz", **({"annotated": annotated} if annotated else {})}
    (folder / "dataset.json").write_text(json.dumps(content, indent=1))


def prepare(data: Path, out: Path, donor_epochs: int) -> dict[str, list[str]]:
    """Write the data sets, train the donor and transfer it to every data set; return the cases by their use."""
    from prepare import DONOR_TEST, DONOR_VALIDATION, POOL, VALIDATION, acquisitions, runs_of_ids, take

    from nnunet_dante.datasets.shots import draw_shots
    from nnunet_dante.transfers.transfer import transfer

    source, target = acquisitions(data)
    _, rest = take(runs_of_ids(source), DONOR_TEST)
    validation, rest = take(rest, DONOR_VALIDATION)
    training = [case for group in rest for case in group]
    groups = {group[0]: group for group in runs_of_ids(target)}
    test = take(list(groups.values()), len(target) - POOL - VALIDATION)[0]
    drawn = draw_shots(target, [1, 4, "all"], seeds=3, groups=groups, test=test, val=VALIDATION)
    uses = {"test": test, "pool": [*drawn.val, *drawn.pool]}
    raw, folder = out / "nnUNet_raw", out / "nnUNet_preprocessed"
    if (out / "prepared.json").is_file():
        return json.loads((out / "prepared.json").read_text())
    write_data_set(raw, 851, data, [*training, *validation], labels={OLD: 1}, drawn={1: 1})
    write_data_set(raw, 852, data, uses["pool"], labels={NEW: 1}, drawn={2: 1})
    write_data_set(raw, 853, data, uses["pool"], labels={OLD: 1, NEW: 2}, drawn={1: 1, 2: 2})
    write_data_set(raw, 854, data, uses["pool"], labels={OLD: 1, NEW: 2}, drawn={2: 2})
    shown = {case: [(OLD, NEW)[i % 2]] for i, case in enumerate(uses["pool"])}
    write_data_set(raw, 855, data, uses["pool"], labels={OLD: 1, NEW: 2}, drawn={1: 1, 2: 2}, annotated=shown)
    donor = train_donor(out, {"train": training, "val": validation}, donor_epochs)
    old_cases = raw / f"Dataset851_{NAMES[851]}"
    for number, options in ((852, {}), (852, {"keep_labels": ["all"], "into": "Dataset856_NewCompleted"}),
                            (852, {"keep_labels": ["all"], "into": "Dataset857_NewRehearsed", "rehearse": old_cases}),
                            (853, {}), (854, {}), (855, {"keep_labels": ["none"]})):
        report = transfer(donor, number, preprocess=True, num_processes=1, overrides=TRAINING, **options)
        print(report, flush=True)
        folds = [{"train": list(fold.train), "val": list(drawn.val)} for fold in drawn.folds]
        (folder / report.dataset / "splits_final.json").write_text(json.dumps(folds))
    uses["folds"] = [{"shots": f.shots, "seed": f.seed, "all": f.all} for f in drawn.folds]
    uses["donor"] = str(donor)
    (out / "prepared.json").write_text(json.dumps(uses))
    return uses


def train_donor(out: Path, split: dict, epochs: int) -> Path:
    """Train a small network on the cases in which only the old label is drawn; return its model folder."""
    from prepare import PLANS, small

    from nnunet_dante.adaptation.steps import Steps

    steps, folder = Steps(out, total=1), out / "nnUNet_preprocessed" / f"Dataset851_{NAMES[851]}"
    steps.run("nnUNetv2_plan_and_preprocess", "-d", 851, "-c", "3d_fullres", "-npfp", 1, "--no_pp")
    (folder / f"{PLANS}.json").write_text(json.dumps(small(json.loads((folder / "nnUNetPlans.json").read_text()))))
    (folder / "splits_final.json").write_text(json.dumps([split]))
    steps.run("nnUNetv2_preprocess", "-d", 851, "-plans_name", PLANS, "-c", "3d_fullres", "-np", 1)
    trainer = f"nnUNetTrainer_{epochs}epochs"
    steps.run("nnUNetv2_train", 851, "3d_fullres", 0, "-p", PLANS, "-tr", trainer, "-device", "cpu", epochs=epochs)
    return out / "nnUNet_results" / f"Dataset851_{NAMES[851]}" / f"{trainer}__{PLANS}__3d_fullres"


def run(out: Path, uses: dict, method: str, fold: int, data: Path) -> None:
    """Train one method on one draw, score the test cases with both labels drawn, and write OUT/runs/....json."""
    import torch

    from nnunet_dante.benchmark.worker import Scored, score_cases
    from nnunet_dante.compare.results import RunResult, write_result
    from nnunet_dante.compare.training_log import training_facts
    from nnunet_dante.datasets.images import Case
    from nnunet_dante.models.checkpoint import load_checkpoint_safely
    from nnunet_dante.models.settings import read_dante_block, with_overrides
    from nnunet_dante.training.trainers import nnUNetTrainerFineTune

    drawn, (name, strength) = uses["folds"][fold], METHODS.get(method, ("Both", None))
    file = out / "runs" / f"{method.replace(' ', '_').replace(',', '')}_{fold}.json"
    if file.is_file():
        return
    began = time.monotonic()
    test = Scored(labels={OLD: 1, NEW: 2}, cases={case: Case(
        images=(data / "imagesTr" / f"{case}.nii.gz",), mask=data / "labelsTr" / f"{case}.nii.gz")
        for case in uses["test"]})
    facts: dict = {"trainer": ""}
    if strength is None:  # the donor as it is
        model, checkpoint = Path(uses["donor"]), "checkpoint_final.pth"
    else:
        folder = next((out / "nnUNet_preprocessed").glob(f"Dataset???_{name}"))
        plans = json.loads((folder / "nnUNetDantePlans.json").read_text())
        block = read_dante_block(plans)
        plans |= {"plans_name": file.stem, "continue_training": False,
                  "dante": with_overrides(block, block["overrides"] | {"strength": strength})}
        torch.manual_seed(fold)
        np.random.seed(fold)
        trainer = nnUNetTrainerFineTune(plans=plans, configuration="3d_fullres", fold=fold, device=torch.device("cpu"),
                                        dataset_json=json.loads((folder / "dataset.json").read_text()))
        trainer.logger.plot_progress_png = lambda folder: None
        Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
        trainer.run_training()
        model, checkpoint = Path(trainer.output_folder_base), "checkpoint_final.pth"
        # `compare` takes what trains with FineTune alone as its reference: the method that forgets.
        facts = {"trainer": "nnUNetTrainerFineTune" + (f" ({method})" if method != "your labels" else ""),
                 **training_facts(load_checkpoint_safely(Path(trainer.output_folder, checkpoint)))}
    predictor = predictor_of(model, fold if strength is not None else 0, checkpoint)
    cases = score_cases(predictor, test, tolerance_mm=1.0)
    draw = {key: drawn[key] for key in ("shots", "seed", "all")} if strength is not None else {"shots": 0, "seed": 0}
    write_result(RunResult(experiment="old label Anterior, new label Posterior", donor="Anterior", method=method,
                           cases=cases, tolerance_mm=1.0, machine="1 thread", **draw, **facts), file)
    for weights in model.glob(f"fold_{fold}/*.pth") if strength is not None else ():
        weights.unlink()
    print(f"{method}, {drawn['shots']} cases, draw {drawn['seed']}: " + ", ".join(
        f"{label} {np.nanmean([c[label]['dice'] for c in cases.values()]):.3f}" for label in (OLD, NEW)
        if all(label in c for c in cases.values())) + f" ({time.monotonic() - began:.0f} s)", flush=True)


def predictor_of(model: Path, fold: int, checkpoint: str):
    """Return nnU-Net's own predictor, without mirroring."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False,
                                perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(model), (str(fold),), checkpoint)
    return predictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Task04_Hippocampus of the Medical Segmentation Decathlon")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60, help="no run begins after this time")
    parser.add_argument("--donor-epochs", type=int, default=10)
    options = parser.parse_args()
    began, out = time.monotonic(), options.out.resolve()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (out / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(out / name)
    os.environ |= {"nnUNet_compile": "f", "nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "0"}
    uses = prepare(options.data, out, options.donor_epochs)
    folds = sorted(range(len(uses["folds"])), key=lambda i: (uses["folds"][i]["seed"], uses["folds"][i]["shots"]))
    for fold, method in [(0, "zero-shot"), *((fold, method) for fold in folds for method in METHODS)]:
        if time.monotonic() - began > 60 * options.minutes:
            break
        if method == "partial" and not uses["folds"][fold]["all"]:
            continue  # a few cases may all show the same label
        run(out, uses, method, fold, options.data)
    from nnunet_dante.compare.report import compare

    print("Report:", compare([out], out / "report"))


if __name__ == "__main__":
    main()
