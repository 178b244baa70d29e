"""Checks of an installation that print what they saw, each by doing the thing rather than asking for versions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ..errors import UnsupportedVersionError
from ..files import NNUNET_FOLDERS
from ..training.launch import VARIABLE, search_path, trainers_folder
from ..versions import PACKAGE, installed, remedy, supported, torchvision_version, unsupported, untested


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, and what was seen or what to do."""

    name: str
    passed: bool
    seen: str


def diagnose() -> Iterator[Check]:
    """Yield the checks in order; a check that raises has failed, and its message says why."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions), ("torchvision", lambda: f"{torchvision_version()} imports"), ("device", _device),
        *((name, lambda name=name: _folder(name)) for name in NNUNET_FOLDERS),
        ("trainer search", _trainer_search), ("gradient audit", _audit)]
    for name, check in checks:
        try:
            yield Check(name, True, check())
        except Exception as error:  # a doctor reports whatever is wrong
            yield Check(name, False, f"{type(error).__name__}: {error}")


def _versions() -> str:
    if wrong := unsupported():
        raise UnsupportedVersionError(f"{'; '.join(wrong.values())}. {remedy(list(wrong))}")
    seen = ", ".join(f"{name} {installed(name) or 'without metadata'}" for name in (
        PACKAGE, "Python", "nnunetv2", "torch", "torchvision", "dynamic-network-architectures", "batchgeneratorsv2"))
    if note := untested():
        seen += f"; note: {note}"
    return seen if supported() else f"{seen}; {PACKAGE} has no metadata to check them by: install it with pip"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda, {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return "mps: train with -device mps"
    return f"cpu only, {torch.get_num_threads()} threads: train with -device cpu"


def _folder(name: str) -> str:
    if name not in os.environ:
        how = f'export {name}="/folder/{name}"'
        if any(other in os.environ for other in NNUNET_FOLDERS):
            raise RuntimeError(f"not set, while another of nnU-Net's three folders is: {how}")
        return f"not set. `adapt`, `predict`, `ui` and `demo` need no folders, the other commands do: {how}"
    folder = Path(os.environ[name])
    if not folder.is_dir():
        raise RuntimeError(f"{folder} does not exist; create it")
    if name != "nnUNet_raw" and not os.access(folder, os.W_OK):
        raise RuntimeError(f"{folder} is not writable")
    return str(folder)


def _trainer_search() -> str:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = search_path()
    try:
        with redirect_stdout(StringIO()):
            trainer = recursive_find_trainer_class_by_name("nnUNetTrainerLoRA")
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
    hint = "set for nnUNetv2_train" if before and str(trainers_folder()) in before.split(os.pathsep) else (
        f"{VARIABLE} is not set in this shell: use `nnunet-dante train`, or eval \"$(nnunet-dante env)\"")
    return (f"nnU-Net finds {trainer.__name__} in {trainers_folder()}; {hint}. nnUNetv2_predict needs it for models of "
            f"nnUNetTrainerSpatialAdapter and nnUNetTrainerAdaptFormer")


def _audit() -> str:
    """Adapt nnU-Net's default 3d network, at a small patch, and check that every factor gets a gradient."""
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import nn

    from ..methods import LoRA
    from ..peft.audit import audit_gradients
    from ..peft.inject import adapted

    network = PlainConvUNet(1, 6, [32, 64, 128, 256, 320, 320], nn.Conv3d, 3, [1, 2, 2, 2, 2, 2], 2, 3, 2, True,
                            nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU,
                            {"inplace": True}, deep_supervision=True)
    method = LoRA()
    method.adapt(network)
    method.plan(network).restrict(network)
    report = audit_gradients(network, torch.rand(1, 1, 64, 64, 64))
    return f"{len(adapted(network))} weights adapted in a default 3d PlainConvUNet. {report}"
