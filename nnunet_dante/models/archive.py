"""Find the models in a folder or zip file and the files with their weights, and unpack zip files safely."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import DonorError
from ..files import MAX_JSON_BYTES, atomic_path

DEFAULT_CHECKPOINT = "checkpoint_final.pth"
BUNDLE_FACTS = "nnunet_checkpoint.pth"  # part of MONAI's bundles: a checkpoint of nnU-Net without the weights
_JSON = ("plans.json", "dataset.json")
_V1 = "plans.pkl"
_RECORDS = ("debug.json", "summary.json")  # of a training and its validation; they hold paths and names
_DEPTH = 5  # folders above a model: nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION, and two more of a release
_MAX_INFLATION = 100  # weights compress to about 0.9 of their size, so a factor of 100 is an attack

V1_ADVICE = ("This is a model of nnU-Net v1, which nnU-Net v2 and so this package cannot use. Ask its authors for a "
             "version for nnU-Net v2, or train it again: nnUNetv2_convert_old_nnUNet_dataset converts data sets of v1.")


@dataclass(frozen=True)
class Model:
    """A model in a folder or zip file. All paths begin at the source.

    name: name of its folder, for nnU-Net TRAINER__PLANS__CONFIGURATION.
    folder: the folder that holds plans.json.
    weights: file with weights -> its size in bytes.
    """

    name: str
    folder: PurePosixPath
    weights: dict[PurePosixPath, int]

    def choose_weights(self, fold: int | str | None, checkpoint: str) -> PurePosixPath:
        """Return the file with the weights of a fold.

        Bundles of MONAI and slimmed models use other file names than nnU-Net. If the default name was asked for and is
        not there, MONAI's usual names are tried, and then the only name that there is.

        fold: number of the fold, or "all"; None takes fold_all, or else the lowest fold.
        checkpoint: name of the file.

        Raises:
            DonorError: there is no such file, or there are several and the user must choose.
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
    """Return the models in a folder or zip file, in the order of their paths. All commands find models this way.

    A model is a folder that holds plans.json, or the nnunet_checkpoint.pth of a MONAI bundle. Its weights are in
    folders fold_*, or else beside plans.json.

    Raises:
        DonorError: the zip file is damaged or hostile, or the only models are of nnU-Net v1.
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
    """Return whether a file belongs to nnU-Net v1, by its name and by the files beside it; no file is read."""
    return path.is_file() and (path.name == _V1 or path.name.endswith(".model.pkl")
                               or (path.suffix == ".model" and path.with_name(f"{path.name}.pkl").is_file()))


def is_v1_content(content: Mapping[Any, Any]) -> bool:
    """Return whether the content of a torch file is a checkpoint of nnU-Net v1."""
    return {"plot_stuff", "state_dict"} <= set(content)


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip file, but no checkpoint of torch, which is a zip file with a data.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(PurePosixPath(name).name != "data.pkl" for name in archive.namelist())
    except Exception:  # not a zip file, or a damaged one; reading it as a checkpoint gives a better message
        return False


def unpack(path: Path, folder: Path, *, also: Collection[PurePosixPath] = ()) -> None:
    """Unpack every plans.json and dataset.json of a zip file, and the files `also`, into `folder`.

    Nothing is written outside of `folder`.

    Raises:
        DonorError: the zip file is damaged, an entry leads out of it, or it would unpack to an absurd size.
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


def without_records(path: Path) -> None:
    """Take out of an exported zip file what prediction does not read and what names folders, cases or the machine."""
    with atomic_path(path) as temporary, zipfile.ZipFile(path) as old, zipfile.ZipFile(
            temporary, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            if PurePosixPath(entry.filename).name not in _RECORDS:
                with old.open(entry) as stream, new.open(entry.filename, "w", force_zip64=True) as out:
                    shutil.copyfileobj(stream, out)


def _entries(path: Path) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """Return the entries that a model may need; none of them leads out of the zip file or has an absurd size."""
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
            raise DonorError(f"{path.name} holds the entry {entry.filename!r}, which leads out of the archive, occurs "
                             "twice or unpacks to an absurd size; nnUNetv2_export_model_to_zip writes no such entry.")
        if len(place.parts) <= _DEPTH + 2:
            entries[place] = entry
    return entries


def _damaged(path: Path, error: Exception) -> DonorError:
    return DonorError(f"{path.name} cannot be unpacked ({type(error).__name__}: {error}); export or download it again.")
