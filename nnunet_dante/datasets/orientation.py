"""How image files lie in the patient: nnU-Net hands arrays to the network as stored, whatever their headers say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

from ..errors import ConfigurationError
from ..files import nnunet_folder
from ..models.donor import Donor
from ..models.installed import find_donor
from ..models.labels import file_ending
from ..types import PathLike
from .images import Case

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
    for place, files in _examples(donor, find_donor(source)):
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
    if raw := nnunet_folder("nnUNet_raw", donor.dataset_name):
        yield f"{raw.name}/imagesTr", sorted((raw / "imagesTr").glob(f"*{ending}"))[:_SAMPLE]


@dataclass(frozen=True)
class Header:
    """What the header of an image file says of its place in space; SimpleITK's order and axes (LPS+)."""

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    origin_mm: tuple[float, ...]
    directions: tuple[float, ...]

    @classmethod
    def of(cls, image: SimpleITK.Image | SimpleITK.ImageFileReader) -> Header:
        """Return where an image lies, or the file of which a reader has read the header."""
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    @property
    def codes(self) -> str | None:
        """Where the stored axes lead, such as "RAS"; None where that cannot be said, as of a 2D image."""
        if len(self.size) != 3:
            return None
        affine = np.eye(4)
        affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ np.reshape(self.directions, (3, 3))  # LPS+ to RAS+
        try:
            return "".join(nibabel.aff2axcodes(affine))
        except (TypeError, ValueError, np.linalg.LinAlgError):  # axes of length zero, or that are no numbers
            return None


def read_header(path: Path) -> Header | None:
    """Return what the header of an image says, without reading voxels; None where SimpleITK cannot read it."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return Header.of(reader)


def _codes_of(path: Path) -> str | None:
    header = read_header(path)
    return header.codes if header else None


def case_orientations(cases: Mapping[str, Case], reader: str) -> dict[str, str]:
    """Return case -> where the axes of its image lead once `reader` has read it; unknown ones are left out.

    NibabelIOWithReorient turns every image to RAS; photographs and tif stacks have no orientation.
    """
    if reader in _WITHOUT:
        return {}
    if reader == "NibabelIOWithReorient":
        return dict.fromkeys(cases, "RAS")
    return {name: codes for name, case in cases.items() if (codes := _codes_of(case.images[0]))}


def compare_orientations(found: Mapping[str, str], donor: Orientation) -> tuple[str, list[str]]:
    """Return how the images of a data set and of the donor lie, as text, and warnings about the cases that differ.

    A network that learned from images stored one way does not know the same structures mirrored or turned.
    """
    counts = Counter(found.values())
    mine = ", ".join(f"{codes} ({n} case{'s' * (n != 1)})" for codes, n in counts.most_common()) or "not known"
    codes = "none (its files have no orientation)" if donor.as_shown else donor.codes
    theirs = "not known" if donor.assumed else f"{codes} ({donor.known_from})"
    text = f"your images {mine}; the donor's images {theirs}"
    if not counts or donor.as_shown:
        return text, []
    wanted = counts.most_common(1)[0][0] if donor.assumed else donor.codes
    differing = [name for name, codes in found.items() if codes != wanted]
    if not differing:
        return text, []
    usual = "most of your images are" if donor.assumed else "the donor saw"
    which = "all" if len(differing) == len(found) else f"{len(differing)} of {len(found)}"
    shown = ", ".join(f"{name} ({found[name]})" for name in differing[:3]) + (", ..." if len(differing) > 3 else "")
    return text, [f"{which} cases are stored in another orientation than {usual} ({wanted}): {shown}. To the network "
                  f"they look mirrored or turned. Store images and masks as "
                  f"{wanted}, for example with SimpleITK.DICOMOrient(image, {wanted!r})"]
