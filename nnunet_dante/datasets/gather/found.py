"""What was found in a folder: cases with their images and masks, before anything is read, and how they lie there."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import SimpleITK

from ...types import DatasetJson
from .volumes import ending_of, read_volume

INTEGERS = ""  # key of a mask that holds several labels as integers; other masks are named by their one label


@dataclass(frozen=True)
class File:
    """A file below the source: its folders from there on, its name without ending, and the ending of an image file."""

    path: Path
    folders: tuple[str, ...]
    stem: str
    ending: str | None

    @property
    def relative(self) -> str:
        """Its path below the source, for messages."""
        return "/".join((*self.folders, self.path.name))


def files_below(source: Path) -> Iterator[File]:
    """Yield every file below `source` in the order of names, through links to folders; hidden ones are left out."""
    seen: set[str] = set()

    def enter(folder: Path, folders: tuple[str, ...]) -> Iterator[File]:
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            return
        seen.add(real)
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from enter(Path(entry.path), (*folders, entry.name))
            elif entry.is_file():
                ending = ending_of(entry.name)
                yield File(Path(entry.path), folders, entry.name.removesuffix(ending or ""), ending)

    yield from enter(source, ())


@dataclass(frozen=True)
class Part:
    """An image or a mask of a case: a whole file, a piece of one, or several files that are one volume.

    whole: the one file that is this image as it is, which nnU-Net may be able to read; None where there is none.
    """

    files: tuple[Path, ...]
    text: str
    load: Callable[[], SimpleITK.Image]
    whole: Path | None = None

    @classmethod
    def of(cls, path: Path, text: str) -> Part:
        """Return the part that is one whole image file."""
        return cls((path,), text, lambda: read_volume(path), path)

    @property
    def ending(self) -> str:
        """Ending of the whole file; "" where the part is none."""
        return (ending_of(self.whole.name) or "") if self.whole is not None else ""

    def state(self) -> tuple[tuple[int, int], ...]:
        """Return sizes and dates of its files: they differ once a file has changed."""
        return tuple((s.st_size, s.st_mtime_ns) for s in (path.stat() for path in self.files))


@dataclass(frozen=True)
class Found:
    """One case as it lies in the source.

    images: channel -> image. masks: label -> mask with this one label, or INTEGERS -> mask with several.
    legend: what the values of that mask mean, where a file says it for this case alone.
    """

    name: str
    patient: str
    images: Mapping[str, Part]
    masks: Mapping[str, Part]
    legend: Mapping[int, str] | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """All images and masks."""
        return (*self.images.values(), *self.masks.values())


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the files of a source lie, and the cases that they make.

    description: one sentence. legend: value in the masks -> label, where a file of the source says it.
    channels: names of the channels, in order, where a file says them. dataset_json: of an nnU-Net data set that is
    there. notes: what else was seen, and what was left aside.
    """

    description: str
    cases: Sequence[Found]
    legend: Mapping[int, str] | None = None
    legend_from: str = ""
    channels: Sequence[str] | None = None
    dataset_json: DatasetJson | None = None
    notes: Sequence[str] = field(default=())


def safe_name(text: str) -> str:
    """Return a case's name of letters, digits, - and _ alone, which every file system and nnU-Net take."""
    plain = unicodedata.normalize("NFKD", text.replace("ß", "ss")).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9-]+", "_", plain).strip("_-") or "case"


def unique_names(texts: Sequence[str]) -> list[str]:
    """Return a safe name for each text; equal ones get a number."""
    taken: set[str] = set()
    names = []
    for text in texts:
        name, number = safe_name(text), 2
        while name.lower() in taken:  # some file systems do not tell capitals
            name, number = f"{safe_name(text)}_{number}", number + 1
        taken.add(name.lower())
        names.append(name)
    return names
