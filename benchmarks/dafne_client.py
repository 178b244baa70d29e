"""Carry a .model into the real Dafne client: import it, segment an image, save the masks, and let it learn.

It runs in an environment of Dafne, without this package, and calls what Dafne's buttons call; only the dialogs are
answered here. It is not part of the tests, because this environment takes 9 GB. Give it a home folder of its own, since
it writes into Dafne's models folder:

    python3.11 -m venv dafne-env && dafne-env/bin/pip install dafne==2.1.0a0
    export HOME=$(mktemp -d)
    dafne-env/bin/dafne     # once: answer which packages it may install, then quit
    QT_QPA_PLATFORM=offscreen dafne-env/bin/python benchmarks/dafne_client.py spine.model MR.nii.gz OUT \\
        --plane Sagittal --masks MASKS.nii.gz [--learn]

OUT receives the masks as Dafne's NIfTI files. --masks (whole numbers in the order of the model's labels) compares
Dafne's masks with the truth, or with those of nnUNetv2_predict. --learn saves no masks. It corrects them to MASKS in
ten volumes, which is as many as Dafne asks for, and which here are one and the same; then the model learns, and
segments again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from dafne.utils.app_identity import setup_app_identity

setup_app_identity()  # before anything of Qt

import nibabel  # noqa: E402
import numpy as np  # noqa: E402
from dafne.config import GlobalConfig, load_config  # noqa: E402
from dafne.ui.MuscleSegmentation import MuscleSegmentation  # noqa: E402
from dafne.utils.ThreadHelpers import threadpool  # noqa: E402
from nibabel.orientations import io_orientation, ornt_transform  # noqa: E402
from PyQt5.QtWidgets import QApplication, QInputDialog  # noqa: E402

NAME = "Walk"


def finish(window: MuscleSegmentation) -> None:
    """Wait until what was started in another thread has ended, and draw."""
    while threadpool.activeThreadCount():
        QApplication.processEvents()
        time.sleep(0.05)
    for _ in range(20):
        QApplication.processEvents()


def masks(window: MuscleSegmentation) -> dict[str, np.ndarray]:
    """Return the regions that the window shows, each of shape (rows, columns, slices)."""
    found = {}
    for name in window.roiManager.get_roi_names():
        found[name] = np.zeros(window.medical_volume.shape, bool)
        for index in range(found[name].shape[2]):
            if window.roiManager.contains(name, index):
                found[name][:, :, index] = window.roiManager.get_mask(name, index) > 0
    return found


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Dice of two masks of equal shape."""
    return 2 * float((a & b).sum()) / max(1, int(a.sum()) + int(b.sum()))


def segment(window: MuscleSegmentation) -> dict[str, np.ndarray]:
    """Press AutoSegment for all slices; return the regions."""
    start = time.monotonic()
    window.doSegmentationMultislice(0, window.medical_volume.shape[2] - 1)
    finish(window)
    found = masks(window)
    print(f"AutoSegment: {time.monotonic() - start:.1f} s,", {name: int(mask.sum()) for name, mask in found.items()})
    return found


def as_shown(path: Path, window: MuscleSegmentation) -> np.ndarray:
    """Return a mask file with its axes as the window shows the image, shape (rows, columns, slices)."""
    file = nibabel.load(path)
    turn = ornt_transform(io_orientation(file.affine), io_orientation(window.affine))
    return np.asanyarray(file.as_reoriented(turn).dataobj)


def compare(found: dict[str, np.ndarray], truth: np.ndarray) -> None:
    """Print how far the regions agree with a mask of whole numbers."""
    for value, name in enumerate(found, start=1):
        other = truth == value
        print(f"{name}: Dice {dice(found[name], other):.4f}, {(found[name] != other).sum()} voxels differ")


def learn(window: MuscleSegmentation, image: Path, truth: np.ndarray, names: Iterable[str]) -> None:
    """Correct all regions, let the model learn from them, and segment with what it has become."""
    for _ in range(GlobalConfig["IL_3D_MIN_IMAGES"]):
        window.loadDirectory(str(image), NAME)  # Dafne takes a volume once, until it is loaded again
        for value, name in enumerate(names, start=1):
            for index in range(truth.shape[2]):
                window.roiManager.set_mask(name, index, (truth[:, :, index] == value).astype(np.uint8))
        start = time.monotonic()
        window.incrementalLearnStandalone()
        finish(window)
    print(f"the last 'Improve model...', with the learning: {time.monotonic() - start:.1f} s")
    window.dl_segmenters.clear()  # as after a restart
    compare(segment(window), truth)


def main() -> None:
    """Do it, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plane", choices=("Axial", "Sagittal", "Coronal"), default="Axial")
    parser.add_argument("--masks", type=Path)
    parser.add_argument("--learn", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    load_config()
    GlobalConfig["CHECK_UPDATES"] = False
    QInputDialog.getItem = staticmethod(lambda *_, **__: (asked.plane, True))
    window = MuscleSegmentation()
    window.alert = lambda text, kind="Warning": print(f"{kind}: {text}")
    window.question = lambda *_: False
    window.importModel(str(asked.model), NAME)
    print("models:", window.model_provider.available_models())
    window.loadDirectory(str(asked.image), NAME)
    finish(window)
    print("image:", window.medical_volume.shape, "orientation", nibabel.aff2axcodes(window.affine))
    found = segment(window)
    if asked.masks:
        compare(found, as_shown(asked.masks, window))
    if asked.learn:
        learn(window, asked.image, as_shown(asked.masks, window), found)
    else:
        window.saveResults(str(asked.out), "nifti")
        finish(window)
        print("written:", sorted(path.name for path in asked.out.iterdir()))
    sys.stdout.flush()
    os._exit(0)  # the windows crash where Python takes them down one by one


if __name__ == "__main__":
    main()
