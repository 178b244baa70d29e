"""How the training files of an nnU-Net lie in the patient: nnU-Net feeds arrays as stored, Dafne re-orders them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

from ..errors import ConfigurationError
from ..models.donor import Donor
from ..models.labels import file_ending
from ..types import PathLike

_PAIRS = ("RL", "AP", "SI")
_WITHOUT = ("NaturalImage2DIO", "Tiff3DIO")  # readers of files that cannot say how they lie
_SAMPLE = 20  # headers are quick to read, but a data set may have thousands


@dataclass(frozen=True)
class Orientation:
    """Where the axes of the stored files lead, such as "RAS" (first axis to the right), and how that is known.

    as_shown: the files know no orientation, so images are taken as Dafne shows them.
    """

    codes: str
    known_from: str
    as_shown: bool = False
    assumed: bool = False


def training_orientation(donor: Donor, source: PathLike, *, codes: str | None = None) -> Orientation:
    """Find the orientation of the files that the donor learned from.

    In this order: `codes`, what the reader makes of every file, predictions of nnU-Net's own validation in the model
    folder, training images below nnUNet_raw; else RAS is assumed.

    Raises:
        ConfigurationError: `codes` is no orientation.
    """
    if codes is not None:
        return Orientation(_checked(codes), "as given")
    reader = str(donor.plans.get("image_reader_writer"))
    if reader in _WITHOUT:
        return Orientation("LPS", f"{reader} reads files without orientation: taken as shown", as_shown=True)
    if reader == "NibabelIOWithReorient":
        return Orientation("RAS", f"{reader} turns every file")
    for place, files in _examples(donor, Path(source)):
        if found := Counter(filter(None, map(_codes_of, files))):
            (most, count), total = found.most_common(1)[0], sum(found.values())
            return Orientation(most, f"{count} of {total} files in {place}")
    return Orientation("RAS", "ASSUMED, because no training image was found; if it is wrong, the model confuses "
                              "directions: then give --orientation", assumed=True)


def _checked(codes: str) -> str:
    codes = codes.upper()
    if sorted(next((i for i, pair in enumerate(_PAIRS) if c in pair), -1) for c in codes) != [0, 1, 2]:
        raise ConfigurationError(f"The orientation {codes!r} is none: give one letter of each of R/L, A/P and S/I, in "
                                 "the order of the stored axes of your training files, such as RAS or LPS.")
    return codes


def _examples(donor: Donor, source: Path) -> Iterator[tuple[str, list[Path]]]:
    ending = file_ending({"file_ending": ".nii.gz"} | donor.dataset_json)
    if source.is_dir():
        yield "the model's validation", sorted(source.rglob(f"fold_*/validation/*{ending}"))[:_SAMPLE]
    raw = os.environ.get("nnUNet_raw")  # noqa: SIM112 nnU-Net spells it so
    if raw and Path(donor.dataset_name).name == donor.dataset_name:  # a foreign name must not lead out of it
        images = Path(raw, donor.dataset_name, "imagesTr")
        yield f"{donor.dataset_name}/imagesTr", sorted(images.glob(f"*{ending}"))[:_SAMPLE]


def _codes_of(path: Path) -> str | None:
    """Read the header alone; None where it cannot be read or is two-dimensional."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    if reader.GetDimension() != 3:
        return None
    directions = np.diag([-1.0, -1.0, 1.0]) @ np.reshape(reader.GetDirection(), (3, 3))  # LPS+ to RAS+
    return "".join(nibabel.aff2axcodes(np.block([[directions, np.zeros((3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]])))
