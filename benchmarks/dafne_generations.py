"""Dice on held-out cases over generations of learn, upload and merge in Dafne (Santini 2025: +0.007 a generation).

    python benchmarks/dafne_generations.py DECATHLON/Task04_Hippocampus [--out benchmarks/results] [--generations 4]

A small network is pretrained on a few cases with stock nnU-Net and exported. In each generation one user corrects ten
volumes that nobody used before; the client hands over one label of each, as it does; the model learns inside dafne-dl
in a process without nnunet_dante; the server merges 0.5 * canonical + 0.5 * upload. Held-out cases are only scored.
Cases are split by runs of consecutive ids, because neighbours may be two sides of one person.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import nibabel
import torch

from nnunet_dante.adaptation.steps import Steps
from nnunet_dante.dafne.export import export_model
from nnunet_dante.demo.dafne import install_dafne
from nnunet_dante.demo.data import writable_cache
from nnunet_dante.demo.run import _small as small_plans  # nnU-Net's plans with a network for two CPU cores

LABELS = {"background": 0, "Anterior": 1, "Posterior": 2}
DATASET, PLANS, TRAINER = "Dataset804_Hippocampus", "nnUNetDemoPlans", "nnUNetTrainer_5epochs"

# argv: dafne-dl, home, model, JSON of the split, folder with imagesTr and labelsTr, JSON to write
GENERATIONS = """
import json, os, sys
for name in ("nnunet_dante", "nnunetv2", "dynamic_network_architectures"):
    sys.modules[name] = None
packages, home, model_file, split, data, result = sys.argv[1:]
sys.path.insert(0, packages)
os.environ["HOME"] = os.environ["XDG_CONFIG_HOME"] = home
import nibabel
import numpy as np
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

with open(model_file, "rb") as stream:
    canonical = generic_load_model(stream, install_deps=False)
generations = [{"label": None, "merged": scores(canonical).tolist()}]
for number, cases in enumerate(split["users"]):
    label = list(labels)[number % 2]
    upload = canonical.copy()
    data_given, masks_given = corrected(cases, label)
    upload.incremental_learn(data_given, masks_given, 1, 10)
    upload.reset_timestamp()
    canonical = canonical * 0.5 + upload * 0.5
    generations.append({"label": label, "upload": scores(upload).tolist(), "merged": scores(canonical).tolist()})
    means = [float(np.mean(g["merged"])) for g in generations]
    print("generation", number + 1, "corrected", label, "mean Dice", round(means[-1], 4), flush=True)
    json.dump(generations, open(result, "w"))
"""


def split_cases(data: Path, *, generations: int, pretrain: int, held_out: int) -> dict:
    cases = sorted(f.name.removesuffix(".nii.gz") for f in (data / "imagesTr").glob("hippocampus_*.nii.gz"))
    middle = cases[pretrain:len(cases) - held_out]
    return {"pretrain": cases[:pretrain], "held_out": cases[len(cases) - held_out:],
            "users": [middle[10 * g:10 * g + 10] for g in range(generations)]}


def pretrain(steps: Steps, data: Path, split: dict) -> Path:
    """Train a small network on the first cases with stock nnU-Net; all cases lie in imagesTr for the script above."""
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
    return steps.out / "nnUNet_results" / DATASET / f"{TRAINER}__{PLANS}__3d_fullres"


def learn_and_merge(work: Path, model: Path, data: Path, split: dict) -> list[dict]:
    """Export `model` and run the generations in a process without this package."""
    first = nibabel.load(data / "imagesTr" / f"{split['pretrain'][0]}.nii.gz")
    export_model(model, work / "Hippocampus.model", orientation="".join(nibabel.aff2axcodes(first.affine)))
    (work / "split.json").write_text(json.dumps(split))
    subprocess.run([sys.executable, "-c", GENERATIONS, install_dafne(writable_cache(work)), work / "home",
                    work / "Hippocampus.model", work / "split.json", work / "nnUNet_raw" / DATASET,
                    work / "generations.json"], check=True)
    return json.loads((work / "generations.json").read_text())


def write(out: Path, split: dict, generations: list[dict]) -> None:
    means = [sum(map(sum, g["merged"])) / (2 * len(g["merged"])) for g in generations]
    out.mkdir(parents=True, exist_ok=True)
    (out / "dafne_generations.json").write_text(json.dumps(
        {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
         "mean_dice": [round(m, 4) for m in means],
         "gain_per_generation": round((means[-1] - means[0]) / max(1, len(means) - 1), 4), "split": split,
         "labels": ["Anterior", "Posterior"], "generations": generations}, indent=1))
    plot(generations, out / "dafne_generations.png")


def plot(generations: list[dict], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    merged = [g["merged"] for g in generations]
    for column, (name, colour) in enumerate((("Anterior", "#E69F00"), ("Posterior", "#0072B2"))):
        axis.plot([sum(r[column] for r in rows) / len(rows) for rows in merged], "o-", color=colour, label=name)
    axis.plot([sum(map(sum, rows)) / (2 * len(rows)) for rows in merged], "s-", color="black", label="mean")
    axis.set_xticks(range(len(merged)), ["start", *(f"{i}\n{g['label']}" for i, g in enumerate(generations) if i)])
    axis.set(xlabel="generation, and the label its user corrected",
             ylabel=f"Dice of the merged model,\n{len(merged[0])} held-out cases")
    axis.grid(axis="y", color="0.9")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--pretrain", type=int, default=6)
    parser.add_argument("--held-out", type=int, default=20)
    options = parser.parse_args()
    split = split_cases(options.data, generations=options.generations, pretrain=options.pretrain,
                        held_out=options.held_out)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        steps = Steps(work, total=2)
        model = pretrain(steps, options.data, split)
        steps.announce(f"{options.generations} generations of learning from ten volumes and merging")
        generations = learn_and_merge(work, model, options.data, split)
    write(options.out, split, generations)


if __name__ == "__main__":
    main()
