"""Find cases among image files by their names: two folders, beside each other, or one folder per patient.

The words of a path without those that say "image" or "mask" tell the case. What an image has beyond the words of its
case is its channel (P01_t1), what a mask has beyond them is its label (P01/liver).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..checks import shorten
from .found import INTEGERS, File, Found, Layout, Part, unique_names
from .roles import Token, split_by_role, without_running_number, words_of
from .volumes import channels_in, read_channel

Words = tuple[str, ...]


def find_pairs(files: Sequence[File], *, masks: Sequence[str] = (), labels: Iterable[str] = (),
               series: Mapping[File, Part] | None = None, channels: Iterable[str] = ()) -> Layout | None:
    """Return the cases that the image files make; None if there is no image file.

    masks: the user's patterns for masks. labels: names of labels that the user gave. series: of the files that
    stand for a DICOM series, the image that they are. channels: names of channels that images without masks may have.
    """
    readable = [f for f in files if f.ending is not None]
    if not readable:
        return None
    image_tokens, mask_tokens, how = split_by_role(readable, masks, labels)
    groups = _group(image_tokens, mask_tokens)
    used = {t.file for images, found in groups.values() for t in (*images, *found)}
    lost = [t.file.relative for t in mask_tokens if t.file not in used]
    known = {tuple(words_of(name.lower())) for name in channels}
    images_left = _by_channel([t for t in image_tokens if t.file not in used], groups, known)
    notes = [f"{len(lost)} masks belong to no image by their names: {shorten(lost)}"] if lost else []
    everything = {**groups, **{words: (tokens, []) for words, tokens in images_left.items()}}
    keys = sorted(everything)
    names = unique_names(["_".join(words) for words in keys])
    single = all(len(images) == 1 for images, _ in everything.values())
    cases = [_case(name, words, *everything[words], single=single, series=series or {})
             for name, words in zip(names, keys)]
    return Layout(description=_describe(groups, how), cases=_one_integer_mask(cases, labels), notes=notes)


def _group(images: Sequence[Token], masks: Sequence[Token]) -> dict[Words, tuple[list[Token], list[Token]]]:
    """Return the words of a case -> its images and masks, nearest relation first."""
    groups: dict[Words, tuple[list[Token], list[Token]]] = {}
    image_words, mask_words = {t.words for t in images}, {t.words for t in masks}
    taken: set[Words] = set()
    for mask in masks:  # the same words
        if mask.words in image_words:
            groups.setdefault(mask.words, ([], []))[1].append(mask)
            taken.add(mask.words)
    for image in images:
        if image.words in groups:
            groups[image.words][0].append(image)
        elif (case := _longest_start(image.words, mask_words)) and case not in taken:  # P01_t1 of the mask P01
            groups.setdefault(case, ([], []))[0].append(image)
    for mask in masks:
        if mask.words in groups and mask not in groups[mask.words][1]:
            groups[mask.words][1].append(mask)
    used = {t.file for pair in groups.values() for t in (*pair[0], *pair[1])}
    left = [t for t in images if t.file not in used]
    left_masks = [t for t in masks if t.file not in used]
    by_words: dict[Words, list[Token]] = {}
    for image in left:
        by_words.setdefault(image.words, []).append(image)
    for mask in left_masks:  # P01_liver of the image P01
        if case := _longest_start(mask.words, by_words):
            groups.setdefault(case, (by_words[case], []))[1].append(mask)
    used |= {t.file for pair in groups.values() for t in (*pair[0], *pair[1])}
    _by_common_words([t for t in left if t.file not in used], [t for t in left_masks if t.file not in used], groups)
    return groups


def _longest_start(words: Words, candidates: Collection[Words]) -> Words | None:
    return next((words[:n] for n in range(len(words) - 1, 0, -1) if words[:n] in candidates), None)


def _by_common_words(images: Sequence[Token], masks: Sequence[Token],
                     groups: dict[Words, tuple[list[Token], list[Token]]]) -> None:
    """Add cases whose images and masks both have further words: P01/ct with P01/liver, or P01_ct with P01_liver."""
    rests = Counter(t.words[n:] for t in images for n in range(1, len(t.words)))
    by_start: dict[Words, list[Token]] = {}
    for mask in masks:
        for n in range(1, len(mask.words)):
            by_start.setdefault(mask.words[:n], []).append(mask)
    for image in images:
        for n in range(len(image.words) - 1, 0, -1):
            case = image.words[:n]
            if case in by_start and (n == image.place or rests[image.words[n:]] > 1):
                groups.setdefault(case, ([], by_start[case]))[0].append(image)
                break


def _by_channel(images: Sequence[Token], groups: Mapping[Words, tuple[list[Token], list[Token]]],
                known: Collection[Words]) -> dict[Words, list[Token]]:
    """Return cases without masks: images whose last words are channels of the cases with masks belong together."""
    channels = {tuple(w.lower() for w in t.words[len(words):]) for words, (found, _) in groups.items() for t in found}
    cases: dict[Words, list[Token]] = {}
    for token in images:
        lower = tuple(w.lower() for w in token.words)
        length = max((len(c) for c in {*channels, *known} if lower[-len(c):] == c and len(lower) > len(c)), default=0)
        cases.setdefault(token.words[:len(token.words) - length], []).append(token)
    return cases


def _case(name: str, words: Words, images: Sequence[Token], masks: Sequence[Token], *, single: bool,
          series: Mapping[File, Part]) -> Found:
    patient = _patient(words, images[0])
    parts: dict[str, Part] = {}
    for token in sorted(images, key=lambda t: t.words):
        channel = "" if single else "_".join(token.words[len(words):])
        whole = series.get(token.file)
        for key, part in [(channel, whole)] if whole else split_channels(
                channel, token.file.path, token.file.relative):
            parts[key if key not in parts else f"{key} {token.file.relative}"] = part
    found: dict[str, Part] = {}
    by_name = ["_".join(t.words[max(len(words), t.place):]) for t in masks]
    for token, label in zip(masks, by_name):
        if not label or by_name.count(label) > 1:  # left/kidney and right/kidney
            label = "_".join(token.words[len(words):])
        found[label if label not in found else f"{label} {token.file.relative}"] = Part.of(
            token.file.path, token.file.relative)
    plain = without_running_number(found)
    return Found(name, patient, parts, {plain[label]: part for label, part in found.items()})


def split_channels(channel: str, path: Path, text: str) -> Iterator[tuple[str, Part]]:
    """Yield the one image of a file, or the channels of a file with a fourth axis."""
    number = channels_in(path)
    if number < 2:
        yield channel, Part.of(path, text)
        return
    for index in range(number):
        yield (f"{channel} {index:04d}".strip(),
               Part((path,), f"{text} (channel {index})", partial(read_channel, path, index)))


def _patient(words: Words, image: Token) -> str:
    """Return the first folder that is no folder of images or masks; in one folder, the name without a side or visit."""
    if image.place:
        return "_".join(words[:image.place]) if image.place <= len(words) else words[0]
    return "_".join(words)


def _one_integer_mask(cases: list[Found], labels: Iterable[str]) -> list[Found]:
    """Take masks as ones with integers where each case has one mask, and --labels does not know its name."""
    known = {label.lower() for label in labels}
    if not known or any(len(c.masks) > 1 or known & {m.lower() for m in c.masks} for c in cases):
        return cases
    return [replace(c, masks=dict(zip([INTEGERS], c.masks.values()))) for c in cases]


def _describe(groups: Mapping[Words, tuple[list[Token], list[Token]]], how: str) -> str:
    if not groups:
        return "images; no mask belongs to one of them"
    pairs = list(groups.values())
    if all(images[0].place == len(words) for words, (images, _) in groups.items() if images):
        where = "one folder per patient"
    elif all({t.file.folders for t in images} == {t.file.folders for t in masks} for images, masks in pairs):
        where = "images and masks beside each other"
    else:
        where = "images and masks in folders of their own"
    return f"{where}; the masks are told {how}"
