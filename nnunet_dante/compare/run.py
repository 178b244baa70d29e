"""From what the user names to the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..types import PathLike
from .cases import case_pictures
from .comparison import write_comparison
from .results import write_results
from .sources import read_sources
from .study import with_donor_names


def compare(paths: Sequence[PathLike], out: PathLike, *, tolerance_mm: float = 2.0) -> Path:
    """Write a report on fold folders of nnU-Net, protocol folders and files of results; returns report.md.

    `out`/results.json keeps all results, and can be compared again where the images are not.
    tolerance_mm: of the surface Dice of fold folders; results of a protocol bring their own.

    Raises:
        ResultError: a path is none of these, or something a fold folder needs is missing.
    """
    out = Path(out)
    given = read_sources([Path(path) for path in paths], tolerance_mm=tolerance_mm)
    write_results([source.result for source in given], out / "results.json")
    results = with_donor_names([source.result for source in given])
    sources = [replace(source, result=result) for source, result in zip(given, results)]
    return write_comparison(results, out, overlays=case_pictures(sources))
