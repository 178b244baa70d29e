"""Dice on held-out cases over generations of learn, upload and merge in Dafne (Santini 2025: +0.007 a generation).

    python benchmarks/dafne_generations.py DECATHLON/Task04_Hippocampus WORK [--out benchmarks/results] [--seeds 3]

For each seed, a small network is pretrained on a few cases with stock nnU-Net and exported. In each generation one user
corrects ten volumes that nobody used before; the client hands over one label of each, as it does, the labels taking
turns; the model learns inside dafne-dl in a process without nnunet_dante; the server merges 0.5 * canonical +
0.5 * upload. Held-out cases are only scored. The seed draws who gets which cases, by runs of consecutive ids, because
neighbours may be two sides of one person. Stopped at any moment, the same command goes on from what lies in WORK.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import nibabel
import numpy as np
import torch
from demo_donor import small_plans  # nnU-Net's plans with a network for two CPU cores
from scipy import stats

from nnunet_dante.adaptation.steps import Steps
from nnunet_dante.dafne.export import export_model
from nnunet_dante.demo.dafne import install_dafne
from nnunet_dante.demo.data import writable_cache

LABELS = {"background": 0, "Anterior": 1, "Posterior": 2}
DATASET, PLANS, TRAINER = "Dataset804_Hippocampus", "nnUNetDemoPlans", "nnUNetTrainer_5epochs"

# argv: dafne-dl, home, model, JSON of the split, folder with imagesTr and labelsTr, folder to write to
GENERATIONS = """
import json, os, sys, time
for name in ("nnunet_dante", "nnunetv2", "dynamic_network_architectures"):
    sys.modules[name] = None
packages, home, model_file, split, data, out = sys.argv[1:]
sys.path.insert(0, packages)
os.environ["HOME"] = os.environ["XDG_CONFIG_HOME"] = home
import nibabel
import numpy as np
import torch
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from dafne_dl.model_loaders import generic_load_model
split, labels = json.load(open(split)), {"Anterior": 1, "Posterior": 2}

def volume(folder, case, suffix=""):
    # axial, as the client reformats a NIfTI file: rows to posterior, columns to left, slices to superior
    image = nibabel.load(os.path.join(data, folder, case + suffix + ".nii.gz"))
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt("PLS")))

def scores(model):
    rows = []
    for case in split["held_out"]:
        image, truth = volume("imagesTr", case, "_0000"), np.asarray(volume("labelsTr", case).dataobj)
        masks = model.apply({"image": image.get_fdata(dtype=np.float32), "affine": image.affine,
                             "resolution": [float(s) for s in image.header.get_zooms()]})
        rows.append([2 * (masks[n] & (truth == v)).sum() / (masks[n].sum() + (truth == v).sum())
                     for n, v in labels.items()])
    return np.array(rows)

def corrected(cases, label):
    images = [volume("imagesTr", case, "_0000") for case in cases]
    data = {"image_list": [np.moveaxis(i.get_fdata(dtype=np.float32), 2, 0) for i in images],
            "affine": [i.affine.astype(np.float32) for i in images], "classification": "Hippocampus",
            "resolution": [float(s) for s in images[-1].header.get_zooms()]}
    masks = [np.moveaxis(np.asarray(volume("labelsTr", c).dataobj) == labels[label], 2, 0) for c in cases]
    return data, {i: {label: m.astype(np.uint8)} for i, m in enumerate(masks)}

def replace(name, write):
    with open(os.path.join(out, name + ".part"), "wb") as stream:
        write(stream)
    os.replace(stream.name, os.path.join(out, name))

record = os.path.join(out, "generations.json")
generations = json.load(open(record)) if os.path.exists(record) else []
if len(generations) > 1:
    model_file = os.path.join(out, f"merged_{len(generations) - 1}.model")
with open(model_file, "rb") as stream:
    canonical = generic_load_model(stream, install_deps=False)
if not generations:
    generations.append({"label": None, "merged": scores(canonical).tolist()})
