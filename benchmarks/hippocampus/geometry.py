"""The donor's spacing or the target's own: hippocampus at 1 mm and in slices of 3 mm, from a donor at 2 mm.

    python benchmarks/hippocampus/geometry.py TASK04 OUT [--keep]

Writes two data sets of the target acquisition below OUT, trains each at both geometries (geometry.toml, four cases and
all 16, one draw), and compares. Thick slices are the mean of three neighbours, their masks that of the middle one.
Every prediction is scored at the resolution of its image. --keep puts the results into benchmarks/results.

    847 fine     as stored, 1 mm          848 thick    1 x 1 x 3 mm
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
from prepare import LABELS, POOL, VALIDATION, acquisitions, runs_of_ids, take

from nnunet_dante.adaptation.steps import Steps

NAMES = {847: "HippocampusFine", 848: "HippocampusThick"}
SLICES = 3


def thick(volume: np.ndarray, *, mask: bool) -> np.ndarray:
    """Return the volume (x, y, z) with every three slices along z as one."""
    volume = volume[..., :volume.shape[2] // SLICES * SLICES]
    return volume[..., SLICES // 2::SLICES] if mask else volume.reshape(*volume.shape[:2], -1, SLICES).mean(-1)


def write_dataset(out: Path, number: int, data: Path, cases: list[str]) -> None:
    """Write imagesTr, labelsTr and dataset.json of one data set."""
    folder = out / "nnUNet_raw" / f"Dataset{number}_{NAMES[number]}"
    for case in cases:
        for name, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
            image = nibabel.load(data / name / f"{case}.nii.gz")
            volume, affine = np.asarray(image.dataobj), image.affine.copy()
            volume = volume.astype(np.uint8 if name == "labelsTr" else np.float32)
            if number == 848:
                volume = thick(volume, mask=name == "labelsTr")
                affine[:3, 3] += affine[:3, 2] * (SLICES // 2)
                affine[:3, 2] *= SLICES
            (folder / name).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(volume, affine), folder / name / f"{case}{ending}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": len(cases), "file_ending": ".nii.gz",
         "reference": "Medical Segmentation Decathlon, Task04; CC-BY-SA 4.0"}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Task04_Hippocampus of the Medical Segmentation Decathlon")
    parser.add_argument("out", type=Path)
    parser.add_argument("--keep", action="store_true", help="the results in the repository")
    options = parser.parse_args()
    steps = Steps(options.out.resolve(), total=1)
    if not (steps.out / "donors").is_dir():
        steps.announce("Write the data sets and draw the shots")
        _, cases = acquisitions(options.data)
        groups = runs_of_ids(cases)
        (steps.out / "groups.json").write_text(json.dumps({group[0]: group for group in groups}))
        (steps.out / "test.json").write_text(json.dumps(take(groups, len(cases) - POOL - VALIDATION)[0]))
        for number in NAMES:
            write_dataset(steps.out, number, options.data, cases)
            steps.run("nnunet-dante", "shots", "-d", number, "-k", "4,all", "--seeds", 1, "--val", VALIDATION,
                      "--groups", steps.out / "groups.json", "--test", steps.out / "test.json")
        shutil.copytree(Path(__file__).parent / "donors", steps.out / "donors")
    subprocess.run([sys.executable, Path(__file__).with_name("run.py"), options.data, steps.out, "--protocol",
                    "geometry.toml", *(["--keep"] if options.keep else [])], check=True)


if __name__ == "__main__":
    main()
