"""The pretrained model: read from a model folder, an exported zip or a bare checkpoint, and checked."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, DonorError
from ..files import MAX_JSON_BYTES, read_json
from ..types import DatasetJson, PathLike, Plans, StateDict
from .checkpoint import file_sha256, load_checkpoint_safely, not_finite
from .network import build_network, differences, network_aliases
from .trusted_plans import check_donor

_MAX_INFLATION = 100  # weights compress to about 0.9 of their size; a hundredfold is an attack, not a model
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True, kw_only=True)
class Donor:
    """A pretrained nnU-Net whose weights are known to fit its plans.

    weights: full stock state dict, float32, with the network's own aliases. mirroring_axes: spatial axes along which
    images were mirrored, () for none, None if the checkpoint does not say. network_trainer: the nnU-Net trainer that
    builds this network ("nnUNetTrainer" unless the trainer replaces the architecture of the plans). trust: the plans
    may name code of any package, as the user said.
    """

    source: str
    plans: Plans
    dataset_json: DatasetJson
    configuration: str
    weights: StateDict
    mirroring_axes: tuple[int, ...] | None
    trainer_name: str
    fold: str
    checkpoint_name: str
    sha256: str
    network_trainer: str = "nnUNetTrainer"
    trust: bool = False

    @property
    def dataset_name(self) -> str:
        """The data set the donor was trained on."""
        return str(self.plans.get("dataset_name", "unknown"))

    def provenance(self) -> dict[str, str]:
        """Return who the donor is, without weights or paths of this machine, for plans and checkpoints."""
        return {"source": self.source, "sha256": self.sha256, "trainer": self.trainer_name,
                "configuration": self.configuration, "dataset": self.dataset_name, "fold": self.fold,
                "checkpoint": self.checkpoint_name}


def open_donor(source: PathLike, *, configuration: str | None = None, fold: int | str | None = None,
               checkpoint: str = "checkpoint_final.pth", trust: bool = False) -> Donor:
    """Read a model folder, a zip of `nnUNetv2_export_model_to_zip`, or a bare checkpoint.

    A folder or zip may hold several models; `configuration` then chooses. `fold` None takes fold_all, else the lowest.

    Raises:
        DonorError: nothing usable there, or plans and weights disagree.
        ConfigurationError, TransferError: plans or dataset.json lack an entry, or it cannot be used.
        UntrustedFileError: the checkpoint, or building the network of the plans, would execute code that is neither
            nnU-Net's nor torch's, and `trust` is False.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, path.resolve().name, configuration, fold, checkpoint, trust)
    if not path.exists():
        raise DonorError(f"SOURCE {path} does not exist; give an nnU-Net model folder (with plans.json and fold_*), "
                         "a zip from nnUNetv2_export_model_to_zip, or a checkpoint .pth.")
    if unpacks_to_model(path):
        with tempfile.TemporaryDirectory() as temporary:
            unpack(path, Path(temporary), checkpoint=checkpoint)
            return _from_folder(Path(temporary), path.name, configuration, fold, checkpoint, trust)
    content = load_checkpoint_safely(path, trust=trust)
    return _donor(content, path, None, None, path.name, configuration, trust)


