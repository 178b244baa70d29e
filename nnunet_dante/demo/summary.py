"""What the demo shows at its end: scores of the check case, learning curves, overlays, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np

from ..compare.metrics import score
from ..compare.plots import learning_curves, overlays
from ..compare.report import cost_table, score_table, table
from ..compare.runs import read_run
from ..models.checkpoint import load_checkpoint_safely, write_text_atomically
from .data import MR

CAVEAT = ("One person per modality: both halves of a spine are the same person, so this shows that it runs, not how "
          "good it is.")
IN_DAFNE = "LoRA in Dafne"
_SLICES = (0.05, 0.35, 0.65)  # from the midline outwards, as a share of the labelled slices


def write_report(out: Path, *, runs: Mapping[str, Path], predictions: Mapping[str, Path], steps: str,
                 commands: Sequence[str], minutes: float) -> Path:
    """Write report.md, learning_curves.png and overlays.png below `out`; returns report.md.

    runs: method -> fold folder. predictions: method -> folder with the check case, relative to `out`.
    """
    raw = out / "nnUNet_raw" / MR.dataset
    image = _upright(raw / "imagesTs" / f"{MR.check}_0000.nii.gz")
    truth = _voxels(raw / "labelsTs")
    masks = {name: _voxels(out / folder) for name, folder in predictions.items()}
    spacing_mm = [float(mm) for mm in image.header.get_zooms()]
    scores = {name: score(truth, mask, labels=MR.labels, spacing_mm=spacing_mm) for name, mask in masks.items()}
    trainings = [read_run(name, fold, load_checkpoint_safely(fold / "checkpoint_final.pth"))
                 for name, fold in runs.items()]
    learning_curves(trainings, out / "learning_curves.png")
    labelled = np.flatnonzero(truth.any(axis=(0, 1)))
    overlays(image.get_fdata(), {"truth": truth, **masks}, out / "overlays.png", labels=MR.labels,
             slices=[int(k) for k in np.quantile(labelled, _SLICES)], spacing_mm=spacing_mm,
             captions={name: f"mean Dice {np.nanmean([s['dice'] for s in by_label.values()]):.2f}"
                       for name, by_label in scores.items()})
    text = _TEXT.format(
        caveat=CAVEAT, minutes=minutes, steps=steps, scores=score_table(scores), cost=cost_table(trainings),
        dafne=_dafne_text(masks),
        files=_file_table(runs["LoRA"]), commands="\n".join(commands), transfer=_transfer_text(out))
    write_text_atomically(text, out / "report.md")
    return out / "report.md"


def _dafne_text(masks: Mapping[str, np.ndarray]) -> str:
    return _DAFNE.format(agreement=(masks["LoRA"] == masks[IN_DAFNE]).mean()) if IN_DAFNE in masks else ""


def _upright(file: Path) -> nibabel.Nifti1Image:
    """Return the volume with axes (posterior, inferior, right), so that a transposed slice is a sagittal view."""
    volume = nibabel.Nifti1Image.from_filename(file)
    target = nibabel.orientations.axcodes2ornt("PIR")
    return volume.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(volume.affine), target))


def _voxels(folder: Path) -> np.ndarray:
    return np.asarray(_upright(folder / f"{MR.check}.nii.gz").dataobj)


def _file_table(fold: Path) -> str:
    files = ("checkpoint_final.pth", "adapter.safetensors")
    return table([["file", "KiB"], *([name, f"{(fold / name).stat().st_size / 1024:.0f}"] for name in files)])


def _transfer_text(out: Path) -> str:
    (file,) = (out / "nnUNet_preprocessed" / MR.dataset).glob("*_transfer.txt")
    return file.read_text().strip()


_DAFNE = """
"LoRA in Dafne" is the same network exported as `SpineMR.model` and run by dafne-dl, in a process in which neither
nnunet_dante nor nnU-Net could be imported: {agreement:.2%} of the voxels are as nnU-Net labels them.
"""

_TEXT = """# nnunet_dante demo

A network pretrained on the CT of one spine is moved to the T2-weighted MR of another, where it meets two structures
it has never seen: spinal canal and intervertebral disc. It trained on the left half and was checked on the right half;
no voxel is in both.

**{caveat}**

The whole demo took {minutes:.1f} minutes.

## Dice and 95 % Hausdorff distance on the check case

{scores}

All masks are from stock `nnUNetv2_predict`, in a process in which nnunet_dante could not be imported. All trainings
took the same {steps} steps and are judged by their last epoch. Learning rate and number of steps of this demo were
chosen with these images in view, for all methods alike. "before training" is the CT network after surgery on head and
stem, as it stands.
{dafne}
![The check case, from the midline outwards: image, truth, and each method](overlays.png)

## Learning curves and cost

{cost}

Peak and epochs are of the pseudo Dice: nnU-Net's own measure during training, on a few random patches of the check
case. In brackets: counted on the curve smoothed over three epochs. "best peak" is the highest one of all methods.

![Learning curves](learning_curves.png)

## What LoRA leaves on disk

{files}

The checkpoint is a stock nnU-Net checkpoint; the adapter is what LoRA trained, to be applied to the same start weights.
On a network as tiny as this one, the adapter's share is large; on nnU-Net's default network it is about 6 %.

## What transfer matched

```
{transfer}
```

## The commands

```
{commands}
```

All run in the folder of this report, with `nnUNet_raw`, `nnUNet_preprocessed` and `nnUNet_results` set to the folders
of these names. Between the first two, the demo made the planned network and patch small (nnUNetDemoPlans.json).

Images: sample_ct and sample_mri of TPTBox 1.1.0, Apache-2.0.
"""
