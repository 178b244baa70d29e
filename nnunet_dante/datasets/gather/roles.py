"""Which files are masks, told by their names, by the user's pattern, or, where no name says it, by their voxels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK

from .found import File
from .volumes import read_volume

_MASK = re.compile(r"masks?|segs?|segmentations?|label(map)?s?|labelstr|gt|groundtruth|annotations?|rois?|"
                   r"contours", re.IGNORECASE)
_IMAGE = re.compile(r"images?|imagestr|imgs?|scans?|volumes?", re.IGNORECASE)
# Folders that stand for parts of a data set, and not for patients.
_PART = re.compile(r"train|training|val|validation|valid|test|testing|data|anat|derivatives", re.IGNORECASE)
_MOST_VALUES = 256  # a file with more different voxels is no mask


@dataclass(frozen=True)
class Token:
    """A file with the words that tell its case: those of its folders, then those of its name.

    place: how many of the words come from folders.
    """

    file: File
    words: tuple[str, ...]
    place: int


def is_mask(word: str) -> bool:
    """Whether a word of a name says that the file, or the files of the folder, are masks."""
    return _MASK.fullmatch(word) is not None


def words_of(text: str) -> list[str]:
    """Split a name at blanks, dots, hyphens and underscores, and "mask012" between word and number."""
    found: list[str] = []
    for word in filter(None, re.split(r"[\s_.\-]+", text)):
        numbered = re.fullmatch(r"([^\W\d]+)(\d+)", word)
        found += numbered.groups() if numbered and (is_mask(numbered[1]) or _IMAGE.fullmatch(numbered[1])) else [word]
    return found


def split_by_role(files: Sequence[File], masks: Sequence[str] = (),
                  labels: Iterable[str] = ()) -> tuple[list[Token], list[Token], str]:
    """Return the images, the masks, and how the masks were told, as text.

    masks: the user's patterns of paths below the source, such as "*/liver*". labels: names that the user gave; a file
    that ends in such a name is a mask. A DICOM series (ending .dcm) is an image.
    """
    series = [f for f in files if f.ending == ".dcm"]
    files = [f for f in files if f.ending != ".dcm"]
    named = {tuple(w.lower() for w in words_of(label)) for label in labels}
    if masks:
        chosen = {f for f in files if any(_matches(f.relative, pattern) for pattern in masks)}
        how = f"by --masks {' '.join(masks)}"
    elif chosen := {f for f in files if _says_mask(f) or f.path.with_name(f"{f.path.name}.csv").is_file()}:
        how = "by their names or folders"
    elif chosen := {f for f in files if any(_ends_in(words_of(f.stem), name) for name in named)}:
        how = "by the names in --labels"
    else:
        chosen = _by_voxels(files)
        chosen = chosen if series or len(chosen) < len(files) else set()
        how = "by their voxels, because no name says it: few whole numbers, lying together (--masks PATTERN overrides)"
    return ([_token(f) for f in (*files, *series) if f not in chosen], [_token(f) for f in files if f in chosen],
            how if chosen else "")


def _matches(relative: str, pattern: str) -> bool:
    regex = "".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    return re.fullmatch(rf"(.*/)?{regex}", relative, re.IGNORECASE) is not None


def _says_mask(file: File) -> bool:
    return any(map(is_mask, words_of("_".join((*file.folders, file.stem)))))


def _ends_in(words: Sequence[str], name: tuple[str, ...]) -> bool:
    return tuple(w.lower() for w in words[-len(name):]) == name


def _token(file: File) -> Token:
    place = []
    for folder in file.folders:
        words = words_of(folder)
        if not any(map(is_mask, words)) and not all(_IMAGE.fullmatch(w) or _PART.fullmatch(w) for w in words):
            place += words
    name = [w for w in words_of(file.stem) if not is_mask(w)]
    if place and name[:len(place)] == place:
        name = name[len(place):]
    elif file.folders and name[:len(last := words_of(file.folders[-1]))] == last and place[-len(last):] == last:
        name = name[len(last):]
    plain = [w for w in name if not _IMAGE.fullmatch(w)]
    return Token(file, (*place, *(plain if plain or place else name)), len(place))


def _by_voxels(files: Sequence[File]) -> set[File]:
    """Judge one file of each kind: equal last words where they recur in several folders, else equal folders."""
    by_word: dict[str, list[File]] = {}
    for file in files:
        by_word.setdefault((words_of(file.stem) or [""])[-1].lower(), []).append(file)
    kinds: dict[object, list[File]] = {}
    for word, same in by_word.items():
        recurs = len({f.folders for f in same}) > 1 and not word.isdecimal()
        for file in same:
            kinds.setdefault(word if recurs else file.folders, []).append(file)
    masks = {kind for kind, same in kinds.items() if _looks_like_a_mask(same[0])}
    return {f for kind in masks for f in kinds[kind]}


def _looks_like_a_mask(file: File) -> bool:
    try:
        volume = read_volume(file.path)
    except (RuntimeError, OSError, ValueError):
        return False
    if volume.GetNumberOfComponentsPerPixel() > 1:
        return False
    voxels = SimpleITK.GetArrayViewFromImage(volume)
    values = np.unique(voxels)
    if len(values) > _MOST_VALUES or values[0] != 0 or not (values == np.rint(values)).all():
        return False
    # Values lie together in a mask, and change from voxel to voxel in an image of few grey values.
    inside = voxels[..., :-1] != 0
    return len(values) <= 2 or 2 * np.count_nonzero(inside & (voxels[..., :-1] == voxels[..., 1:])) > inside.sum()


def without_running_number(labels: Mapping[str, object]) -> dict[str, str]:
    """Return name -> name without the last number, where all names end in the same one, as Dafne's exports do."""
    ends = {m[1] if (m := re.fullmatch(r".+_(\d+)", name)) else None for name in labels}
    if len(labels) > 1 and len(ends) == 1 and None not in ends:
        return {name: name.rpartition("_")[0] for name in labels}
    return {name: name for name in labels}
