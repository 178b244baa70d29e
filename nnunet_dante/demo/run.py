"""The demo: adapt a small network, which stock nnU-Net trained on a CT, to an MR with `nnunet-dante adapt`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from nibabel import Nifti1Image

from ..adaptation.run import AdaptResult, adapt
from ..adaptation.steps import Steps
from ..errors import ConfigurationError
from ..files import NNUNET_FOLDERS
from ..training.launch import best_device
from .dafne import APPLY, install_dafne
from .data import MR, DemoDataError, fetch_images, writable_cache, write_dataset

# benchmarks/demo_donor.py trained it.
DONOR = Path(__file__).parent / "donor" / "nnUNetTrainer_5epochs__nnUNetDemoPlans__3d_fullres"
# The learning rate is ten times the default: a small network and 320 steps instead of 25,000.
OPTIONS = {"epochs": 10, "iterations": 32, "val_iterations": 5, "lr": 0.01}
CAVEAT = ("There is one person per modality, and both halves of a spine belong to the same person. So the demo shows "
          "that everything runs, but not how good a method is.")
_MARK = ".nnunet_dante_demo"  # a file with this name shows that a demo wrote this folder and may replace it
_OURS = ("donor", *NNUNET_FOLDERS, "logs", "predictions", "images", "cache", "adapt.json")


def run_demo(out: Path, *, data: Path | None = None) -> AdaptResult:
    """Run the demo in the folder `out`; the result is that of `adapt`. An earlier demo in `out` is replaced.

    data: a folder with the images, instead of downloading them (see `data.fetch_images`).

    Raises:
        DemoDataError: the images cannot be found or downloaded.
        ConfigurationError: `out` holds nnU-Net folders that were not written by a demo.
        DanteError: a command failed; the message names its log.
    """
    out = out.resolve()
    _clear(out)
    steps = Steps(out, total=3)
    print(CAVEAT, file=sys.stderr)
    steps.announce("Get an MR of a spine, cut it into a left and a right case; the donor comes with the package")
    write_dataset(out / "nnUNet_raw", MR, fetch_images(out / "images", data=data))
    donor, source = out / "donor" / DONOR.name, out / "nnUNet_raw" / MR.dataset
    shutil.copytree(DONOR, donor)
    steps.announce(f"Adapt it to the MR: nnunet-dante adapt {donor.relative_to(out)} {source.relative_to(out)} -o .")
    with steps.nnunet_folders():
        result = adapt(donor, source, out, overrides=OPTIONS, device=best_device())
    _segment_in_dafne(steps, result)
    return result


def _clear(out: Path) -> None:
    """Remove what an earlier demo wrote; all other files in `out` stay.

    Raises:
        ConfigurationError: `out` holds files or folders of the same names that were not written by a demo.
    """
    found = [out / name for name in _OURS if (out / name).exists()]
    if found and not (out / _MARK).exists():
        raise ConfigurationError(f"--out {out} holds {', '.join(path.name for path in found)}, which were not written "
                                 "by a demo and are not overwritten; choose a new folder.")
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()


def _segment_in_dafne(steps: Steps, result: AdaptResult) -> None:
    """Let dafne-dl alone segment with the exported model, and say how far it agrees; if it cannot be had, say why."""
    if result.dafne is None:
        return
    steps.announce("Segment the right half with dafne-dl, where neither nnunet_dante nor nnU-Net can be imported")
    out, name = steps.out, f"{MR.check}.nii.gz"
    try:
        packages = install_dafne(writable_cache(out / "cache"))
    except DemoDataError as error:
        print(error, file=sys.stderr)
        return
    masks = out / "predictions" / "dafne"
    masks.mkdir()
    image = out / "nnUNet_raw" / MR.dataset / "imagesTr" / f"{MR.check}_0000.nii.gz"
    steps.python(APPLY, packages, out / "cache" / "home", result.dafne, image, ",".join(MR.structures), masks / name,
                 name="dafne-dl")
    for file in out.glob(f"nnUNet_results/{MR.dataset}/*/fold_all/validation/{name}"):
        ours, theirs = (np.asanyarray(Nifti1Image.from_filename(path).dataobj) for path in (file, masks / name))
        print(f"      {(ours == theirs).mean():.2%} of the voxels are as nnU-Net labels them (which averages over "
              "mirrored images).", file=sys.stderr)