def unpacks_to_model(path: Path) -> bool:
    """Whether the file is a zip of files; torch checkpoints are zips too, of one pickle and its tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(PurePosixPath(name).name != "data.pkl" for name in archive.namelist())
    except Exception:  # whatever zipfile raises on no zip, or a damaged one: reading it as a checkpoint says so
        return False


def unpack(path: Path, folder: Path, *, checkpoint: str | None = None) -> None:
    """Copy every plans.json, dataset.json and `checkpoint` of a zip into `folder`, and nothing outside of it.

    Raises:
        DonorError: the zip is damaged, or holds an entry that leaves it, or unpacks to absurdly much.
    """
    left = max(MAX_JSON_BYTES, _MAX_INFLATION * path.stat().st_size)
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = PureWindowsPath(entry.filename)  # knows both slashes and drives
                if name.name not in ("plans.json", "dataset.json", checkpoint) or entry.is_dir():
                    continue
                left -= entry.file_size
                if name.anchor or ".." in name.parts or left < 0:
                    raise DonorError(f"{path.name} holds the entry {entry.filename!r}, which leaves the archive or "
                                     "unpacks to an absurd size; nnUNetv2_export_model_to_zip writes no such entry.")
                target = folder.joinpath(*name.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as stream, target.open("xb") as out:
                    shutil.copyfileobj(stream, out)
    except DonorError:
        raise
    except Exception as error:  # whatever zipfile, its decompressors and the file system raise
        raise DonorError(f"{path.name} cannot be unpacked ({type(error).__name__}: {error}); export or download it "
                         "again.") from error


def _from_folder(root: Path, source: str, configuration: str | None, fold: int | str | None, checkpoint: str,
                 trust: bool) -> Donor:
    model = _model_folder(root, source, configuration)
    fold_folder = _fold_folder(model, fold, checkpoint)
    plans, dataset_json = _read_json(model / "plans.json"), _read_json(model / "dataset.json")
    path = fold_folder / checkpoint
    return _donor(load_checkpoint_safely(path, trust=trust), path, plans, dataset_json, source, configuration, trust)


def _model_folder(root: Path, source: str, configuration: str | None) -> Path:
    if root.name.startswith("fold_") and (root.parent / "plans.json").is_file():
        raise DonorError(f"SOURCE {source} is one fold of a model; give the folder above it and --fold "
                         f"{root.name.removeprefix('fold_')}.")
    depths = ("", "*/", "*/*/")
    found = [p.parent for depth in depths for p in sorted(root.glob(f"{depth}plans.json"))
             if any(p.parent.glob("fold_*"))]
    names = [str(p.relative_to(root)) for p in found]
    if not found:
        raise DonorError(f"SOURCE {source} holds no nnU-Net model: no folder there has a plans.json and a fold_*. Give "
                         "the folder TRAINER__PLANS__CONFIGURATION below nnUNet_results, its zip, or a checkpoint.")
    if len(found) > 1 and configuration is not None:
        found = [p for p in found if p.name.split("__")[-1] == configuration]
    if len(found) != 1:
        raise DonorError(f"SOURCE {source} holds {len(names)} models, {len(found)} of them for configuration "
                         f"{configuration!r}: {', '.join(names)}. Choose with -c, or give one of these folders.")
    return found[0]


def _fold_folder(model: Path, fold: int | str | None, checkpoint: str) -> Path:
    available = sorted((p for p in model.glob("fold_*") if p.is_dir()), key=lambda p: (p.name != "fold_all", p.name))
    usable = [p for p in available if (p / checkpoint).is_file()]
    if fold is not None:
        usable = [p for p in usable if p.name == f"fold_{fold}"]
    if not usable:
        there = [f"{p.name}/{c.name}" for p in available for c in sorted(p.glob("*.pth"))]
        raise DonorError(f"No {checkpoint} in {'any fold' if fold is None else f'fold_{fold}'} of {model.name}; "
                         f"it holds {', '.join(there) or 'no checkpoint'}. Choose with --fold and --checkpoint.")
    return usable[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DonorError(f"{path.name} of the model cannot be read ({error}); the folder or zip must hold the "
                         "plans.json and dataset.json that nnU-Net wrote.") from error
    if not isinstance(content, dict):
        raise DonorError(f"{path.name} of the model holds a {type(content).__name__}, not an object.")
    return content


def _donor(content: dict[str, Any], path: Path, plans: Plans | None, dataset_json: DatasetJson | None, source: str,
           configuration: str | None, trust: bool) -> Donor:
    init, weights = content.get("init_args"), content.get("network_weights")
    if not isinstance(weights, dict) or not weights or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise DonorError(f"{path.name} holds no 'network_weights', only {sorted(map(str, content))[:8]}; "
                         "give a checkpoint of an nnU-Net v2 training.")
    if not isinstance(init, dict) or not {"plans", "configuration", "dataset_json"} <= set(init):
        raise DonorError(f"{path.name} holds weights but no 'init_args' with plans, configuration and dataset_json, so "
                         "its network and labels are unknown. Give the model folder, or a checkpoint of a training.")
    trained_for = str(init["configuration"])
    if configuration is not None and configuration != trained_for:
        raise DonorError(f"{path.name} was trained for configuration {trained_for!r}; -c asks for {configuration!r}. "
                         "A network cannot change its configuration: leave -c out, or choose another model.")
    plans, dataset_json = plans or init["plans"], dataset_json or init["dataset_json"]
    check_donor(plans, dataset_json, trained_for, trust=trust)
    state, builder = _matched(_stock_keys(weights), plans, dataset_json, trained_for,
                              str(content.get("trainer_name")), path.name, trust)
    return Donor(source=source, plans=plans, dataset_json=dataset_json, configuration=trained_for, weights=state,
                 mirroring_axes=_mirroring_axes(content, path.name),
                 trainer_name=str(content.get("trainer_name")), fold=str(init.get("fold")), checkpoint_name=path.name,
                 sha256=file_sha256(path), network_trainer=builder, trust=trust)


def _mirroring_axes(content: dict[str, Any], name: str) -> tuple[int, ...] | None:
    """Return the axes; nnU-Net writes None for a training without mirroring, and a missing entry says nothing."""
    if (key := "inference_allowed_mirroring_axes") not in content:
        return None
    axes = () if content[key] is None else content[key]
    if not (isinstance(axes, (list, tuple)) and all(a in (0, 1, 2) for a in axes)):
        raise DonorError(f"{name} says that the axes {axes!r:.80} may be mirrored; possible are 0, 1 and 2.")
    return tuple(int(a) for a in axes)


def _stock_keys(weights: dict[str, Tensor]) -> StateDict:
    """Strip the prefixes that DDP ("module.") and torch.compile ("_orig_mod.") leave on every key."""
    while prefix := next((w for w in _WRAPPERS if all(key.startswith(w) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _matched(weights: StateDict, plans: Plans, dataset_json: DatasetJson, configuration: str, trainer: str,
             name: str, trust: bool) -> tuple[StateDict, str]:
    """Put the weights into the network they belong to; the plans' own network is tried before the trainer's.

    It is built without memory, so plans that describe a larger one than the weights cannot fill the machine.
    """
    problems: list[str] = []
    for builder in dict.fromkeys(("nnUNetTrainer", trainer)):
        try:
            with torch.device("cpu" if trust else "meta"):  # own architectures may need real numbers to be built
                network = build_network(plans, dataset_json, configuration, trainer_name=builder, trust=trust)
        except ConfigurationError as error:
            problems = problems or [str(error)]
            continue
        expected = network.state_dict()
        if not (found := differences(weights, expected)):
            return _aliased(weights, network_aliases(network), expected, name), builder
        problems = problems or found
    raise DonorError(f"{name} and its plans disagree ({len(problems)} differences; first: {'; '.join(problems[:3])}). "
                     f"Plans: {plans.get('plans_name')!r}, configuration {configuration!r}, trainer {trainer!r}. "
                     "Use the plans.json and dataset.json that belong to this checkpoint.")


def _aliased(weights: StateDict, aliases: dict[str, tuple[str, ...]], expected: StateDict, name: str) -> StateDict:
    state, tensors = StateDict(), {key: weights[key].to(expected[key].dtype).contiguous() for key in aliases}
    if bad := not_finite(tensors.items()):
        raise DonorError(f"{name} holds NaN or infinite numbers in {bad[0]}; the training it comes from diverged.")
    for key, tensor in tensors.items():
        others = aliases[key]
        if unequal := [k for k in others if not torch.equal(weights[k].to(tensor.dtype), tensor)]:
            raise DonorError(f"{name} gives one weight of the network two values: {key} and {unequal[0]} differ. The "
                             "file was edited by a tool that does not know that these are the same; get the original.")
        state |= dict.fromkeys(others, tensor)
    return {key: state[key] for key in expected}
