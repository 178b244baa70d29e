"""Read image files of every kind that people have into SimpleITK images, and write what nnU-Net reads."""

from __future__ import annotations

import errno
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK
from PIL import Image

from ...files import atomic_path
from ..images import is_cut
from ..orientation import read_header

PHOTOS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")  # files that cannot say where they lie in the patient
VOLUMES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl")
ENDINGS = (*VOLUMES, *PHOTOS)
READ_BY_NNUNET = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tif")
_UNCOMPRESSED = 1  # value of a TIFF's tag 259; nnU-Net's reader of TIFFs needs further packages for other values


def ending_of(name: str) -> str | None:
    """Return the ending of an image file's name, such as ".nii.gz", as it is spelled; None if it is no image file."""
    lower = name.lower()
    return next((name[-len(e):] for e in ENDINGS if lower.endswith(e) and len(name) > len(e)), None)


def read_volume(path: Path) -> SimpleITK.Image:
    """Return an image file as a 2D, 3D or 4D image; colours are components, and an opaque alpha channel is dropped.

    Raises:
        RuntimeError, OSError, ValueError: it cannot be read.
    """
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp"):
        with Image.open(path) as opened:  # SimpleITK would turn the numbers of a mask with a palette into colours
            pixels = np.asarray(opened)
        pixels = pixels.astype(np.uint8) if pixels.dtype == bool else pixels
    else:
        volume = SimpleITK.ReadImage(str(path))
        if path.suffix.lower() not in (".tif", ".tiff"):
            return _without_single_axis(volume)
        if volume.GetNumberOfComponentsPerPixel() == 1:
            volume.SetSpacing([1.0] * volume.GetDimension())  # a TIFF knows dots per inch at most
            return volume
        pixels = SimpleITK.GetArrayFromImage(volume)
    if pixels.ndim == 3 and pixels.shape[-1] in (2, 4) and (pixels[..., -1] == np.iinfo(pixels.dtype).max).all():
        pixels = pixels[..., :-1]
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    return SimpleITK.GetImageFromArray(pixels, isVector=pixels.ndim == 3)


def _without_single_axis(volume: SimpleITK.Image) -> SimpleITK.Image:
    if volume.GetDimension() == 4 and volume.GetSize()[3] == 1:
        return volume[:, :, :, 0]
    return volume


@lru_cache(maxsize=4)  # the channels of one file are read one after the other, by a few threads
def _read_once(path: Path, _changed: int) -> SimpleITK.Image:
    return read_volume(path)


def read_channel(path: Path, index: int) -> SimpleITK.Image:
    """Return one channel of a 4D file as a 3D image."""
    return _read_once(path, path.stat().st_mtime_ns)[:, :, :, index]


def channels_in(path: Path) -> int:
    """Return the length of a fourth axis, 1 without one; only the header is read. 0: no header can be read."""
    if path.suffix.lower() in PHOTOS:
        return 1
    header = read_header(path)
    return 0 if header is None else header.size[3] if len(header.size) == 4 else 1


def nnunet_reads(path: Path, axes: int) -> bool:
    """Whether nnU-Net reads the file as it lies on the disk, and sees in it what `read_volume` sees.

    axes: of what `read_volume` returned for it.
    """
    ending = ending_of(path.name) or ""
    if ending not in READ_BY_NNUNET:  # endings in capitals are not read either
        return False
    if ending in (".png", ".bmp"):
        with Image.open(path) as opened:
            return opened.mode in ("L", "RGB") or opened.mode.startswith("I;16")
    if ending == ".tif":
        with Image.open(path) as opened:
            tags = dict(getattr(opened, "tag_v2", {}))
        return axes == 2 and tags.get(259) == _UNCOMPRESSED
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader.GetDimension() == axes and reader.GetNumberOfComponents() == 1


def write_volume(volume: SimpleITK.Image, path: Path) -> None:
    """Write a volume without loss, whole or not at all, in the format that the ending of `path` names.

    Raises:
        StorageError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        with_ending = temporary.with_name(temporary.name + (ending_of(path.name) or ""))  # it chooses the format
        try:
            SimpleITK.WriteImage(volume, str(with_ending), useCompression=True)
            if is_cut(with_ending) or not channels_in(with_ending):  # a full disk does not always stop ITK
                raise OSError(errno.ENOSPC, "the file is shorter than its content")
            with_ending.replace(temporary)
        except RuntimeError as error:
            raise OSError(errno.EIO, str(error).splitlines()[-1]) from error
        finally:
            with_ending.unlink(missing_ok=True)


def same_space(volume: SimpleITK.Image, array: np.ndarray) -> SimpleITK.Image:
    """Return the array (axes reversed, as SimpleITK's arrays are) as an image that lies where `volume` lies."""
    image = SimpleITK.GetImageFromArray(array)
    image.CopyInformation(volume)
    return image