for number in range(len(generations), len(split["users"]) + 1):
    label = list(labels)[(number - 1) % 2]
    upload = canonical.copy()
    began = time.monotonic()
    upload.incremental_learn(*corrected(split["users"][number - 1], label), 1, 10)
    seconds = round(time.monotonic() - began, 1)
    upload.reset_timestamp()
    canonical = canonical * 0.5 + upload * 0.5
    replace(f"merged_{number}.model", canonical.dump)
    generations.append({"label": label, "merged": scores(canonical).tolist(), "seconds_to_learn": seconds})
    replace("generations.json", lambda stream: stream.write(json.dumps(generations).encode()))
    print("generation", number, "corrected", label, "Dice", np.mean(generations[-1]["merged"], 0).round(4), flush=True)
"""


def split_cases(data: Path, seed: int, *, generations: int, pretrain: int, held_out: int) -> dict:
    groups: list[list[str]] = []
    for case in sorted(f.name.removesuffix(".nii.gz") for f in (data / "imagesTr").glob("hippocampus_*.nii.gz")):
        if groups and int(case[-3:]) == int(groups[-1][-1][-3:]) + 1:
            groups[-1].append(case)
        else:
            groups.append([case])
    random.Random(seed).shuffle(groups)
    held, start = taken(groups, held_out), taken(groups, pretrain)
    rest = sum(groups, [])
    return {"held_out": held, "pretrain": start, "users": [rest[10 * g:10 * g + 10] for g in range(generations)]}


def taken(groups: list[list[str]], count: int) -> list[str]:
    """Remove whole groups of at most `count` cases together from `groups`, and return their cases."""
    cases: list[str] = []
    for group in list(groups):
        if len(cases) + len(group) <= count:
            cases += group
            groups.remove(group)
    return sorted(cases)


def pretrain(steps: Steps, data: Path, split: dict) -> None:
    """Train a small network with stock nnU-Net and export it; all cases lie in imagesTr for the script above."""
    raw = steps.out / "nnUNet_raw" / DATASET
    for folder, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
        (raw / folder).mkdir(parents=True)
        for case in split["pretrain"]:
            (raw / folder / f"{case}{suffix}.nii.gz").symlink_to((data / folder / f"{case}.nii.gz").resolve())
    (raw / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}, "labels": LABELS, "file_ending":
                                                  ".nii.gz", "numTraining": len(split["pretrain"])}))
    steps.announce(f"Pretrain on {len(split['pretrain'])} cases")
    steps.run("nnUNetv2_plan_and_preprocess", "-d", 804, "-c", "3d_fullres", "-npfp", 1, "--no_pp")
    folder = steps.out / "nnUNet_preprocessed" / DATASET
    plans = small_plans(json.loads((folder / "nnUNetPlans.json").read_text()))
    (folder / f"{PLANS}.json").write_text(json.dumps(plans))
    steps.run("nnUNetv2_preprocess", "-d", 804, "-plans_name", PLANS, "-c", "3d_fullres", "-np", 1)
    steps.run("nnUNetv2_train", 804, "3d_fullres", "all", "-p", PLANS, "-tr", TRAINER, "-device", "cpu", epochs=5)
    for folder, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
        for case in (*split["held_out"], *sum(split["users"], [])):
            (raw / folder / f"{case}{suffix}.nii.gz").symlink_to((data / folder / f"{case}.nii.gz").resolve())
    first = nibabel.load(data / "imagesTr" / f"{split['pretrain'][0]}.nii.gz")
    model = steps.out / "nnUNet_results" / DATASET / f"{TRAINER}__{PLANS}__3d_fullres"
    export_model(model, steps.out / "Hippocampus.model", orientation="".join(nibabel.aff2axcodes(first.affine)),
                 tile_step=1.0)


def learn_and_merge(work: Path, data: Path, split: dict) -> list[dict]:
    """Pretrain where that has not been done, and run the generations in a process without this package."""
    model, divided = work / "Hippocampus.model", work / "split.json"
    if not model.exists() or json.loads(divided.read_text()) != split:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        divided.write_text(json.dumps(split))
        pretrain(Steps(work, total=1), data, split)
    subprocess.run([sys.executable, "-c", GENERATIONS, install_dafne(writable_cache(work)), work / "home", model,
                    divided, work / "nnUNet_raw" / DATASET, work], check=True)
    return json.loads((work / "generations.json").read_text())


def slope(means: np.ndarray) -> dict:
    """Least squares of Dice (seeds, generations) on the number of the generation, with an intercept for each seed."""
    seeds, count = means.shape
    x = np.arange(count) - (count - 1) / 2
    y = means - means.mean(1, keepdims=True)
    each = y @ x / (x @ x)
    free = seeds * (count - 1) - 1
    error = np.sqrt(((y - each.mean() * x) ** 2).sum() / free / (seeds * (x @ x)))
    half = float(stats.t.ppf(0.975, free) * error)
    return {"per_generation": round(float(each.mean()), 4), "of_each_seed": each.round(4).tolist(),
            "interval_95": [round(float(each.mean()) - half, 4), round(float(each.mean()) + half, 4)]}


def uncorrected(seeds: list[list[dict]]) -> dict:
    """Change of a label's mean Dice in the generations in which the other label was corrected."""
    result = {}
    for column, name in enumerate(("Anterior", "Posterior")):
        changes = [[round(float(np.mean(after["merged"], 0)[column] - np.mean(before["merged"], 0)[column]), 4)
                    for before, after in zip(run, run[1:]) if after["label"] != name] for run in seeds]
        result[name] = {"each": changes, "sum": [round(sum(c), 4) for c in changes],
                        "mean_sum": round(float(np.mean([sum(c) for c in changes])), 4),
                        "worst": min(min(c) for c in changes)}
    return result


