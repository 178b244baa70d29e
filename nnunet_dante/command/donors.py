"""List the models on this machine that can be donors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..files import printable
from ..models.installed import Installed, installed_models

_MAX_LABELS = 8


def list_donors(folders: Sequence[Path] = ()) -> str:
    """Return a text with the models in nnUNet_results, in TotalSegmentator's folder of weights, and in `folders`.

    For each model: what to give as donor, labels, channels, spacing in mm, trainer, folds and size in MiB. A damaged
    one is named, with the reason.
    """
    found = installed_models(folders)
    if not found:
        return ("No folder to look in: nnUNet_results is not set or no folder, and TotalSegmentator's weights are not "
                "there. Give folders: nnunet-dante donors FOLDER ...")
    lines = []
    for folder, models in found.items():
        lines.append(f"{folder}: {len(models) or 'no'} model{'s' * (len(models) != 1)}")
        for model in models:
            lines += _lines(model)
    return printable("\n".join(lines))


def _lines(model: Installed) -> Iterator[str]:
    yield f"  {model.donor}"
    if model.name not in model.donor:
        yield f"    {model.name}"
    if model.problem:
        yield f"    NOT USABLE: {model.problem}".replace("\n", " ")
        return
    shown = ", ".join(model.labels[:_MAX_LABELS]) + (", ..." if len(model.labels) > _MAX_LABELS else "")
    yield f"    {len(model.labels)} label{'s' * (len(model.labels) != 1)}: {shown}"
    spacing = " x ".join(f"{mm:.3g}" for mm in model.spacing_mm)
    yield (f"    {', '.join(model.channels)}; {spacing} mm; {model.configuration}; {model.trainer}; fold "
           f"{', '.join(model.folds) or 'unknown'}; {model.size / 2**20:.0f} MiB")
