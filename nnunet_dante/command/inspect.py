"""Say what a file or folder holds, executing nothing in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.hf_peft import CONFIG
from ..errors import DafneError, DanteError, DonorError, UntrustedFileError
from ..files import printable, read_json
from ..models.archive import V1_ADVICE, find_models, is_archive, is_v1_content, is_v1_model, unpack
from ..models.checkpoint import file_sha256, load_checkpoint_safely, unique_tensors, weights_of, weights_sha256
from ..models.encoder import adaptation_plan
from ..models.installed import find_donor
from ..models.labels import channel_names, has_regions, head_names
from ..models.torch_file import foreign_names
from ..peft.added_modules import is_added
from ..types import PathLike, ReadOnlyStateDict

_INDENT = "    "
_NOT_SHOWN = ("format", "version", "adapter", "penalty", "random_state")  # the last three hold tensors


def inspect_path(path: PathLike) -> str:
    """Describe a model or PEFT folder, exported zip, checkpoint, start weights, adapter, plans.json or .model file.

    Raises:
        DonorError: there is nothing at `path`, or it is none of these. A file that would execute code is described
            as unsafe, not refused.
    """
    path = find_donor(path)
    try:
        return printable(_described(path))
    except DanteError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes these descriptions stumble over
        raise DonorError(f"{path.name} is damaged: it cannot be described ({type(error).__name__}: {error}). Copy or "
                         "download it again and compare its size.") from error


def _described(path: Path) -> str:
    if path.is_dir() and (path / CONFIG).is_file():
        from ..adapters.adapter import info

        return info(path)
    if path.is_dir():
        return _text(_models(path, path))
    if not path.is_file():
        raise DonorError(f"{path} does not exist; give a model folder, zip, .pth, .safetensors, .json or .model.")
    if is_v1_model(path):
        return f"{path.name}: {V1_ADVICE}"
    if path.suffix == ".model":
        from ..dafne.importer import describe

        try:
            return describe(path)
        except DafneError:
            with suppress(DonorError):
                if is_v1_content(load_checkpoint_safely(path)):
                    return f"{path.name}: {V1_ADVICE}"
            raise
    if path.suffix == ".safetensors":
        from ..adapters.adapter import info

        return info(path)
    if path.suffix == ".json":
        return _text(_json(path))
    if is_archive(path):
        with tempfile.TemporaryDirectory() as temporary:
            unpack(path, Path(temporary))
            return _text(_models(path, Path(temporary)))
    return _text(_checkpoint(path))


def _text(lines: Iterator[str]) -> str:
    return "\n".join(line.replace("\n", "\\n") for line in lines)


def _models(path: Path, root: Path) -> Iterator[str]:
    """Describe the models in a folder or zip, whose plans.json and dataset.json lie below `root`."""
    models = find_models(path)
    if not models and path.resolve().name.startswith("fold_") and (path.resolve().parent / "plans.json").is_file():
        raise DonorError(f"{path.resolve().name} is one fold of a model; give the folder above it, "
                         f"{path.resolve().parent}, or a checkpoint in it.")
    if not models:
        raise DonorError(f"{path.resolve().name} holds no plans.json, so it holds no nnU-Net model "
                         "(TRAINER__PLANS__CONFIGURATION).")
    if path.is_file():
        yield f"Zip with nnU-Net models, {path.stat().st_size / 2**20:.1f} MiB, sha256 {file_sha256(path)}"
    for model in models:
        yield f"nnU-Net model folder {model.folder if model.folder.name else model.name}"
        yield from _model(root / model.folder)
        for file, size in model.weights.items():
            yield f"  {file.relative_to(model.folder)}: {size / 2**20:.1f} MiB"


def _model(folder: Path) -> Iterator[str]:
    for name, describe in (("plans.json", _plans), ("dataset.json", _dataset)):
        if not (folder / name).is_file():
            yield f"  {name}: not there; a checkpoint of nnU-Net's own training says the same"
            continue
        try:
            yield from describe(read_json(folder / name))
        except Exception as error:  # damage in one file must not hide the rest
            yield f"  {name}: cannot be read ({type(error).__name__}: {error})"


def _json(path: Path) -> Iterator[str]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DonorError(f"{path.name} is no JSON that can be read: {error}") from error
    if isinstance(content, dict) and "configurations" in content:
        yield f"nnU-Net plans {path.name}"
        yield from _plans(content)
    elif isinstance(content, dict) and "labels" in content:
        yield f"nnU-Net {path.name}"
        yield from _dataset(content)
    else:
        raise DonorError(f"{path.name} is JSON, but neither nnU-Net plans (configurations) nor dataset.json (labels).")


def _plans(plans: dict[str, Any]) -> Iterator[str]:
    yield (f"  plans {plans.get('plans_name')} for {plans.get('dataset_name')}, reader "
           f"{plans.get('image_reader_writer')}, axes {plans.get('transpose_forward')}")
    for name, config in plans["configurations"].items():
        network = config.get("architecture", {}).get("network_class_name", config.get("UNet_class_name"))
        details = [f"{key} {config[key]}" for key in ("inherits_from", "previous_stage", "spacing", "patch_size",
                                                      "batch_size", "normalization_schemes") if key in config]
        yield f"  {name}: {'; '.join([*([network.split('.')[-1]] if network else []), *details])}"
    yield from _provenance(plans.get("dante"))


def _dataset(content: dict[str, Any]) -> Iterator[str]:
    yield f"  channels: {', '.join(channel_names(content))}"
    yield f"  {'regions' if has_regions(content) else 'labels'}: {', '.join(head_names(content))}"


def _checkpoint(path: Path) -> Iterator[str]:
    yield f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB, sha256 {file_sha256(path)}"
    try:
        content = load_checkpoint_safely(path)
    except UntrustedFileError:
        yield "  UNSAFE: reading it would execute code, so nothing was read. It asks for:"
        with path.open("rb") as stream:
            yield from (f"    {name}" for name in foreign_names(stream))
        return
    if is_v1_content(content):
        yield f"  {V1_ADVICE}"
        return
    weights, init, block = weights_of(content), content.get("init_args"), content.get("dante")
    if weights is None and not isinstance(init, dict):
        raise DonorError(f"{path.name} holds no network_weights, only {sorted(map(str, content))[:8]}; it is no "
                         "nnU-Net checkpoint.")
    yield f"  {_kind(weights, init, block)}"
    if (plan := adaptation_plan(content, path.name)) is not None:
        yield (f"  encoder of a training with nnssl ({plan.architecture_plans.arch_class_name}), without a decoder "
               "that segments: `nnunet-dante transfer` makes it the start of a training")
    if weights is not None:
        unique = unique_tensors(weights)
        yield (f"  weights: {sum(t.numel() for t in unique.values()):,} numbers in {len(unique)} tensors "
               f"({len(weights)} keys), sha256 {weights_sha256(weights)}")
        yield from _added_modules(unique, content)
    if isinstance(init, dict):
        axes = content.get("inference_allowed_mirroring_axes", "unknown") or "none"
        yield (f"  trainer {content.get('trainer_name')}, configuration {init.get('configuration')}, fold "
               f"{init.get('fold')}, epoch {content.get('current_epoch')}, mirroring axes {axes}")
        for key, describe in (("plans", _plans), ("dataset_json", _dataset)):
            yield from describe(init[key]) if isinstance(init.get(key), dict) else ()
    yield from _provenance(block)


def _kind(weights: ReadOnlyStateDict | None, init: object, block: object) -> str:
    if weights is None:
        return "facts about an nnU-Net without its weights, which a bundle of MONAI keeps in fold_*/model.pt"
    if init is not None:
        return f"nnU-Net checkpoint{', trained with nnunet_dante' if block else ''}"
    return "start weights of a transfer" if block else (
        "weights alone: as a donor it needs plans.json and dataset.json beside it, or in the folder above")


def _added_modules(weights: ReadOnlyStateDict, content: dict[str, Any]) -> Iterator[str]:
    """What no stock network has, and which trainer builds the network that has it."""
    added = [key for key in weights if is_added(key)]
    if not added:
        return
    trainer = content.get("trainer_name")
    if trainer is None:  # start weights: the donor's
        trainer = content.get("dante", {}).get("donor", {}).get("trainer")
    yield (f"  NOT a stock network: {sum(weights[key].numel() for key in added):,} of these numbers, in {len(added)} "
           f"tensors, are modules that {trainer} added, such as {added[0]}")
    yield (f"  only {trainer} can train it further, and nnU-Net predicts with it where it finds that trainer: install "
           f'nnunet-dante there and run eval "$(nnunet-dante env)" first')


def _provenance(block: object) -> Iterator[str]:
    """Numbers and names of a "dante" block of plans, start weights or checkpoint; tensors are left out."""
    if not isinstance(block, dict):
        return
    yield f"  nnunet_dante {block.get('version')}:"
    shown = {k: v for k, v in block.items() if k not in _NOT_SHOWN}
    if isinstance(shown.get("strength"), dict):
        shown["strength"] = {k: v for k, v in shown["strength"].items() if k != "trained"}  # tensors
    yield from _nested(shown, _INDENT)
    if isinstance(block.get("adapter"), dict):
        yield f"{_INDENT}adapter: low-rank factors included (nnunet-dante adapter extract)"


def _nested(content: dict[str, Any], indent: str, *, absent: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _nested(value, indent + "  ", absent="new" if key in ("label_map", "channel_map") else "")
        elif value is None and absent:
            yield f"{indent}{key}: {absent}"
        elif not isinstance(value, Tensor) and value not in (None, {}, []):
            yield f"{indent}{key}: {value}"