def write(out: Path, splits: list[dict], seeds: list[list[dict]]) -> None:
    means = np.array([[np.mean(g["merged"], 0) for g in run] for run in seeds])  # (seeds, generations, labels)
    seconds = [g["seconds_to_learn"] for run in seeds for g in run[1:]]
    out.mkdir(parents=True, exist_ok=True)
    (out / "dafne_generations.json").write_text(json.dumps(
        {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
         "labels": ["Anterior", "Posterior"], "mean_dice": means.mean(2).round(4).tolist(),
         "slope": slope(means.mean(2)), "uncorrected": uncorrected(seeds), "dice_by_label": means.round(4).tolist(),
         "seconds_to_learn": {"median": float(np.median(seconds)), "most": max(seconds)}, "splits": splits}, indent=1))
    plot(means, out / "dafne_generations.png")


def plot(means: np.ndarray, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    curves = (("Anterior", "#E69F00", means[..., 0]), ("Posterior", "#0072B2", means[..., 1]),
              ("mean", "black", means.mean(2)))
    for name, colour, values in curves:
        axis.plot(values.T, color=colour, linewidth=0.7, alpha=0.5)
        axis.plot(values.mean(0), "o-", color=colour, label=name)
    axis.set_xticks(range(means.shape[1]), ["start", *(f"{i}\n{'PA'[i % 2]}" for i in range(1, means.shape[1]))])
    axis.set(xlabel="generation, and the label its user corrected (A, P)",
             ylabel="Dice of the merged model, held-out cases")
    axis.grid(axis="y", color="0.9")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--pretrain", type=int, default=6)
    parser.add_argument("--held-out", type=int, default=20)
    options = parser.parse_args()
    splits = [split_cases(options.data, seed, generations=options.generations, pretrain=options.pretrain,
                          held_out=options.held_out) for seed in range(options.seeds)]
    runs = [learn_and_merge(options.work.resolve() / f"seed{seed}", options.data, split)
            for seed, split in enumerate(splits)]
    write(options.out, splits, runs)


if __name__ == "__main__":
    main()
