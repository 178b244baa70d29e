"""Segment with an exported .model as a Dafne client does: by dafne-dl alone, without nnunet_dante or nnU-Net.

dafne-dl is installed into a folder of its own and not into the user's environment: as a normal dependency, it would
also install TensorFlow.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from .data import DemoDataError, pip

REQUIREMENTS = ("dafne-dl==2.0.2b2", "dill==0.4.1", "flexidep==0.0.17", "appdirs==1.4.4", "packaging>=23")

# Runs in a process of its own. argv: folder of dafne-dl, home, model, image, label names with commas, output.
# The client shows a sagittal volume with axes (down, front, left); dafne-dl and its helper flexidep write below HOME.
APPLY = """
import os, sys
for name in ("nnunet_dante", "nnunetv2", "dynamic_network_architectures"):
    sys.modules[name] = None
packages, home, model, image, labels, output = sys.argv[1:]
sys.path.insert(0, packages)
os.makedirs(home, exist_ok=True)
os.environ["HOME"] = os.environ["USERPROFILE"] = home
os.environ["XDG_CONFIG_HOME"] = os.environ["APPDATA"] = home
import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from dafne_dl.model_loaders import generic_load_model
with open(model, "rb") as stream:
    loaded = generic_load_model(stream, install_deps=False)
original = io_orientation(nibabel.load(image).affine)
volume = nibabel.load(image).as_reoriented(ornt_transform(original, axcodes2ornt("IAL")))
masks = loaded.apply({"image": volume.get_fdata(dtype=np.float32), "affine": volume.affine, "split_laterality": False,
                      "resolution": [float(mm) for mm in volume.header.get_zooms()], "classification": "demo"})
merged = np.zeros(volume.shape, np.uint8)
for value, name in enumerate(labels.split(","), start=1):
    merged[np.asarray(masks[name]) > 0] = value
merged = nibabel.Nifti1Image(merged, volume.affine)
nibabel.save(merged.as_reoriented(ornt_transform(axcodes2ornt("IAL"), original)), output)
"""


def install_dafne(cache: Path) -> Path:
    """Return a folder below `cache` with dafne-dl; pip installs it there once, without its dependencies.

    Raises:
        DemoDataError: pip failed, for instance offline.
    """
    target = cache / REQUIREMENTS[0].replace("==", "-")
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fresh = Path(folder, "packages")
        if failure := pip("install", "--no-deps", "--target", str(fresh), *REQUIREMENTS):
            raise DemoDataError(f"dafne-dl could not be installed into {target}: pip said {failure!r}. The demo goes "
                                f"on without it. With a network connection, run the demo again.")
        fresh.replace(target)
    return target
