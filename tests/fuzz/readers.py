"""Every reader of the package."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnunet_dante.adapters import adapter
from nnunet_dante.adapters.merge import merge
from nnunet_dante.benchmark.protocol import planned_runs, read_protocol
from nnunet_dante.benchmark.run import _shots
from nnunet_dante.command.inspect import inspect_path
from nnunet_dante.command.strength import set_strength
from nnunet_dante.compare.results import read_results
from nnunet_dante.compare.sources import read_fold
from nnunet_dante.compare.training_log import training_facts
from nnunet_dante.dafne.importer import describe, import_model
from nnunet_dante.dafne.model_file import open_model
from nnunet_dante.dafne.settings import settings_for
from nnunet_dante.dafne.sources import sources
from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.datasets.orientation import training_orientation
from nnunet_dante.datasets.shots import read_cases, read_groups
from nnunet_dante.errors import DanteError
from nnunet_dante.models.checkpoint import file_sha256, load_checkpoint_safely
from nnunet_dante.models.donor import open_donor
from nnunet_dante.models.network import build_network
from nnunet_dante.models.settings import read_dante_block
from nnunet_dante.training.provenance import load_start_weights
from nnunet_dante.transfers.transfer import fit, transfer

from . import crafted, hostile
from .mutations import damaged_entry
from .reader import Place, Reader, digest
from .samples import DATASET, FOLDERS, MODEL


def _use(path: Path) -> str:
    """Open as a donor, fit it to the target, describe it for Dafne."""
    donor = open_donor(path)
    assert all(torch.isfinite(tensor).all() for tensor in donor.weights.values())
    inspect_path(path)
    target = open_target(DATASET)
    plans, _, weights, _ = fit(donor, target, num_processes=1)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    json.dumps(plans).encode()
    lies = training_orientation(donor, path)
    sources(settings_for(donor, orientation=lies.codes, as_shown=lies.as_shown, mirroring=True, tile_step=0.5))
    return digest([donor.weights, donor.plans, donor.dataset_json, donor.mirroring_axes, donor.fold, donor.trainer_name])


def _read_adapter(place: Place) -> str:
    path = place.case / "adapter.safetensors"
    adapter.info(path)
    adapter.apply(place.samples / "checkpoint.pth", path, place.out / "merged.pth")
    return digest(load_checkpoint_safely(place.out / "merged.pth"))


def _read_merge(place: Place) -> str:
    adapters = place.case / "adapter.safetensors", place.samples / "adapter.safetensors"
    merge(adapters, place.out / "sum.safetensors", base=place.samples / "checkpoint.pth")
    return digest(adapter.read_adapter(place.out / "sum.safetensors"))


def _read_strength(place: Place) -> str:
    fold = place.case / "nnUNetTrainerLoRA__nnUNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    final = Path(shutil.copy(place.case / "trained.pth", fold / "checkpoint_final.pth"))
    set_strength(fold, 0.25)
    return digest(load_checkpoint_safely(final))


def _read_trained(place: Place) -> str:
    adapter.extract(place.case / "trained.pth", place.out / "a.safetensors")
    return digest(adapter.read_adapter(place.out / "a.safetensors"))


def _read_base(place: Place) -> str:
    adapter.remove(place.case / "trained.pth", place.out / "base.pth")
    return digest(load_checkpoint_safely(place.out / "base.pth"))


def _read_dafne(place: Place) -> str:
    path = place.case / "Liver.model"
    with contextlib.suppress(DanteError):  # that of import counts: it leaves nothing behind
        inspect_path(path)
        describe(path)
    model = open_model(path)
    report = import_model(path, place.out / "model")
    str(report)
    assert all(torch.isfinite(tensor).all() for tensor in model.weights.values())
    return digest(open_donor(place.out / "model").weights)


def _without_extraction(self: Any, overwrite_existing: bool = False) -> None:
    """nnU-Net starts processes to measure the images; here the answer is known."""
    Path(os.environ[FOLDERS[1]], DATASET, "dataset_fingerprint.json").write_text(json.dumps({
        "spacings": [[1.0, 1.0, 1.0]] * 2, "shapes_after_crop": [[12, 12, 12]] * 2, "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {str(i): {"mean": 0.5, "std": 0.5} for i in range(5)}}))


def _find_data(root: Path) -> None:
    os.environ |= {name: str(root / name) for name in FOLDERS}


def _read_shots(place: Place) -> str:
    _find_data(place.case)
    protocol = read_protocol(place.samples / "protocol.toml")
    shots = _shots(DATASET)
    return digest([str(run) for run in planned_runs(protocol, {"one": shots})])


def _read_fold(place: Place) -> str:
    _find_data(place.case / "folds")
    return str(read_fold(next((place.case / "folds" / "nnUNet_results").glob("*/*/fold_0"))))


def _read_start(place: Place) -> str:
    plans, file = json.loads((place.samples / "plans.json").read_text()), place.case / "start.pth"
    network = build_network(plans, json.loads((place.samples / "nnUNet_raw" / DATASET / "dataset.json").read_text()),
                            "3d_fullres")
    load_start_weights(network, place.case, {"file": file.name, "sha256": file_sha256(file),
                                             "donor": {"trainer": "nnUNetTrainer"}})
    assert all(torch.isfinite(tensor).all() for tensor in network.state_dict().values())
    return digest(network.state_dict())


def _read_peft(place: Place) -> str:
    folder = place.case / "peft"
    adapter.apply(place.samples / "checkpoint.pth", folder, place.out / "merged.pth")
    return digest(load_checkpoint_safely(place.out / "merged.pth"))


def _read_target(place: Place) -> None:
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    DatasetFingerprintExtractor.run = _without_extraction
    _find_data(place.case)
    folder = place.case / "nnUNet_preprocessed" / DATASET
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    try:
        transfer(place.samples / "models" / MODEL, DATASET, num_processes=1)
    except Exception:
        after = {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.startswith("dataset_fingerprint")}
        if after != {name: content for name, content in before.items() if not name.startswith("dataset_fingerprint")}:
            (place.out / "half-written").touch()
        raise


def _log(place: Place) -> None:
    facts = training_facts({"logging": json.loads((place.case / "logging.json").read_text())})
    assert all(isinstance(value, float) for name in ("curve", "seconds") for value in facts[name])


def _inspect(place: Place) -> None:
    file = next(place.case.iterdir())
    text = inspect_path(file)
    assert all(c.isprintable() or c == "\n" for c in text)


def _in(name: str, read: Callable[[Path], Any]) -> Callable[[Place], str | None]:
    return lambda place: digest(read(place.case / name))


READERS = (
    Reader(name="checkpoint, bytes", make=hostile.in_bytes("checkpoint.pth"), read=_in("checkpoint.pth", load_checkpoint_safely),
           attacks=hostile.checkpoint_attacks("checkpoint.pth"), exact=True),
    Reader(name="checkpoint, entries", make=hostile.in_bytes("checkpoint.pth", damaged_entry), read=_in("checkpoint.pth", _use)),
    Reader(name="checkpoint, content", make=hostile.in_content("checkpoint.pth"), read=_in("checkpoint.pth", _use),
           attacks=hostile.checkpoint_attacks("checkpoint.pth")),
    Reader(name="checkpoint, old format", make=hostile.in_bytes("old.pth"), read=_in("old.pth", _use)),
    Reader(name="checkpoint with adapter", make=hostile.in_content("trained.pth"), read=_read_trained,
           attacks=hostile.checkpoint_attacks("trained.pth")),
    Reader(name="base of a checkpoint", make=hostile.in_content("trained.pth"), read=_read_base,
           attacks=hostile.checkpoint_attacks("trained.pth")),
    Reader(name="zip of a model, bytes", make=hostile.in_bytes("model.zip"), read=_in("model.zip", _use), exact=True,
           attacks=lambda place: hostile.files(place, crafted.archives(place.canary), "model.zip")),
    Reader(name="zip of a model, entries", make=hostile.in_bytes("model.zip", damaged_entry), read=_in("model.zip", _use)),
    Reader(name="plans.json of a donor", make=hostile.in_model("plans.json"), read=_in("model", _use), attacks=hostile.plans_attacks),
    Reader(name="dataset.json of a donor", make=hostile.in_model("dataset.json"), read=_in("model", _use),
           attacks=lambda place: hostile.model_texts(place, "dataset.json")),
    Reader(name="adapter, bytes", make=hostile.in_bytes("adapter.safetensors"), read=_read_adapter, exact=True),
    Reader(name="adapter, content", make=hostile.adapter_content, read=_read_adapter, attacks=hostile.adapter_texts),
    Reader(name="adapter merge", make=hostile.adapter_content, read=_read_merge, attacks=hostile.adapter_texts),
    Reader(name="strength of a checkpoint", make=hostile.in_content("trained.pth"), read=_read_strength,
           attacks=hostile.checkpoint_attacks("trained.pth")),
    Reader(name="PEFT folder", make=hostile.peft, read=_read_peft, attacks=hostile.peft_attacks),
    Reader(name="Dafne model, bytes", make=hostile.in_bytes("Liver.model"), read=_read_dafne),
    Reader(name="Dafne model, content", make=hostile.dafne_content, read=_read_dafne, attacks=hostile.dafne_attacks),
    Reader(name="inspect", make=hostile.anything, read=_inspect, attacks=hostile.checkpoint_attacks("checkpoint.pth")),
    Reader(name="inspect, PEFT folder", make=hostile.peft, read=_inspect, attacks=hostile.peft_attacks),
    Reader(name="inspect, zip", make=hostile.in_bytes("model.zip", damaged_entry), read=_inspect,
           attacks=lambda place: hostile.files(place, crafted.archives(place.canary), "model.zip")),
    Reader(name="inspect, plans.json", make=lambda p, rng: (p.case / "plans.json").write_text(
        hostile.json_of(p.samples / "plans.json", rng)), read=_inspect, attacks=lambda place: hostile.texts(place, "plans.json")),
    Reader(name="inspect, Dafne model", make=hostile.dafne_content, read=_inspect, attacks=hostile.dafne_attacks),
    Reader(name="inspect, adapter", make=hostile.adapter_content, read=_inspect, attacks=hostile.adapter_texts),
    Reader(name="target data set", make=hostile.target, read=_read_target, attacks=hostile.target_attacks),
    Reader(name="images of the target", make=hostile.images, read=_read_target, attacks=hostile.image_attacks),
    Reader(name="start weights", make=hostile.in_content("start.pth"), read=_read_start,
           attacks=hostile.checkpoint_attacks("start.pth")),
    Reader(name="plans of a training", make=lambda p, rng: (p.case / "plans.json").write_text(
        hostile.json_of(p.samples / "plans.json", rng)), read=_in("plans.json", lambda f: read_dante_block(
            json.loads(f.read_text())) and None)),
    Reader(name="shots.json", make=hostile.shots, read=_read_shots, attacks=hostile.shots_attacks),
    Reader(name="finished fold", make=hostile.fold, read=_read_fold, attacks=hostile.fold_attacks),
    Reader(name="groups.csv", make=hostile.in_bytes("groups.csv"), read=_in("groups.csv", read_groups),
           attacks=lambda place: hostile.texts(place, "groups.csv")),
    Reader(name="groups.json", make=hostile.in_bytes("groups.json"), read=_in("groups.json", read_groups),
           attacks=lambda place: hostile.texts(place, "groups.json")),
    Reader(name="cases.json", make=hostile.in_bytes("cases.json"), read=_in("cases.json", read_cases),
           attacks=lambda place: hostile.texts(place, "cases.json")),
    Reader(name="result of a run", make=lambda p, rng: (p.case / "result.json").write_text(
        hostile.json_of(p.samples / "result.json", rng)), read=_in("result.json", lambda f: str(read_results(f))),
        attacks=lambda place: hostile.texts(place, "result.json")),
    Reader(name="protocol", make=hostile.in_bytes("protocol.toml"), read=_in("protocol.toml", lambda f: str(read_protocol(f))),
           attacks=lambda place: hostile.texts(place, "protocol.toml")),
    Reader(name="training log", make=lambda p, rng: (p.case / "logging.json").write_text(
        hostile.json_of(p.samples / "logging.json", rng)), read=_log),
)
