"""How hostile files are made for the readers: random damage, and crafted attacks by name."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nnunet_dante.dafne import sources

from . import crafted, crafted_images, crafted_plans
from .mutations import changed, damaged, damaged_entry, odd_tensor
from .reader import Make, Place
from .samples import DATASET, FOLDERS, MODEL


def in_bytes(name: str, change: Callable[[bytes, Random], bytes] = damaged) -> Make:
    def make(place: Place, rng: Random) -> None:
        (place.case / name).write_bytes(change((place.samples / name).read_bytes(), rng))
    return make


def in_content(name: str) -> Make:
    """Changes what a checkpoint holds, and saves it as torch does."""
    def make(place: Place, rng: Random) -> None:
        content = torch.load(place.samples / name, weights_only=False)
        part = rng.choice(("init_args", "init_args", "network_weights", "dante", "all"))
        if part in content and part != "all":
            content[part] = changed(content[part], rng, leaf=odd_tensor)
        else:
            content = changed(content, rng, leaf=odd_tensor)
        torch.save(content, place.case / name)
    return make


def json_of(path: Path, rng: Random) -> str:
    return json.dumps(changed(json.loads(path.read_text()), rng))


def files(place: Place, attacks: Iterator[tuple[str, Callable[[Path], bytes]]], name: str) -> dict[str, Callable[[], None]]:
    def write(make: Callable[[Path], bytes]) -> None:
        (place.case / name).write_bytes(make(place.samples))
    return {title: lambda m=make: write(m) for title, make in attacks}


def texts(place: Place, name: str) -> dict[str, Callable[[], None]]:
    return {title: lambda t=text: (place.case / name).write_text(t) for title, text in crafted.texts().items()}


def _model_file(place: Place, name: str, text: str) -> None:
    shutil.copytree(place.samples / "models" / MODEL, place.case / "model")
    (place.case / "model" / name).write_text(text)


def in_model(name: str) -> Make:
    def make(place: Place, rng: Random) -> None:
        _model_file(place, name, json_of(place.samples / "models" / MODEL / name, rng))
    return make


def plans_attacks(place: Place) -> dict[str, Callable[[], None]]:
    def write(change: Callable[[dict], None]) -> None:
        content = json.loads((place.samples / "models" / MODEL / "plans.json").read_text())
        change(content)
        _model_file(place, "plans.json", json.dumps(content))
    return {name: lambda c=change: write(c) for name, change in crafted_plans.plans(place.canary)} | model_texts(place, "plans.json")


def model_texts(place: Place, name: str) -> dict[str, Callable[[], None]]:
    return {title: lambda t=text: _model_file(place, name, t) for title, text in crafted.texts().items()}


def adapter_content(place: Place, rng: Random) -> None:
    tensors = load_file(place.samples / "adapter.safetensors")
    with safe_open(place.samples / "adapter.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["nnunet_dante"])
    del metadata["sha256"]
    if rng.random() < 0.5:
        tensors = {k: v if _is_plain(v) else torch.ones(1) for k, v in changed(tensors, rng, leaf=odd_tensor).items()}
    else:
        metadata = changed(metadata, rng)
    text = json.dumps(metadata)
    save_file({str(k).encode(errors="replace").decode(): v.detach().clone().contiguous() for k, v in tensors.items()},
              place.case / "adapter.safetensors", metadata={"nnunet_dante": text})


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def adapter_texts(place: Place) -> dict[str, Callable[[], None]]:
    tensors = load_file(place.samples / "adapter.safetensors")
    return {title: lambda t=text: save_file(tensors, place.case / "adapter.safetensors", metadata={"nnunet_dante": t})
            for title, text in crafted.texts().items()}


def peft(place: Place, rng: Random) -> None:
    folder = Path(shutil.copytree(place.samples / "peft", place.case / "peft"))
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    kind = rng.randrange(3)
    if kind == 0:
        config.write_text(json_of(config, rng))
    elif kind == 1:
        weights.write_bytes(damaged(weights.read_bytes(), rng))
    else:  # as PEFT itself writes it, without a checksum
        tensors = {k: v for k, v in changed(load_file(weights), rng, leaf=odd_tensor).items() if _is_plain(v)}
        save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, weights)


def peft_attacks(place: Place) -> dict[str, Callable[[], None]]:
    def write(text: str) -> None:
        folder = Path(shutil.copytree(place.samples / "peft", place.case / "peft"))
        (folder / "adapter_config.json").write_text(text)
        weights = folder / "adapter_model.safetensors"
        save_file(load_file(weights), weights)
    config = json.loads((place.samples / "peft" / "adapter_config.json").read_text())
    odd = {"a pattern that takes for ever": {"alpha_pattern": {"(a+)+$": 1, "(.*)*" * 20: 2}}, "rank 10**9": {"r": 10**9},
           "alpha inf": {"lora_alpha": float("inf")}, "alpha text": {"lora_alpha": "os"}, "alpha list": {"lora_alpha": [1]},
           "another method": {"peft_type": "IA3"}, "DoRA": {"use_dora": True}, "pattern 7": {"alpha_pattern": 7},
           "auto_mapping": {"auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"}}}
    return {title: lambda t=text: write(t) for title, text in
            (crafted.texts() | {name: json.dumps(config | value) for name, value in odd.items()}).items()}


def dafne_content(place: Place, rng: Random) -> None:
    with (place.samples / "Liver.model").open("rb") as stream:
        content = pickle.load(stream)
    if rng.random() < 0.6:
        settings = changed(sources.settings_of(content["init_model_function"]), rng)
        content["init_model_function"] = f"# nnunet-dante\ndef f():\n    SETTINGS = {settings!r}\n"
    else:
        content = changed(dict(content), rng, leaf=odd_tensor)
    (place.case / "Liver.model").write_bytes(pickle.dumps(content, protocol=4))


def dafne_attacks(place: Place) -> dict[str, Callable[[], None]]:
    def write(change: Callable[[dict], None]) -> None:
        with (place.samples / "Liver.model").open("rb") as stream:
            content = pickle.load(stream)
        settings = sources.settings_of(content["init_model_function"])
        change(settings)
        content["init_model_function"] = f"# nnunet-dante\ndef f():\n    SETTINGS = {settings!r}\n"
        (place.case / "Liver.model").write_bytes(pickle.dumps(content, protocol=4))
    return (files(place, crafted.models(place.canary), "Liver.model")
            | {f"settings: {name}": lambda c=change: write(c) for name, change in crafted_plans.settings(place.canary)})


def _target_files(place: Place) -> dict[str, Path]:
    for name in FOLDERS:
        shutil.copytree(place.samples / name, place.case / name)
    raw, preprocessed = (place.case / name / DATASET for name in FOLDERS)
    return {"dataset.json": raw / "dataset.json", **{n: preprocessed / n for n in (
        "splits_final.json", "dataset_fingerprint.json", "nnUNetDantePlans.json", "shots.json")}}


def target(place: Place, rng: Random) -> None:
    files = _target_files(place)
    file = files[rng.choice([name for name in files if name != "shots.json"])]
    file.write_text(json_of(file, rng))


def shots(place: Place, rng: Random) -> None:
    file = _target_files(place)["shots.json"]
    file.write_text(json_of(file, rng))


def shots_attacks(place: Place) -> dict[str, Callable[[], None]]:
    def write(text: str) -> None:
        _target_files(place)["shots.json"].write_text(text)
    return {title: lambda t=text: write(t) for title, text in crafted.texts().items()}


def target_attacks(place: Place) -> dict[str, Callable[[], None]]:
    def write(name: str, text: str) -> None:
        _target_files(place)[name].write_text(text)
    names = ("dataset.json", "splits_final.json", "dataset_fingerprint.json", "nnUNetDantePlans.json")
    return {f"{name}: {title}": lambda n=name, t=text: write(n, t) for name in names for title, text in crafted.texts().items()}


def images(place: Place, rng: Random) -> None:
    _target_files(place)
    file = rng.choice(sorted((place.case / "nnUNet_raw").rglob("*.nii.gz")))
    content = file.read_bytes()
    if rng.random() < 0.5:  # behind the compression, too, where no checksum finds it
        file.write_bytes(gzip.compress(damaged(gzip.decompress(content), rng)))
    else:
        file.write_bytes(damaged(content, rng))


def image_attacks(place: Place) -> dict[str, Callable[[], None]]:
    def write(name: str, make: Callable[[bytes], bytes]) -> None:
        _target_files(place)
        file = place.case / "nnUNet_raw" / DATASET / name
        file.write_bytes(make(gzip.decompress(file.read_bytes())))
    return {f"{name}: {title}": lambda n=name, m=make: write(n, m)
            for name in ("imagesTr/case_000_0000.nii.gz", "labelsTr/case_000.nii.gz")
            for title, make in crafted_images.images()}


# A finished training, to be compared

def fold(place: Place, rng: Random) -> None:
    shutil.copytree(place.samples / "folds", place.case / "folds")
    file = rng.choice(sorted(f for f in (place.case / "folds").rglob("*") if f.is_file() and "imagesTr" not in f.parts))
    if file.suffix == ".json":
        file.write_text(json_of(file, rng))
    else:
        file.write_bytes(damaged(file.read_bytes(), rng))


def fold_attacks(place: Place) -> dict[str, Callable[[], None]]:
    def write(name: str, content: bytes) -> None:
        shutil.copytree(place.samples / "folds", place.case / "folds")
        next((place.case / "folds").rglob(name)).write_bytes(content)
    found = {f"{name}: {title}": lambda n=name, t=text: write(n, t.encode()) for title, text in crafted.texts().items()
             for name in ("plans.json", "dataset.json", "debug.json", "splits_final.json", "shots.json")}
    mask = gzip.decompress(next((place.samples / "folds").rglob("validation/case_0.nii.gz")).read_bytes())
    return found | {f"mask: {title}": lambda m=make: write("validation/case_0.nii.gz", m(mask))
                    for title, make in crafted_images.images()} | {
        f"reader {name}": lambda n=name: write("plans.json", json.dumps({"image_reader_writer": n}).encode())
        for name in ("os", "join", "Path", "../x", 7, [], None)}


def anything(place: Place, rng: Random) -> None:
    name = rng.choice(("checkpoint.pth", "old.pth", "trained.pth", "model.zip", "adapter.safetensors", "Liver.model", "plans.json",
                       "dataset.json"))
    source = place.samples / name if (place.samples / name).exists() else place.samples / "models" / MODEL / name
    change = damaged_entry if name in ("checkpoint.pth", "model.zip") and rng.random() < 0.5 else damaged
    (place.case / name).write_bytes(change(source.read_bytes(), rng))


def checkpoint_attacks(name: str) -> Callable[[Place], dict[str, Callable[[], None]]]:
    return lambda place: files(place, crafted.checkpoints(place.canary), name)
