"""The README's picture: an image, the mask of the donor, and the mask of the adapted network, from a finished demo.

    nnunet-dante demo && python docs/picture.py nnunet-dante-demo        # writes docs/images/demo.png

The image is the right half of the MR spine, the adapted network that of the fold that was trained on the left half. The
donor is the demo's CT network as it is, before any training on MR.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel
import numpy as np
from matplotlib.colors import ListedColormap

COLOURS = {"vertebral body": "#e69f00", "posterior elements": "#cc79a7", "spinal canal": "#56b4e9", "disc": "#009e73"}
CASE = "mr_right"


def sagittal(file: Path, position: int) -> np.ndarray:
    """Return a sagittal slice of a volume, head up; position in voxels from the left."""
    volume = nibabel.as_closest_canonical(nibabel.load(file))
    return np.asarray(volume.dataobj)[position].T[::-1]


def main(demo: str) -> None:
    dataset = Path(demo, "nnUNet_raw", "Dataset802_SpineMR")
    truth = nibabel.as_closest_canonical(nibabel.load(dataset / "labelsTr" / f"{CASE}.nii.gz"))
    labelled = (np.asarray(truth.dataobj) > 0).sum((1, 2))
    position, ratio = int(labelled.argmax()), truth.header.get_zooms()[2] / truth.header.get_zooms()[1]
    (adapted,) = Path(demo, "nnUNet_results").glob(f"{dataset.name}/*/fold_[0-9]/validation/{CASE}.nii.gz")
    panels = {"image": None, "CT network, not adapted": Path(demo, "predictions", "donor"), "adapted": adapted.parent,
              "reference": dataset / "labelsTr"}
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 2.6), layout="constrained")
    for axis, (title, folder) in zip(axes, panels.items()):
        axis.imshow(sagittal(dataset / "imagesTr" / f"{CASE}_0000.nii.gz", position), cmap="gray", aspect=ratio)
        if folder:
            mask = sagittal(folder / f"{CASE}.nii.gz", position)
            axis.imshow(np.ma.masked_equal(mask, 0), cmap=ListedColormap(list(COLOURS.values())), vmin=1,
                        vmax=len(COLOURS), alpha=0.65, aspect=ratio, interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside lower center", ncols=len(COLOURS), frameon=False)
    target = Path(__file__).parent / "images" / "demo.png"
    figure.savefig(target, dpi=90)
    print(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
