"""Which cases are of one patient: no fold may train on one of them and validate on another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...errors import DatasetError
from ..checks import shorten
from .found import Found

# A last word of a name that tells sides, visits or series of one patient apart.
_ONE_OF_SEVERAL = re.compile(r"(left|right|l|r|pre|post|baseline|follow-?up|visit\d*|v\d|ses\d*|session\d*|scan\d*|"
                             r"tp?\d|time\d*|series\d*|bl|fu\d*)", re.IGNORECASE)


def group_patients(cases: Sequence[Found], groups: Mapping[str, Sequence[str]] | None) -> tuple[list[Found], list[str]]:
    """Return the cases with their patients, and what was taken for granted.

    groups: patient -> cases, as the user said it; a case that is in none is a patient of its own.

    Raises:
        DatasetError: `groups` names cases that are not there.
    """
    if groups is not None:
        patient_of = {case: patient for patient, members in groups.items() for case in members}
        if unknown := sorted(set(patient_of) - {c.name for c in cases}):
            raise DatasetError(f"--groups names {shorten(unknown)}, which is no case. The cases are "
                               f"{shorten([c.name for c in cases])}.")
        return [replace(c, patient=patient_of.get(c.name, c.name)) for c in cases], []
    rests = [_without_last_words(c.patient) for c in cases]
    found = [replace(c, patient=rest) if rests.count(rest) > 1 else c for c, rest in zip(cases, rests)]
    shared: dict[str, list[str]] = {}
    for case in found:
        shared.setdefault(case.patient, []).append(case.name)
    several = [f"{patient} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
               for patient, names in shared.items() if len(names) > 1]
    return found, [f"{len(several)} patients have several cases: {shorten(several)}. Their cases stay together in "
                   "groups.csv; --groups FILE says it better where this is wrong"] if several else []


def _without_last_words(name: str) -> str:
    words = re.split(r"[_\- ]+", name)
    while len(words) > 1 and (_ONE_OF_SEVERAL.fullmatch(words[-1]) or (
            len(words) > 2 and _ONE_OF_SEVERAL.fullmatch(words[-2]) and words[-1].isdecimal())):
        words.pop()
    return "_".join(words) if len(words) < len(re.split(r"[_\- ]+", name)) else name
