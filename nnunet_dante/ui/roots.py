"""The folders that the page may look into: everything below some roots, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigurationError
from ..files import NNUNET_FOLDERS

_VARIABLES = (*NNUNET_FOLDERS, "TOTALSEG_WEIGHTS_PATH", "TOTALSEG_HOME_DIR")
_DEEPEST, _MOST_FOLDERS = 4, 20_000
_NOT_ENTERED = ("imagesTr", "labelsTr", "imagesTs", "node_modules", "site-packages", "__pycache__", "logs",
                *NNUNET_FOLDERS[:2])


@dataclass(frozen=True)
class Roots:
    """Folders, as their real paths; whatever lies below one of them may be read and written."""

    folders: tuple[Path, ...]

    @classmethod
    def given(cls, folders: Sequence[str | Path]) -> Roots:
        """Return the roots of `nnunet-dante ui --root`, or without any: home, and the folders of nnU-Net and
        TotalSegmentator that are set.

        Raises:
            ConfigurationError: a folder that was named is not there.
        """
        if missing := [str(folder) for folder in folders if not Path(folder).expanduser().is_dir()]:
            raise ConfigurationError(f"--root {missing[0]} is no folder. Give folders that hold your data and models.")
        usual = [Path.home(), *(Path(os.environ[name]) for name in _VARIABLES if os.environ.get(name))]
        chosen = [Path(folder).expanduser() for folder in folders] or [folder for folder in usual if folder.is_dir()]
        return cls(tuple(dict.fromkeys(folder.resolve() for folder in chosen)))

    def path(self, text: str | Path, *, hidden: bool = True) -> Path:
        """Return the real path of what a user or a browser named, which need not exist yet.

        Links are followed first, so that neither `..` nor a link leads out.

        hidden: also below folders whose names begin with a dot.

        Raises:
            ConfigurationError: it lies below none of the roots, or is no path.
        """
        try:
            path = (self.folders[0] / Path(str(text).strip()).expanduser()).resolve()
        except (OSError, RuntimeError, ValueError):
            raise ConfigurationError(f"{str(text)[:200]!r} is no path.") from None
        below = [path.relative_to(root) for root in self.folders if path.is_relative_to(root)]
        if not any(hidden or not any(part.startswith(".") for part in rest.parts) for rest in below):
            raise ConfigurationError(f"{path} lies outside of {', '.join(map(str, self.folders))}. Start the page with "
                                     "--root FOLDER to let it look into another folder.")
        return path

    def filled(self, text: str | None, what: str) -> Path:
        """Return `path` of what a user typed into the field for `what`, which must not stay empty.

        Raises:
            ConfigurationError: the field is empty, or names a place outside of the roots.
        """
        if not (text or "").strip():
            raise ConfigurationError(f"The field is empty: give {what}.")
        return self.path(str(text))

    def inside(self, text: str | Path) -> list[Path]:
        """Return the visible folders in a folder, in the order of their names.

        Raises:
            ConfigurationError: the folder lies outside of the roots, or cannot be read.
        """
        folder = self.path(text)
        try:
            return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_dir()
                           and any(entry.resolve().is_relative_to(root) for root in self.folders)),
                          key=lambda entry: entry.name.lower())
        except OSError as error:
            raise ConfigurationError(f"{folder} cannot be read ({error.strerror}). Choose another folder.") from None

    def holding(self, name: str) -> Iterator[Path]:
        """Yield the folders that hold a file of this name, down to four folders below the roots."""
        todo, seen = [(root, 0) for root in self.folders], set[Path]()
        while todo and len(seen) < _MOST_FOLDERS:
            folder, depth = todo.pop(0)
            if folder in seen:
                continue
            seen.add(folder)
            try:
                entries = list(os.scandir(folder))
                if any(entry.name == name and entry.is_file(follow_symlinks=False) for entry in entries):
                    yield folder
                    continue
                todo += [(Path(entry.path), depth + 1) for entry in entries if depth < _DEEPEST and entry.is_dir(
                    follow_symlinks=False) and not entry.name.startswith(".") and entry.name not in _NOT_ENTERED]
            except OSError:  # not ours to read
                continue
