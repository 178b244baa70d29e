"""Stands in for SimpleITK, whose wheel is too large to travel: it can be imported, and it reads nothing.

nnU-Net imports it beside its other readers. The kit's data sets ask for nnU-Net's NibabelIO.
"""

from __future__ import annotations

from typing import Any


class ImageFileReader:
    def SetFileName(self, _: str) -> None:
        pass

    def ReadImageInformation(self) -> None:
        raise RuntimeError("SimpleITK is not installed here")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"SimpleITK is not installed here, so that there is no SimpleITK.{name}")

    return missing
