"""The models in a folder or zip file: where they are, which of their files hold weights, and how a zip is unpacked."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import DonorError
from ..files import MAX_JSON_BYTES

DEFAULT_CHECKPOINT = "checkpoint_final.pth"
BUNDLE_FACTS = "nnunet_checkpoint.pth"  # in bundles of MONAI: all that a checkpoint of nnU-Net says, without weights
_JSON = ("plans.json", "dataset.json")
_V1 = "plans.pkl"
_DEPTH = 5  # nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION, and what a release may put around it
_MAX_INFLATION = 100  # weights compress to about 0.9 of their size; a hundredfold is an attack, not a model

V1_ADVICE = ("This is a model of nnU-Net v1, which nnU-Net v2 and so this package cannot use. Ask its authors for a "
             "version for nnU-Net v2, or train it again: nnUNetv2_convert_old_nnUNet_dataset converts data sets of v1.")


@dataclass(frozen=True)
class Model:
    """A model in a folder or zip. `weights` maps its files with weights to their bytes; all paths begin at the source.

    The name is that of its folder, for nnU-Net TRAINER__PLANS__CONFIGURATION.
    """

    name: str
    folder: PurePosixPath
    weights: dict[PurePosixPath, int]

    def choose_weights(self, fold: int | str | None, checkpoint: str) -> PurePosixPath:
        """Return the file to read: `fold` None takes fold_all, else the lowest.

        Bundles of MONAI and slimmed models name their files otherwise: where nobody asked for another name than the
        default, their usual names are taken, else the only name there is.

        Raises:
            DonorError: there is no such file, or one of several must be chosen.
        """
        in_fold = [file for file in self.weights if fold is None or file.parent.name == f"fold_{fold}"]
        names = {file.name for file in in_fold}
        if checkpoint == DEFAULT_CHECKPOINT and checkpoint not in names:
            usual = [name for name in ("final_model.pt", "model.pt") if name in names]
            if usual or len(names) == 1:
                checkpoint = [*usual, *names][0]
        if found := [file for file in in_fold if file.name == checkpoint]:
            return found[0]
        there = ", ".join(str(file.relative_to(self.folder)) for file in self.weights) or "no checkpoint"
        where = "any fold" if fold is None else f"fold_{fold}"
        raise DonorError(f"No {checkpoint} in {where} of {self.name}; it holds {there}. Choose with --fold and "
                         "--checkpoint.")


def find_models(source: Path) -> list[Model]:
    """Return the models in a folder or zip, in the order of their paths; every command finds the same ones.

    A model is a folder with plans.json, or with the facts that a bundle of MONAI keeps in its place. Its weights are in
    folders fold_*, or else beside plans.json.

    Raises:
        DonorError: the zip is damaged or hostile, or it holds a model of nnU-Net v1 and no other.
    """
    files = _files_in_folder(source) if source.is_dir() else {
        place: entry.file_size for place, entry in _entries(source).items()}
    folders = sorted({file.parent for file in files if file.name in ("plans.json", BUNDLE_FACTS)})
    if not folders and any(file.name == _V1 for file in files):
        raise DonorError(f"{source.name}: {V1_ADVICE}")
    models = []
    for folder in folders:
        weights = sorted((file for file in files if _holds_weights(file)
                          and (file.parent == folder or (file.parent.parent == folder and _is_fold(file.parent)))),
                         key=lambda file: (file.parent.name != "fold_all", len(file.parent.name), str(file)))
        in_folds = [file for file in weights if file.parent != folder]
        models.append(Model(folder.name or source.resolve().name, folder,
                            {file: files[file] for file in in_folds or weights}))
    return [model for model in models if model.weights or model.folder / "plans.json" in files]


def _holds_weights(file: PurePosixPath) -> bool:
    return file.suffix in (".pth", ".pt") and file.name != BUNDLE_FACTS and not file.name.startswith(".")


def _is_fold(folder: PurePosixPath) -> bool:
    return folder.name.startswith("fold_")


def _files_in_folder(root: Path) -> dict[PurePosixPath, int]:
    found: list[Path] = []
    for depth in range(_DEPTH + 1):
        for name in ("plans.json", BUNDLE_FACTS, _V1):
            found += root.glob("*/" * depth + name)
    for folder in {file.parent for file in found}:
        found += [*folder.glob("*.pt*"), *folder.glob("fold_*/*.pt*")]
    return {PurePosixPath(file.relative_to(root).as_posix()): file.stat().st_size for file in found if file.is_file()}


def is_v1_model(path: Path) -> bool:
    """Return whether the name and the files beside say that this file is of nnU-Net v1; nothing is read."""
    return path.is_file() and (path.name == _V1 or path.name.endswith(".model.pkl")
                               or (path.suffix == ".model" and path.with_name(f"{path.name}.pkl").is_file()))


def is_v1_content(content: Mapping[Any, Any]) -> bool:
    """Return whether this content of a torch file is a checkpoint of nnU-Net v1."""
    return {"plot_stuff", "state_dict"} <= set(content)


def is_archive(path: Path) -> bool:
    """Return whether the file is a zip of files; torch's checkpoints are zips, too, of one pickle and its tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(PurePosixPath(name).name != "data.pkl" for name in archive.namelist())
    except Exception:  # whatever zipfile raises on no zip, or a damaged one: reading it as a checkpoint says so
        return False


def unpack(path: Path, folder: Path, *, also: Collection[PurePosixPath] = ()) -> None:
    """Copy every plans.json and dataset.json of a zip, and the files `also`, into `folder` and nothing outside of it.

    Raises:
        DonorError: the zip is damaged, or holds an entry that leaves it, or unpacks to absurdly much.
    """
    entries = _entries(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for place, entry in entries.items():
                if place.name not in _JSON and place not in also:
                    continue
                target = folder.joinpath(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as stream, target.open("xb") as out:
                    shutil.copyfileobj(stream, out)
    except Exception as error:  # whatever zipfile, its decompressors and the file system raise
        raise _damaged(path, error) from error


def _entries(path: Path) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """Return the entries that a model may need, after a check that they stay in the archive and have sane sizes."""
    try:
        with zipfile.ZipFile(path) as archive:
            listed = [entry for entry in archive.infolist() if not entry.is_dir()]
    except Exception as error:  # whatever zipfile raises
        raise _damaged(path, error) from error
    left, entries = max(MAX_JSON_BYTES, _MAX_INFLATION * path.stat().st_size), dict[PurePosixPath, zipfile.ZipInfo]()
    for entry in listed:
        name = PureWindowsPath(entry.filename)  # knows both slashes and drives
        place = PurePosixPath(*name.parts)
        if not (place.name in (*_JSON, BUNDLE_FACTS, _V1) or _holds_weights(place)):
            continue
        left -= entry.file_size
        if name.anchor or ".." in name.parts or left < 0 or place in entries:
            raise DonorError(f"{path.name} holds the entry {entry.filename!r}, which leaves the archive, stands there "
                             "twice or unpacks to an absurd size; nnUNetv2_export_model_to_zip writes no such entry.")
        if len(place.parts) <= _DEPTH + 2:
            entries[place] = entry
    return entries


def _damaged(path: Path, error: Exception) -> DonorError:
    return DonorError(f"{path.name} cannot be unpacked ({type(error).__name__}: {error}); export or download it again.")
