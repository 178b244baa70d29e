"""Which versions of Python, nnU-Net and PyTorch this package works with.

Versions that are known to fail are refused: they are outside the ranges of pyproject.toml, which are read from the
metadata of the installed package. A version of nnU-Net that is newer than the tested ones is used with a warning. This
module must work where the others do not, so importing it imports neither torch nor nnU-Net.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from . import __version__
from .errors import UnsupportedVersionError

PACKAGE = "nnunet-dante"
FRAMEWORK = ("Python", "nnunetv2", "torch")
TESTED_NNUNET = (2, 8)


def installed(name: str) -> str | None:
    """Return the version of Python, of this package or of a distribution; None where that has left no metadata."""
    if name in ("Python", PACKAGE):
        return platform.python_version() if name == "Python" else __version__
    try:
        return version(name)
    except (PackageNotFoundError, KeyError):  # KeyError: a leftover folder that names no version
        return None


def supported() -> dict[str, SpecifierSet]:
    """Return {name: range} for Python and all that this package needs; for torch also what nnU-Net demands.

    Empty where this package has no metadata, as in a source tree on PYTHONPATH.
    """
    ranges: dict[str, SpecifierSet] = {}
    for demand in _demands():
        if demand.marker is None or demand.marker.evaluate({"extra": ""}):
            ranges[demand.name] = ranges.get(demand.name, SpecifierSet()) & demand.specifier
    return ranges


def unsupported() -> dict[str, str]:
    """Return {name: sentence} of what is installed in a version outside its range; what has no metadata is passed."""
    # A development version, such as the 2.10.0a0 of NVIDIA's containers, is in a range as its release would be.
    return {name: f"{name} {seen} is installed, {PACKAGE} {__version__} needs {name}{allowed}"
            for name, allowed in supported().items()
            if (seen := installed(name)) and not allowed.contains(seen, prereleases=True)}


def untested() -> str:
    """Return a sentence about an nnU-Net that is newer than the tested ones, or "" where it is not."""
    seen = installed("nnunetv2")
    if seen is None or Version(seen).release[:2] <= TESTED_NNUNET:
        return ""
    newest = ".".join(map(str, TESTED_NNUNET))
    return (f"nnunetv2 {seen} is installed; {PACKAGE} {__version__} was tested with {newest}. If a training fails, "
            f'install an older one (pip install "nnunetv2<{TESTED_NNUNET[0]}.{TESTED_NNUNET[1] + 1}") or a newer '
            f"{PACKAGE}.")


def refuse_unsupported() -> None:
    """Raise where Python, nnU-Net or PyTorch has a version that is known to fail, and warn of an untested nnU-Net.

    The trainers override internals of nnU-Net: with another version they may fail, or train something else.

    Raises:
        UnsupportedVersionError: names versions, ranges and the command that installs versions that fit.
    """
    found = unsupported()
    if wrong := [name for name in FRAMEWORK if name in found]:
        raise UnsupportedVersionError(f"{'; '.join(found[name] for name in wrong)}. {remedy(wrong)}")
    if sentence := untested():
        warnings.warn(sentence, stacklevel=2)


def torchvision_version() -> str:
    """Return the version of torchvision, after importing it: one that was built for another torch cannot be imported.

    Raises:
        UnsupportedVersionError: it cannot be imported; names the command that installs the one that fits.
    """
    import torch

    try:
        import torchvision
    except Exception as error:  # a wrong pair ends in RuntimeError, ImportError, AttributeError or OSError, by version
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torchvision"
        cause = "torchvision is not installed" if missing else "This torchvision was built for another torch"
        release = torch.__version__.split(".")  # torchvision 0.(n + 15) belongs to torch 2.n
        raise UnsupportedVersionError(
            f"{type(error).__name__}: {error}. {cause}. nnU-Net imports it (through timm) before it looks for external "
            f"trainers, so no trainer of this package would be found. Install the one that belongs to torch "
            f'{torch.__version__}: pip install --force-reinstall --no-deps "torchvision==0.{int(release[1]) + 15}.*", '
            f"with the --index-url that you installed torch with, if any") from error
    return str(torchvision.__version__)


def remedy(wrong: list[str]) -> str:
    """Return what to do about `wrong`, keys of `unsupported()`."""
    if "Python" in wrong:
        return f"Make a virtual environment with a Python that fits, and install {PACKAGE} there."
    ranges = supported()
    return "Install versions that fit: pip install " + " ".join(f'"{name}{ranges[name]}"' for name in wrong)


def _demands() -> Iterator[Requirement]:
    try:
        python = metadata(PACKAGE)["Requires-Python"]
        own = requires(PACKAGE) or []
    except PackageNotFoundError:
        return
    yield Requirement(f"Python{python or ''}")
    yield from map(Requirement, own)
    try:
        yield from (r for r in map(Requirement, requires("nnunetv2") or []) if r.name == "torch")
    except PackageNotFoundError:
        return
