"""Run nnU-Net's preprocessing for the plans of a transfer, or return the command for it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..datasets.dataset import Target
from ..datasets.fingerprint import is_older
from ..types import Plans


def preprocess(target: Target, plans: Plans, configuration: str, *, num_processes: int | None = None) -> None:
    """Preprocess every case for `configuration` and the other stages of its cascade, and copy the masks.

    nnU-Net's own `preprocess_dataset` takes only the number of a data set, which two data sets may share. Here, the
    same preprocessors are called with the full name.
    """
    manager = PlansManager(plans)
    for name in with_own_data(plans, configuration):
        manager.get_configuration(name).preprocessor_class(verbose=False).run(
            target.name, name, str(plans["plans_name"]), num_processes=num_processes or default_num_processes)
    masks = target.preprocessed / "gt_segmentations"  # nnU-Net's validation reads the truth there
    masks.mkdir(exist_ok=True)
    for name, case in target.cases.items():
        shutil.copy(case.mask, masks / f"{name}{target.dataset_json['file_ending']}")


def preprocess_command(target: Target, plans: Plans, configuration: str) -> str:
    """Return nnU-Net's command for the preprocessing, or what to do if this command cannot find the data set."""
    if target.number is None:
        return (f"the same `nnunet-dante transfer` again, with --preprocess: nnUNetv2_preprocess takes a number, and "
                f"with that of {target.name} it finds another data set, or several")
    return shlex.join(["nnUNetv2_preprocess", "-d", str(target.number), "-plans_name", str(plans["plans_name"]), "-c",
                       *with_own_data(plans, configuration)])


def with_own_data(plans: Plans, configuration: str) -> tuple[str, ...]:
    """Return `configuration` and the other stages of its cascade; of those with the same preprocessed data, one."""
    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    names = [configuration, *filter(None, [config.previous_stage_name]), *(config.next_stage_names or [])]
    return tuple({manager.get_configuration(name).data_identifier: name for name in reversed(names)}.values())[::-1]


def stale_data(target: Target, data: Path, *, same_plans: bool) -> tuple[str, ...]:
    """Return a warning if `data` was preprocessed with other plans, or before an image or mask was changed."""
    if not data.is_dir():
        return ()
    if not same_plans:
        return (f"{data.name} holds data preprocessed with other plans: preprocess again",)
    if is_older(data, target.cases):
        return (f"{data.name} holds data preprocessed before images or masks were changed: preprocess again",)
    return ()
