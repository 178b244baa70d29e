"""Write an nnU-Net model as a Dafne `.model` file. The client needs no nnU-Net to run it."""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..datasets.orientation import Orientation, training_orientation
from ..errors import ConfigurationError, DafneError
from ..files import write_text_atomically
from ..models.checkpoint import unique_tensors
from ..models.donor import Donor, open_donor
from ..models.network import differences
from ..types import PathLike, StateDict
from .identity import model_id
from .model_file import TYPE, write
from .payload import geometry, network
from .settings import settings_for
from .sources import sources

_SERVER_NAME = re.compile(r"[A-Za-z0-9() -]+")


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What `export_model` wrote. `str(report)` is the text that the command prints."""

    model: Path
    side_file: Path
    model_id: str
    labels: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"Wrote {self.model} ({self.model.stat().st_size / 2**20:.1f} MiB) and {self.side_file.name}",
                          f"  labels: {', '.join(self.labels)}", f"  model id: {self.model_id}",
                          *(f"  {note}" for note in self.notes)])


def export_model(model_folder: PathLike, output: PathLike, *, fold: int | str | None = None,
                 checkpoint: str = "checkpoint_final.pth", configuration: str | None = None,
                 categories: Sequence[str] | None = None, info: Mapping[str, str] | None = None,
                 base: PathLike | None = None, mirroring: bool = False, tile_step: float = 0.5,
                 orientation: str | None = None, protection: float = 0.0, trust: bool = False) -> ExportReport:
    """Write a model as a Dafne `.model` file, with a NAME.json beside it that Dafne's lists read.

    Args:
        model_folder: a model folder, exported zip or checkpoint.
        output: NAME.model, or an existing folder of Dafne's models; there, the name is made from the data set's.
        fold: which fold of the folder to read, as for `open_donor`.
        checkpoint: file name in that fold.
        configuration: such as "3d_fullres", where the folder holds several.
        trust: read a checkpoint that executes code; only if you know its author.
        categories: paths in Dafne's model browser, such as "Abdomen/Kidney".
        info: texts for the model browser.
        base: a .model file whose model id the new file takes over. Dafne merges only models with the same id.
        mirroring: average the prediction over mirrored images, as nnUNetv2_predict does; 8 times slower in 3D.
        tile_step: distance between neighbouring windows as a share of the patch, above 0 and up to 1; nnU-Net's is 0.5.
        orientation: how the training files are stored, such as "RAS"; None looks it up with `training_orientation`.
        protection: while learning in Dafne, each step pulls the weights back to where they started by this factor
            times the learning rate; 0 switches it off.

    Raises:
        DafneError: the model cannot run in Dafne, or it cannot be merged with `base`.
        DonorError, ConfigurationError: `model_folder` or an option cannot be used.

    Example:
        >>> print(export_model("nnUNetTrainerLoRA__nnUNetDantePlans__3d_fullres", "Liver.model"))  # doctest: +SKIP
    """
    if not 0 < tile_step <= 1:
        raise ConfigurationError(f"The tile step is {tile_step}; it must lie between 0 (excluded) and 1.")
    if not 0 <= protection < float("inf"):
        raise ConfigurationError(f"The protection is {protection}; it must be 0 (none) or larger.")
    donor = open_donor(model_folder, configuration=configuration, fold=fold, checkpoint=checkpoint, trust=trust)
    timestamp = int(time.time())
    target, name = _target(Path(output).expanduser(), donor, timestamp)
    lies = training_orientation(donor, Path(model_folder).expanduser(), codes=orientation)
    settings = settings_for(donor, orientation=lies.codes, as_shown=lies.as_shown, mirroring=mirroring,
                            tile_step=tile_step, protection=protection)
    weights = _weights(donor, settings)
    identity, whose = model_id(donor, settings, base=base)
    metadata = _metadata(name, donor, settings, categories, info)
    write(target, {"type": TYPE, "model_id": identity, "timestamp_id": timestamp, "is_delta": False,
                   "data_dimensionality": settings["dimension"], "metadata": metadata, "weights": weights,
                   **sources(settings)})
    side_file = target.with_name(f"{name}.json")
    write_text_atomically(json.dumps(metadata, indent=4), side_file)
    return ExportReport(model=target, side_file=side_file, model_id=identity,
                        labels=tuple(label["name"] for label in settings["labels"]),
                        notes=(f"merges with models of this id: {whose}", *_notes(name, settings, lies)))


def _target(output: Path, donor: Donor, timestamp: int) -> tuple[Path, str]:
    """Return the path of the .model file and the model's name in Dafne.

    Dafne takes the text before the first underscore as the name, and separates names by commas.
    """
    if output.is_dir():
        dataset = re.sub(r"^Dataset\d+_", "", donor.dataset_name)
        name = re.sub(r"[^A-Za-z0-9()-]+", "-", f"{dataset}-{donor.configuration}").strip("-")
        return output / f"{name}_{timestamp}.model", name
    if output.suffix != ".model":
        raise ConfigurationError(f"The output {output} is neither a file NAME.model nor an existing folder.")
    if bad := sorted(set(output.stem) & set("_,")):
        raise ConfigurationError(f"The name {output.stem!r} holds {' and '.join(map(repr, bad))}, where Dafne ends or "
                                 f"separates names; call it {re.sub('[_,]+', '-', output.stem)}.model, for instance.")
    return output, output.stem


def _weights(donor: Donor, settings: Mapping[str, Any]) -> StateDict:
    """Return each weight once, under its first stock key, which is the key that the shipped network uses."""
    weights = OrderedDict((key, tensor.float().clone()) for key, tensor in unique_tensors(donor.weights).items())
    if wrong := differences(weights, network.build(settings).state_dict()):
        raise DafneError(f"The network of {donor.source} is not the one that Dafne would build ({len(wrong)} "
                         f"differences; first: {wrong[0]}). Only nnU-Net's own PlainConvUNet and ResidualEncoderUNet "
                         "can be exported.")
    return weights


def _metadata(name: str, donor: Donor, settings: Mapping[str, Any], categories: Sequence[str] | None,
              info: Mapping[str, str] | None) -> dict[str, Any]:
    """Return what Dafne's model list and browser show, as plain JSON; anything else breaks the client's model list.

    `orientation` stays empty. Otherwise Dafne would turn the image, but neither its affine nor the masks.
    """
    labels = ", ".join(label["name"] for label in settings["labels"])
    kind = "ResidualEncoderUNet" if settings["architecture"]["residual"] else "PlainConvUNet"
    if (trainer := settings["origin"]["trainer"]) != "nnUNetTrainer":
        kind += f" of {trainer}"
    texts = {"Labels": labels, "Images": ", ".join(settings["channels"]), "Network": f"nnU-Net {kind}",
             "Trained on": donor.dataset_name, "Made with": f"nnunet-dante {__version__}"}
    if plane := _plane(settings):
        texts["Plane"] = plane
    paths = [[part.strip() for part in path.split("/") if part.strip()] for path in categories or ("nnU-Net",)]
    if not all(paths):
        raise ConfigurationError(f"One of the categories {list(categories or ())} is empty; write them like "
                                 "Abdomen/Kidney.")
    return {"model_name": name, "model_type": "nnU-Net", "type": TYPE, "description": f"nnU-Net for {labels}",
            "dimensionality": str(settings["dimension"]), "variants": [""], "categories": paths, "orientation": "",
            "dependencies": {}, "can_incremental_learn": True,
            "info": texts | {str(key): str(value) for key, value in (info or {}).items()}}


def _plane(settings: Mapping[str, Any]) -> str | None:
    """Return the plane in which the client must show a volume, as that of a 2D network's training slices.

    None for 3D networks, and for images that have no planes.
    """
    if settings["dimension"] == 3 or settings["as_shown"]:
        return None
    world, _ = geometry.WORLD[geometry.network_axes(settings)[0]]
    return ("Sagittal", "Coronal", "Axial")[world]


def _mirroring(settings: Mapping[str, Any]) -> str:
    """Say along which axes the model mirrors; those along which it was not trained never are."""
    if not (allowed := settings["origin"]["mirroring_axes"]):
        return "off: the checkpoint does not say along which axes it was trained" if allowed is None \
            else "off, as the model was trained"
    if settings["mirroring"]:
        return f"axes {settings['mirroring']}"
    return f"off (--mirroring is more exact and {2 ** len(allowed)} times slower)"


def _notes(name: str, settings: Mapping[str, Any], lies: Orientation) -> tuple[str, ...]:
    notes = [f"images: {', '.join(settings['channels'])}; {settings['dimension']}D, patch {settings['patch']}",
             f"training files lie {lies.codes}: {lies.known_from}",
             f"mirroring: {_mirroring(settings)}; tile step {settings['tile_step']}",
             f"learning: {settings['learning']['epochs']} epochs, LoRA rank {settings['learning']['rank']}, "
             f"protection {settings['learning']['protection']:g}"]
    if plane := _plane(settings):
        notes.append(f"in Dafne, open volumes as {plane}: this network was trained on such slices")
    if not _SERVER_NAME.fullmatch(name):
        notes.append("a Dafne server accepts only letters, digits, blanks, - and () in names; "
                     f"{name!r} can only be used locally")
    if len(settings["channels"]) > 1:
        notes.append("load the contrasts in the order above and show the first one: Dafne does not pass their names on")
    if any(how["scheme"] == "CTNormalization" for how in settings["normalization"]):
        notes.append("Dafne rescales images with a maximum below 10 or above 10000: check such CTs (docs/dafne.md)")
    return tuple(notes)
