"""Turn a `.model` file back into an nnU-Net model folder, or describe it. No code of the file is executed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import ConfigurationError, DafneError
from ..files import write_text_atomically
from ..models.checkpoint import save_atomically, weights_sha256
from ..models.network import build_network, differences, network_aliases
from ..models.trusted_plans import check_donor
from ..types import PathLike, StateDict
from . import model_file
from .identity import MUST_AGREE, structure_id
from .settings import FORMAT


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What `import_model` wrote. `str(report)` is the text that the command prints."""

    folder: Path
    checkpoint: Path
    model: model_file.Model

    def __str__(self) -> str:
        origin = self.model.settings["origin"]
        predict = f"nnUNetv2_predict_from_modelfolder -m {self.folder} -f {origin['fold']} -i INPUT -o OUTPUT"
        return "\n".join([
            f"Wrote {self.folder} with {self.checkpoint.relative_to(self.folder)}",
            f"  {_when(self.model.timestamp)}, model_id {self.model.model_id}",
            f"  configuration {origin['configuration']}, labels: {_labels(self.model.settings)}",
            f"  predict: {predict}{_needs(origin)}",
            f"  fine-tune: nnunet-dante transfer {self.folder} -d DATASET"])


def import_model(source: PathLike, output_folder: PathLike) -> ImportReport:
    """Write a .model file as a model folder: plans.json, dataset.json and fold_X/checkpoint_final.pth, as nnU-Net does.

    Args:
        source: a file that `export_model` wrote, also after any number of rounds of learning and merging in Dafne.
        output_folder: a folder that is empty or does not exist.

    Raises:
        UntrustedFileError: reading the whole file would execute code.
        DafneError: another program wrote the file, its weights do not fit its network, or `output_folder` is not empty.
    """
    folder, model = Path(output_folder).expanduser(), model_file.open_model(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DafneError(f"The output folder {folder} is not empty; give a new one.")
    origin = _origin(model, Path(source).name)
    dataset_json, configuration, axes = origin["dataset_json"], origin["configuration"], origin["mirroring_axes"]
    weights = _stock_weights(model, origin, Path(source).name)
    plans = origin["plans"] | {"dafne": {"model_id": model.model_id, "structure": structure_id(model.settings)}}
    checkpoint = folder / f"fold_{origin['fold']}" / "checkpoint_final.pth"
    save_atomically({
        "network_weights": weights, "optimizer_state": {"state": {}, "param_groups": []}, "grad_scaler_state": None,
        "logging": {}, "_best_ema": None, "current_epoch": 0,
        "init_args": {"plans": plans, "configuration": configuration, "fold": _fold(origin["fold"]),
                      "dataset_json": dataset_json, "device": torch.device("cpu")},
        "trainer_name": origin["trainer"],
        **({} if axes is None else {"inference_allowed_mirroring_axes": tuple(axes) or None})}, checkpoint)
    write_text_atomically(json.dumps(dataset_json, indent=4), folder / "dataset.json")
    write_text_atomically(json.dumps(plans, indent=4), folder / "plans.json")
    return ImportReport(folder=folder, checkpoint=checkpoint, model=model)


def _needs(origin: dict[str, Any]) -> str:
    trainer = origin["trainer"]
    return "" if trainer == "nnUNetTrainer" else f"\n    it needs {trainer}: run eval \"$(nnunet-dante env)\" before"


def _fold(fold: str) -> int | str:
    return int(fold) if fold.isdigit() else fold


def _origin(model: model_file.Model, name: str) -> dict[str, Any]:
    settings, origin = model.settings, model.settings.get("origin")
    if settings.get("format") != FORMAT:
        raise DafneError(f"{name} has format {settings.get('format')!r}; this version ({__version__}) reads "
                         f"format {FORMAT}. Install a newer nnunet-dante.")
    valid: dict[str, Callable[[Any], bool]] = {
        "plans": lambda v: isinstance(v, dict), "dataset_json": lambda v: isinstance(v, dict),
        "configuration": lambda v: isinstance(v, str), "trainer": lambda v: isinstance(v, str),
        "fold": lambda v: isinstance(v, str) and bool(re.fullmatch(r"all|\d{1,4}", v)),  # a folder is named after it
        "mirroring_axes": lambda v: v is None or isinstance(v, list) and all(
            axis in range(3 if settings.get("dimension") == 3 else 2) for axis in v)}
    wrong = [key for key, holds in valid.items() if not isinstance(origin, dict) or key not in origin
             or not holds(origin[key])]
    wrong += [key for key in MUST_AGREE if key not in settings]
    labels = settings.get("labels")
    if not isinstance(labels, list) or not all(isinstance(v, dict) and isinstance(v.get("name"), str) for v in labels):
        wrong.append("labels")
    if wrong or not isinstance(origin, dict):
        raise DafneError(f"The description of the network in {name} is damaged: {', '.join(wrong)} missing or wrong. "
                         "Copy or download it again and compare its size.")
    return origin


def _stock_weights(model: model_file.Model, origin: dict[str, Any], name: str) -> StateDict:
    try:
        check_donor(origin["plans"], origin["dataset_json"], origin["configuration"])
        with torch.device("meta"):  # the numbers come from the file, so none are needed here
            network = build_network(origin["plans"], origin["dataset_json"], origin["configuration"],
                                    trainer_name=origin["trainer"])
    except ConfigurationError as error:
        raise DafneError(f"The network of {name} cannot be built: {error}") from error
    expected = network.state_dict()
    sets = network_aliases(network)
    if found := differences(model.weights, {key: expected[key] for key in sets}):
        raise DafneError(f"The weights of {name} do not fit its network ({len(found)} differences; first: "
                         f"{found[0]}). The file was edited; get the original.")
    tensors = {alias: model.weights[key].to(expected[key].dtype) for key, aliases in sets.items() for alias in aliases}
    return {key: tensors[key] for key in expected}


def describe(path: PathLike) -> str:
    """Return a description of a .model file, whichever program wrote it.

    Raises:
        DafneError: the file is missing, damaged or no .model file.
    """
    path = Path(path)
    content, foreign = model_file.read(path)
    metadata = content.get("metadata") if isinstance(content.get("metadata"), dict) else {}
    lines = [f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB, Dafne model, "
             f"{_when(content.get('timestamp_id'))}, model_id {content['model_id']}"]
    if foreign:
        lines += ["  UNSAFE: reading the whole file would execute more than its functions (nothing was executed). "
                  "It asks for:", *(f"    {name}" for name in foreign[:10])]
    if kind := model_file.kind_of(content, foreign):
        lines += [f"  {kind}; `nnunet-dante import` cannot read it", *_shown(metadata or {})]
        return "\n".join(lines)
    settings, weights = model_file.settings_of(str(content["init_model_function"])), content.get("weights") or {}
    origin, how = settings["origin"], settings["learning"]
    lines += [
        f"  written by nnunet-dante {settings['version']} from {origin['donor']['source']}, "
        f"{origin['configuration']} of {origin['donor']['dataset']}",
        *_kept(origin["donor"]),
        *([f"  network of {trainer}, which nnU-Net needs to find"] if (trainer := origin["trainer"]) != "nnUNetTrainer"
          else []),
        f"  {settings['dimension']}D, contrasts: {', '.join(settings['channels'])}; labels: {_labels(settings)}",
        f"  weights: {sum(t.numel() for t in weights.values()):,} numbers in {len(weights)} tensors, sha256 "
        f"{weights_sha256(weights)}",
        f"  orientation {'as shown' if settings['as_shown'] else settings['orientation']}, patch {settings['patch']}, "
        f"spacing {settings['spacing_mm']} mm, mirroring {settings['mirroring'] or 'off'}, tile step "
        f"{settings['tile_step']}",
        f"  learning: rank {how['rank']}, {how['epochs']} epochs, protection {how['protection']}",
        *_shown(metadata or {})]
    if content.get("is_delta"):
        lines.append("  holds the difference between two models; Dafne can add it to its base")
    return "\n".join(lines)


def _kept(donor: dict[str, Any]) -> list[str]:
    """Return lines about the strength of the exported training and the adapters that were summed up in it."""
    lines = [f"  strength {donor['strength']}, where 1 is all that its training learned"] if "strength" in donor else []
    return [*lines, *(f"  sum of {source}" for source in donor.get("sum_of", ()))]


def _labels(settings: dict[str, Any]) -> str:
    return ", ".join(label["name"] for label in settings["labels"])


def _when(timestamp: Any) -> str:
    if not isinstance(timestamp, int) or not 0 < timestamp < 1 << 33:
        return f"timestamp {timestamp!r}"
    return f"version {timestamp} ({datetime.fromtimestamp(timestamp, timezone.utc):%Y-%m-%d %H:%M} UTC)"


def _shown(metadata: dict[str, Any]) -> list[str]:
    info = metadata.get("info")
    shown = {"categories": metadata.get("categories"), **(info if isinstance(info, dict) else {})}
    return [f"    {key}: {value}" for key, value in shown.items() if isinstance(value, (str, list))]
