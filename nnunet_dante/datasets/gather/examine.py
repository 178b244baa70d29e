"""Read each case once: how it lies, what it holds, and what is wrong with it; nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import SimpleITK
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from ...errors import DanteError
from ..checks import same_place
from ..images import is_cut
from ..orientation import Header
from .found import Found, Layout, Part
from .labels import Labels
from .masks import LabelMap, counts_of, read_label_map
from .preview import picture
from .volumes import nnunet_reads

_SAMPLE = 1 << 20  # voxels from which percentiles are taken
_HOUNSFIELD_AIR = -900


@dataclass
class Facts:
    """What one case holds.

    intensity: of each channel min, p1, mean, p99, max and std. volumes: label -> voxels. as_is: whether nnU-Net can
    read every image (first) and the mask (second) as the files lie there. states: of its files, while they were read.
    """

    case: Found
    header: Header | None = None
    components: int = 1
    voxel_type: str = ""
    intensity: list[dict[str, float]] = field(default_factory=list)
    volumes: dict[str, int] = field(default_factory=dict)
    as_is: tuple[bool, bool] = (False, False)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    states: dict[Part, object] = field(default_factory=dict)
    picture: bytes = b""


def examine(layout: Layout, labels: Labels | None, *, resample: bool, pictures: bool,
            progress: Callable[[Iterable[Facts]], Iterable[Facts]] = iter) -> list[Facts]:
    """Read all cases of a layout, a few at the same time, and return what they hold, in their order.

    labels: None if no case has a mask. pictures: draw each case. progress: shows how far it is, such as tqdm.
    """
    run = partial(examine_case, layout=layout, labels=labels, resample=resample, pictures=pictures)
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        facts = list(progress(pool.map(run, layout.cases)))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the cases to come
    _compare_channels(facts)
    _find_duplicates(facts)
    return facts


def examine_case(case: Found, *, layout: Layout, labels: Labels | None, resample: bool,
                 pictures: bool) -> Facts:
    """Read one case; what goes wrong becomes a fault."""
    facts = Facts(case)
    for part in case.parts:
        if cut := [path.name for path in part.files if is_cut(path)]:
            facts.faults.append(f"{cut[0]} was cut off: it holds less than its header says. Copy it again")
    if facts.faults:
        return facts
    reading = next(iter(case.parts))
    try:
        facts.states = {part: part.state() for part in case.parts}
        image = None
        for reading in case.images.values():
            volume = _twice(reading.load)
            _look_at_image(facts, reading, volume, image)
            image = volume if image is None else image
        reading = next(iter(case.masks.values()), reading)
        if image is not None and labels is not None and case.masks:
            found = _twice(partial(read_label_map, case, labels, image, resample=resample,
                                   known_values=layout.dataset_json is not None))
            _look_at_mask(facts, found, labels, layout)
            if pictures and found.voxels is not None and not facts.faults:
                facts.picture = picture(image, found.voxels)
        if facts.states != {part: part.state() for part in case.parts}:
            facts.faults.append("its files changed while they were read. Wait until they are written, and try again")
    except DanteError as error:
        facts.faults.append(str(error))
    except Exception as error:  # whatever the libraries raise on files that are damaged or gone
        facts.faults.append(f"{reading.text} cannot be read ({type(error).__name__}: {_short(error)})")
    return facts


def _twice(read: Callable):
    """Read again after a failure: network drives fail once."""
    try:
        return read()
    except (OSError, RuntimeError):
        return read()


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else "")[:200]


def _look_at_image(facts: Facts, part: Part, volume: SimpleITK.Image, first: SimpleITK.Image | None) -> None:
    if first is None:
        facts.header, facts.voxel_type = Header.of(volume), volume.GetPixelIDTypeAsString()
        facts.components = volume.GetNumberOfComponentsPerPixel()
        facts.as_is = (True, len(facts.case.masks) == 1)
    elif volume.GetSize() != first.GetSize() or not same_place(Header.of(volume), Header.of(first)):
        facts.faults.append(f"{part.text} lies on another grid than the first channel. All channels of a case need the "
                            "same one: register and resample them")
    if volume.GetDimension() > 3:
        facts.faults.append(f"{part.text} has {volume.GetDimension()} axes; give images of 2 or 3 axes")
    as_is = part.whole is not None and nnunet_reads(part.whole, volume.GetDimension())
    facts.as_is = (facts.as_is[0] and as_is, facts.as_is[1])
    voxels = SimpleITK.GetArrayViewFromImage(volume)
    if voxels.dtype.kind == "f" and not np.isfinite(voxels.sum(dtype=np.float64)) and not np.isfinite(voxels).all():
        facts.faults.append(f"{part.text} holds NaN or infinite voxels. Replace them, for example by 0")
        return
    sample = voxels.ravel()[::max(1, voxels.size // _SAMPLE)]
    low, high = np.percentile(sample, (1, 99))
    values = {"min": float(voxels.min()), "p1": float(low), "mean": float(voxels.mean(dtype=np.float64)),
              "p99": float(high), "max": float(voxels.max()), "std": float(sample.std(dtype=np.float64))}
    facts.intensity.append(values)
    if values["min"] == values["max"]:
        facts.warnings.append(f"{part.text} has the same value everywhere")


def _look_at_mask(facts: Facts, found: LabelMap, labels: Labels, layout: Layout) -> None:
    facts.faults += found.faults
    facts.warnings += found.warnings
    if found.voxels is None or found.faults:
        return
    counts = counts_of(found.voxels)
    if layout.dataset_json is not None:
        manager = LabelManager(layout.dataset_json["labels"], layout.dataset_json.get("regions_class_order"))
        allowed = {0, *map(int, manager.all_labels), manager.ignore_label}
        if unknown := [f"{v:g}" for v in counts if v not in allowed]:
            facts.faults.append(f"its mask holds {', '.join(unknown[:3])}, which dataset.json does not name. Add the "
                                "label there, or correct the mask")
    facts.volumes = {name: counts.get(value, 0) for name, value in labels.numbers.items()}
    if not any(count for value, count in counts.items() if value):
        facts.warnings.append("its mask has no foreground. That is right only if the image shows none of the labels")
    part = next(iter(facts.case.masks.values()))
    facts.as_is = (facts.as_is[0], facts.as_is[1] and not found.changed and part.whole is not None
                   and nnunet_reads(part.whole, found.voxels.ndim))


def _compare_channels(facts: Sequence[Facts]) -> None:
    """Give a fault to every case whose channels, axes or colours are not those of most cases."""
    for name, value_of in _KINDS:
        values = [value_of(f) for f in facts if f.header is not None]
        most = max(values, key=values.count, default=None)
        for f in facts:
            if f.header is not None and value_of(f) != most:
                f.faults.append(f"its {name} {_list(value_of(f))}, but most cases have {_list(most)}")


_KINDS: tuple[tuple[str, Callable[[Facts], tuple]], ...] = (
    ("channels are", lambda f: tuple(sorted(f.case.images))),
    ("number of axes is", lambda f: (len(f.header.size) if f.header else 0,)),
    ("number of colours is", lambda f: (f.components,)))


def _list(values: Iterable[object] | None) -> str:
    return ", ".join(str(v) or "one image" for v in values or ())


def _find_duplicates(facts: Sequence[Facts]) -> None:
    seen: dict[object, Facts] = {}
    for f in facts:
        if f.header is None or not f.intensity or f.intensity[0]["std"] == 0:
            continue
        key = (f.header.size, *f.intensity[0].values())  # equal means of many voxels: equal images
        if (other := seen.setdefault(key, f)) is not f:
            f.warnings.append(f"its image is the same as that of {other.case.name}. Leave one of them out, or the same "
                              "image trains and validates; groups.csv keeps both together")
            f.case = replace(f.case, patient=other.case.patient)


def looks_like_ct(facts: Iterable[Facts]) -> Iterator[bool]:
    """Yield for each case whether its first channel looks like Hounsfield units."""
    for f in facts:
        if f.intensity:
            yield f.intensity[0]["min"] <= _HOUNSFIELD_AIR and f.intensity[0]["max"] < 1 << 15
