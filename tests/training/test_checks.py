"""`nnunet-dante train` says what is wrong before nnU-Net ends in a traceback."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time

import pytest
import tiny
from click.testing import CliRunner

from nnunet_dante.cli import main
from nnunet_dante.errors import ConfigurationError, UnsupportedVersionError
from nnunet_dante.training import launch
from nnunet_dante.training.checks import check_arguments

GOOD = ("901", "3d_fullres", "0", "-p", "nnUNetDantePlans", "-tr", "nnUNetTrainerLoRA", "-device", "cpu")


@pytest.fixture(autouse=True)
def search_path(monkeypatch):
    monkeypatch.setenv(launch.VARIABLE, launch.search_path())


def given(**changes) -> list[str]:
    """GOOD with other values: dataset, configuration, fold, or an option without its dash; None leaves it out."""
    words = dict(zip(("dataset", "configuration", "fold"), GOOD)) | {"p": GOOD[4], "tr": GOOD[6], "device": GOOD[8]}
    words |= changes
    options = [w for name in words if name not in ("dataset", "configuration", "fold") and words[name] is not None
               for w in (f"-{name}", words[name])]
    return [*options, words["dataset"], words["configuration"], words["fold"]]


def refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        check_arguments(arguments)


def test_what_can_start_is_not_refused(prepared):
    for arguments in (GOOD, given(), given(fold="all"), given(dataset=prepared.dataset), given(tr="nnUNetTrainer"),
                      given(tr="nnUNetTrainer_5epochs"), given(num_gpus="1"), ["-h"], ["901"], [*GOOD, "--c"]):
        check_arguments(arguments)


@pytest.mark.parametrize(("changes", "message"), [
    ({"tr": "nnUNetTrainerLora"}, "no trainer 'nnUNetTrainerLora'. Did you mean nnUNetTrainerLoRA"),
    ({"tr": "nnUNetTrainer_5epoch"}, "Did you mean nnUNetTrainer_5epochs"),
    ({"tr": "nnUnetTrainerLoRA"}, r"Did you mean nnUNetTrainerLoRA\?"), ({"tr": "LoRA"}, r"mean nnUNetTrainerLoRA\?"),
    ({"tr": "nnUNetTrainerFinetuning"}, "Did you mean nnUNetTrainerFineTune"),
    ({"tr": "nnUNetTrainerGradualUnfreeze"}, "Did you mean nnUNetTrainerGradualUnfreezing"),
    ({"p": "nnUNetDantPlans"}, "has no plans 'nnUNetDantPlans'; it has: nnUNetDantePlans. .*transfer MODEL"),
    ({"p": None}, "has no plans 'nnUNetPlans'; it has: nnUNetDantePlans"),
    ({"configuration": "2d", "tr": "nnUNetTrainer"}, "hold no configuration '2d'; they hold 3d_fullres"),
    ({"configuration": "2d"}, "hold start weights for 3d_fullres only.* transfer MODEL -d Dataset901_Tiny -c 2d"),
    ({"fold": "O"}, "fold is 'O'; it must be a number"), ({"dataset": "77"}, "which data set '77' is: Could not find"),
    ({"dataset": "Dataset077_No"}, "holds no Dataset077_No; it holds: Dataset901_Tiny")])
def test_a_wrong_argument_is_named_with_what_there_is(prepared, changes, message):
    refused(given(**changes), message)


def test_data_that_are_older_than_the_images_or_lack_a_case_are_pointed_out(prepared, tmp_path, monkeypatch):
    raw = tmp_path / prepared.dataset
    shutil.copytree(prepared.root / "nnUNet_raw" / prepared.dataset, raw)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert check_arguments(GOOD) == []
    mask = next((raw / "labelsTr").iterdir())
    os.utime(mask, (time.time() + 60,) * 2)
    assert [line.endswith("was preprocessed: preprocess again") for line in check_arguments(GOOD)] == [True]
    os.utime(mask, (0, 0))
    for kind, name in (("imagesTr", "case_new_0000.nii.gz"), ("labelsTr", "case_new.nii.gz")):
        (raw / kind / name).touch()
        os.utime(raw / kind / name, (0, 0))
    assert [line.partition(" of ")[0] for line in check_arguments(GOOD)] == ["nnUNetDantePlans_3d_fullres lacks 1 case"]
    shutil.rmtree(raw)
    assert check_arguments(GOOD) == [], "a training does not need the images"


def test_the_command_shows_the_message_alone(prepared):
    shown = CliRunner().invoke(main, ["train", *given(tr="nnUNetTrainerLora")])
    assert shown.exit_code == 1 and shown.output.startswith("Error: There is no trainer 'nnUNetTrainerLora'")


def test_a_machine_without_gpu_is_told_the_device(prepared, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused(given(device=None), "no CUDA GPU .* add -device cpu")


def test_a_torchvision_of_another_torch_is_named_before_nnunet_finds_no_trainer(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UnsupportedVersionError, match=r"torchvision.*no trainer of this package.*pip install"):
        check_arguments(GOOD)
    check_arguments(given(tr="nnUNetTrainer"))


@pytest.mark.parametrize("name", ["nnUNet_preprocessed", "nnUNet_results"])
def test_an_unset_folder_is_named(prepared, monkeypatch, name):
    monkeypatch.delenv(name)
    refused(given(), f"variable {name} is not set")


def test_plans_of_nnunet_need_start_weights_only_for_trainers_that_use_them(prepared, tmp_path, monkeypatch):
    copy = prepared.copy_to(tmp_path).activate(monkeypatch)
    plans = json.loads((copy.preprocessed / "nnUNetDantePlans.json").read_text())
    del plans["dante"]
    (copy.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    refused(given(p=None), "'nnUNetPlans' hold start weights for no configuration. .*nnUNetDantePlans, nnUNetPlans")
    for arguments in (given(p=None, tr="nnUNetTrainerFromScratch"), given(p=None, pretrained_weights="w.pth"),
                      [*given(p=None), "--val"]):
        check_arguments(arguments)
    shutil.rmtree(copy.preprocessed / "nnUNetDantePlans_3d_fullres")
    refused(given(), "no preprocessed cases. Run `nnUNetv2_preprocess -d Dataset901_Tiny -plans_name nnUNetDantePlans")


def test_the_second_stage_of_a_cascade_needs_a_prediction_of_every_case(prepared, tmp_path, monkeypatch):
    copy = prepared.copy_to(tmp_path).activate(monkeypatch)
    file = copy.preprocessed / "nnUNetDantePlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"] |= {"3d_lowres": tiny.plans("D")["configurations"]["3d_lowres"], "3d_cascade_fullres": {
        "inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}}
    plans["dante"]["start_weights"]["3d_cascade_fullres"] = plans["dante"]["start_weights"]["3d_fullres"]
    file.write_text(json.dumps(plans))
    made = tmp_path / "nnUNet_results" / copy.dataset / "nnUNetTrainerLoRA__nnUNetDantePlans__3d_lowres" / \
        "predicted_next_stage" / "3d_cascade_fullres"
    made.mkdir(parents=True)
    cases = [f"case_{n:03d}" for n in range(5)]
    (made / f"{cases[0]}.b2nd").touch()
    refused(given(configuration="3d_cascade_fullres"), "predictions of 3d_lowres, which 4 of 5 cases lack. .*every fold")
    for case in cases:
        (made / f"{case}.b2nd").touch()
    check_arguments(given(configuration="3d_cascade_fullres"))
    assert os.environ[launch.VARIABLE] == launch.search_path()
