"""Data sets, donors and shots for the hippocampus benchmark, from a folder of the Decathlon's Task04.

    python benchmarks/hippocampus/prepare.py TASK04 OUT [--train-donors [--features 16 32 64 --trainer NAME]]

The donors lie beside this file in donors/, so that all results are of the same ones; --train-donors pretrains new ones
with stock nnU-Net. Writes nnU-Net's three folders below OUT. Cases are split by runs of consecutive ids, because
neighbours may be the two sides of one person. Source acquisition: float files; target acquisition: uint8 files, which
are measurably smoother.

    841 source     donor cases, Anterior and Posterior          842 merged     the same cases, both labels merged
    843 target     target acquisition                           844 virtual    the same through the virtual scanner
    845 dev        other source cases: for tuning               846 dev virtual  the same through the virtual scanner
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from scanner import virtual_scan

from nnunet_dante.adaptation.steps import Steps

LABELS = {"background": 0, "Anterior": 1, "Posterior": 2}
MERGED = {"background": 0, "Hippocampus": 1}
NAMES = {841: "HippocampusSource", 842: "HippocampusMerged", 843: "HippocampusTarget", 844: "HippocampusVirtual",
         845: "HippocampusDev", 846: "HippocampusDevVirtual"}
PLANS, TRAINER, SPACING_MM = "nnUNetSmallPlans", "nnUNetTrainer_10epochs", 2.0
FEATURES = (16, 32, 64)  # by stage
POOL, VALIDATION = 16, 4  # of target and development cases alike; all others are test cases
DEVELOPMENT, DONOR_VALIDATION, DONOR_TEST = 33, 6, 6


def runs_of_ids(cases: list[str]) -> list[list[str]]:
    """Return the cases in groups of consecutive numbers, which may belong to one person."""
    groups: list[list[str]] = []
    for case in sorted(cases):
        number = int(case.rpartition("_")[2])
        if groups and number == int(groups[-1][-1].rpartition("_")[2]) + 1:
            groups[-1].append(case)
        else:
            groups.append([case])
    return groups


def take(groups: list[list[str]], count: int) -> tuple[list[str], list[list[str]]]:
    """Return exactly `count` cases in whole groups, spread over the ids, and the groups that are left."""
    reachable: dict[int, tuple[int, ...]] = {0: ()}
    order = sorted(range(len(groups)), key=lambda i: (i * 7) % 11)  # neither the first nor the last ids alone
    for i in order:
        for total, chosen in list(reachable.items()):
            reachable.setdefault(total + len(groups[i]), (*chosen, i))
    chosen = set(reachable[count])
    return ([case for i in sorted(chosen) for case in groups[i]],
            [group for i, group in enumerate(groups) if i not in chosen])


def acquisitions(data: Path) -> tuple[list[str], list[str]]:
    """Return (source, target) cases: stored as float, and as uint8."""
    source, target = [], []
    for file in sorted((data / "imagesTr").glob("hippocampus_*.nii.gz")):
        kind = nibabel.load(file).get_data_dtype()
        (target if kind == np.uint8 else source).append(file.name.removesuffix(".nii.gz"))
    return source, target


def write_dataset(out: Path, number: int, data: Path, cases: list[str], *, scanned: bool = False,
                  reader: str = "") -> Path:
    """Write imagesTr, labelsTr and dataset.json of one data set and return its folder."""
    folder = out / "nnUNet_raw" / f"Dataset{number}_{NAMES[number]}"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for case in cases:
        image, mask = (nibabel.load(data / name / f"{case}.nii.gz") for name in ("imagesTr", "labelsTr"))
        volume = image.get_fdata(dtype=np.float32)
        if scanned:
            volume = virtual_scan(volume, spacing_mm=image.header.get_zooms(), case=case)
        truth = np.asarray(mask.dataobj).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(volume, image.affine), folder / "imagesTr" / f"{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(np.minimum(truth, 1) if number == 842 else truth, image.affine),
                     folder / "labelsTr" / f"{case}.nii.gz")
    labels = MERGED if number == 842 else LABELS
    (folder / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": len(cases), "file_ending": ".nii.gz",
         **({"overwrite_image_reader_writer": reader} if reader else {}),
         "reference": "Medical Segmentation Decathlon, Task04; CC-BY-SA 4.0"}, indent=1))
    return folder


def small(plans: dict, features: Sequence[int]) -> dict:
    """Return nnU-Net's own plans with a network that one CPU core trains at ten steps a second.

    At 2 mm most cases fit into one patch, and 300 steps take 20 seconds: enough to converge from scratch.
    """
    median = [round(n / SPACING_MM) for n in plans["configurations"]["3d_fullres"]["median_image_size_in_voxels"]]
    configuration = plans["configurations"]["3d_fullres"] | {
        "spacing": [SPACING_MM] * 3, "median_image_size_in_voxels": median, "patch_size": [20, 28, 20],
        "batch_size": 2, "data_identifier": f"{PLANS}_3d_fullres"}
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": 3, "features_per_stage": list(features), "n_conv_per_stage": [1] * 3,
        "n_conv_per_stage_decoder": [1] * 2, "strides": [[1] * 3] + [[2] * 3] * 2, "kernel_sizes": [[3] * 3] * 3}
    return plans | {"plans_name": PLANS, "configurations": {"3d_fullres": configuration}}


def train_donor(steps: Steps, number: int, split: dict, *, plans: str = PLANS, trainer: str = TRAINER, epochs: int = 10,
                features: Sequence[int] = FEATURES, device: str = "cpu", processes: int = 1) -> None:
    """Plan, preprocess and train with stock nnU-Net, or go on with a training that was stopped; keep the donor.

    plans: PLANS for the small network, with these features, or "nnUNetPlans" for the one that nnU-Net plans.
    """
    dataset = f"Dataset{number}_{NAMES[number]}"
    folder = steps.out / "nnUNet_preprocessed" / dataset
    trained = steps.out / "nnUNet_results" / dataset / f"{trainer}__{plans}__3d_fullres"
    going_on = any(trained.glob("fold_0/checkpoint_*.pth"))
    if not going_on:
        steps.run("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "3d_fullres", "-npfp", processes, "--no_pp")
        if plans == PLANS:
            planned = json.loads((folder / "nnUNetPlans.json").read_text())
            (folder / f"{PLANS}.json").write_text(json.dumps(small(planned, features)))
        (folder / "splits_final.json").write_text(json.dumps([split]))
        steps.run("nnUNetv2_preprocess", "-d", number, "-plans_name", plans, "-c", "3d_fullres", "-np", processes)
    steps.run("nnUNetv2_train", number, "3d_fullres", 0, "-p", plans, "-tr", trainer, "-device", device,
              *(["--c"] if going_on else []), epochs=epochs)
    keep_donor(steps.out, number, trained)


def keep_donor(out: Path, number: int, trained: Path) -> None:
    """Copy what a donor consists of to OUT/donors, where the protocols look for it."""
    folder = out / "donors" / {841: "source", 842: "merged"}[number]
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
        shutil.copy(trained / name, folder / name)


def divided(data: Path) -> tuple[dict[int, list[str]], dict[str, list[str]], list[str]]:
    """Return (data set -> its cases, the split of the donors' cases, source cases that no data set holds)."""
    source, target = acquisitions(data)
    development, rest = take(runs_of_ids(source), DEVELOPMENT)
    donor_test, rest = take(rest, DONOR_TEST)
    validation, rest = take(rest, DONOR_VALIDATION)
    training = [case for group in rest for case in group]
    cases = [training + validation, training + validation, target, target, development, development]
    return dict(zip(NAMES, cases)), {"train": training, "val": validation}, donor_test


def write_data(steps: Steps, data: Path, numbers: Sequence[int] = tuple(NAMES), *, reader: str = "") -> None:
    """Write these data sets, draw the shots of all but the donors', and write the cases to test donors with.

    reader: nnU-Net's reader of the images, if it is not to choose one.
    """
    steps.announce("Write the data sets")
    cases, _, donor_test = divided(data)
    for number in numbers:
        write_dataset(steps.out, number, data, cases[number], scanned=number in (844, 846), reader=reader)
    held_out = steps.out / "donor_test"
    for case in donor_test:
        for kind, name in (("imagesTr", f"{case}_0000"), ("labelsTr", case)):
            (held_out / kind).mkdir(parents=True, exist_ok=True)
            (held_out / kind / f"{name}.nii.gz").write_bytes((data / kind / f"{case}.nii.gz").read_bytes())
    steps.announce("Draw the shots")
    for number in (n for n in numbers if n > 842):
        groups = runs_of_ids(cases[number])
        test = take(groups, len(cases[number]) - POOL - VALIDATION)[0]
        (steps.out / f"groups_{number}.json").write_text(json.dumps({g[0]: g for g in groups}))
        (steps.out / f"test_{number}.json").write_text(json.dumps(test))
        steps.run("nnunet-dante", "shots", "-d", number, "-k", "1", "-k", "2", "-k", "4", "-k", "8", "-k", "all",
                  "--seeds", 3, "--val", VALIDATION, "--groups", steps.out / f"groups_{number}.json",
                  "--test", steps.out / f"test_{number}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Task04_Hippocampus of the Medical Segmentation Decathlon")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-donors", action="store_true", help="pretrain new donors instead of the ones kept here")
    parser.add_argument("--features", nargs=3, type=int, default=FEATURES, help="of the new donors, by stage")
    parser.add_argument("--trainer", default=TRAINER, help="of the new donors")
    options = parser.parse_args()
    steps = Steps(options.out.resolve(), total=4 if options.train_donors else 2)
    write_data(steps, options.data)
    if not options.train_donors:
        shutil.copytree(Path(__file__).parent / "donors", steps.out / "donors", dirs_exist_ok=True)
        return
    for number in (841, 842):
        steps.announce(f"Train the donor {NAMES[number]} with stock nnU-Net")
        train_donor(steps, number, divided(options.data)[1], features=options.features, trainer=options.trainer)


if __name__ == "__main__":
    main()
