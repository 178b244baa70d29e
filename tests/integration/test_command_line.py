"""The documented commands, one after the other, as a user types them, on a tiny data set."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny
import torch

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
TRAIN = ["901", "3d_fullres", "0", "-p", "nnUNetDantePlans", "-tr", "nnUNetTrainerLoRA", "-device", "cpu"]
# nnU-Net's own entry points, in a process where this package does not exist
WITHOUT_DANTE = ("import sys; sys.modules['nnunet_dante'] = None; sys.argv[0] = 'nnUNetv2_predict'; "
                 "from nnunetv2.inference.predict_from_raw_data import predict_entry_point; predict_entry_point()")


class Shell:
    """Runs commands in one environment and folder; shows the output of a command that fails."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir()
        self.environment = os.environ | {name: str(root / name) for name in
                                         ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        self.environment.pop("nnUNet_extTrainer", None)

    def __call__(self, *command: object, fails: bool = False, **environment: str) -> str:
        words = [str(word) for word in command]
        if words[0] != sys.executable:
            words[0] = str(BIN / words[0])
        done = subprocess.run(words, cwd=self.root, env=self.environment | environment, text=True, timeout=600,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert (done.returncode != 0) == fails, f"{' '.join(words)}\n{done.stdout}"
        return done.stdout

    @property
    def fold(self) -> Path:
        return self.root / "nnUNet_results/Dataset901_Tiny/nnUNetTrainerLoRA__nnUNetDantePlans__3d_fullres/fold_0"


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Shell:
    """A transferred and trained data set."""
    shell = Shell(tmp_path_factory.mktemp("command_line"))
    tiny.write_raw_dataset(shell.root / "nnUNet_raw", labels={"background": 0, "organ": 1, "vessel": 2})
    donor = tiny.write_model_folder(shell.root / "elsewhere")
    report = shell("nnunet-dante", "transfer", donor, "-d", "901", "-c", "3d_fullres", "--preprocess", "--epochs", "2",
                   "--iterations", "3", "--val-iterations", "1", "--rank", "2")
    assert "vessel" in report and "lesion" in report
    log = shell("nnunet-dante", "train", *TRAIN)
    assert "Gradient audit passed" in log and "Pseudo dice before training" in log and "Validation complete" in log
    return shell


def weights(file: Path) -> dict:
    return torch.load(file, weights_only=False)["network_weights"]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_stock_nnunet_predicts_without_this_package(shell):
    raw, out = shell.root / "nnUNet_raw/Dataset901_Tiny/imagesTr", shell.root / "predicted"
    options = ["-i", raw, "-o", out, "-d", "901", "-c", "3d_fullres", "-f", "0", "-p", "nnUNetDantePlans",
               "-tr", "nnUNetTrainerLoRA", "-device", "cpu", "-npp", "1", "-nps", "1"]
    shell(sys.executable, "-c", WITHOUT_DANTE, *options)
    assert len(list(out.glob("*.nii.gz"))) == 5


def test_nnunets_own_train_finds_the_trainers_with_the_printed_line(shell):
    line = shell("nnunet-dante", "env").strip()
    name, value = line.removeprefix("export ").split("=", 1)
    assert name == "nnUNet_extTrainer"
    log = shell("nnUNetv2_train", *TRAIN, "--val", nnUNet_extTrainer=value.strip('"'))
    assert "Mean Validation Dice" in log
    log = shell("nnUNetv2_train", *TRAIN, "--val", "--val_best", nnUNet_extTrainer=value.strip('"'))
    assert "Mean Validation Dice" in log


def test_stopped_training_continues_and_a_finished_one_only_validates(shell):
    before = weights(shell.fold / "checkpoint_final.pth")
    log = shell("nnunet-dante", "train", *TRAIN, "--c")
    assert "Epoch 0" not in log and "Mean Validation Dice" in log
    assert equal(weights(shell.fold / "checkpoint_final.pth"), before)


def test_adapter_and_base_make_the_merged_checkpoint_and_part_again(shell):
    start = shell.root / "nnUNet_preprocessed/Dataset901_Tiny/nnUNetDantePlans_3d_fullres_start.pth"
    adapter, merged, base = (shell.root / name for name in ("a.safetensors", "merged.pth", "base.pth"))
    assert "LoRA, rank 2" in shell("nnunet-dante", "adapter", "extract", shell.fold / "checkpoint_final.pth", "-o", adapter)
    assert adapter.read_bytes() == (shell.fold / "adapter.safetensors").read_bytes()
    shell("nnunet-dante", "adapter", "apply", start, adapter, "-o", merged)
    assert equal(weights(merged), weights(shell.fold / "checkpoint_final.pth"))
    shell("nnunet-dante", "adapter", "remove", merged, "-o", base)
    assert equal(weights(base), weights(start))
    assert "sha256" in shell("nnunet-dante", "adapter", "apply", shell.fold / "checkpoint_final.pth", adapter,
                             "-o", shell.root / "no.pth", fails=True)
    assert not (shell.root / "no.pth").exists()


def test_exported_zip_is_a_donor_again_and_inspect_reads_everything(shell):
    file = shell.root / "model.zip"
    shell("nnUNetv2_export_model_to_zip", "-d", "901", "-c", "3d_fullres", "-f", "0", "-p", "nnUNetDantePlans",
          "-tr", "nnUNetTrainerLoRA", "-o", file)
    assert zipfile.is_zipfile(file)
    report = shell("nnunet-dante", "transfer", file, "-d", "901", "-p", "nnUNetSecondPlans")
    assert "organ" in report and (shell.root / "nnUNet_preprocessed/Dataset901_Tiny/nnUNetSecondPlans.json").is_file()
    for path in (file, shell.fold / "checkpoint_final.pth", shell.fold.parent, shell.fold / "adapter.safetensors"):
        assert "organ" in shell("nnunet-dante", "inspect", path)


def test_pretrained_weights_option_of_nnunet_works(shell):
    log = shell("nnunet-dante", "train", *TRAIN[:2], "1", *TRAIN[3:-4], "-tr", "nnUNetTrainerFineTune", "-device", "cpu",
                "-pretrained_weights", shell.fold / "checkpoint_final.pth")
    assert "Loading pretrained weights" in log and "Mean Validation Dice" in log


def test_added_modules_train_validate_and_predict_where_their_trainer_is_found(shell):
    name = "nnUNetTrainerAdaptFormer"
    found = shell("nnunet-dante", "env").strip().split("=", 1)[1].strip('"')
    words = [*TRAIN[:-3], name, *TRAIN[-2:]]
    assert "cannot be merged into its weights" in shell("nnunet-dante", "train", *words)
    for more in (["--c"], ["--val", "--val_best"]):
        assert "Mean Validation Dice" in shell("nnUNetv2_train", *words, *more, nnUNet_extTrainer=found)
    raw, out = shell.root / "nnUNet_raw/Dataset901_Tiny/imagesTr", shell.root / "predicted_added"
    options = ["-i", raw, "-o", out, "-d", "901", "-c", "3d_fullres", "-f", "0", "-p", "nnUNetDantePlans",
               "-tr", name, "-device", "cpu", "-npp", "1", "-nps", "1"]
    assert name in shell("nnUNetv2_predict", *options, fails=True)
    shell("nnUNetv2_predict", *options, nnUNet_extTrainer=found)
    assert len(list(out.glob("*.nii.gz"))) == 5
    file = shell.root / "added.model"
    fold = Path(str(shell.fold).replace("nnUNetTrainerLoRA", name))
    shell("nnunet-dante", "export", fold.parent, "-o", file)
    for path in (fold / "checkpoint_final.pth", file):
        assert name in shell("nnunet-dante", "inspect", path)


def test_own_trainer_from_the_examples(shell):
    examples = Path(__file__).parents[2] / "examples/own_trainers"
    log = shell("nnunet-dante", "train", *TRAIN[:2], "2", *TRAIN[3:-4], "-tr", "nnUNetTrainerInputFirst", "-device", "cpu",
                nnUNet_extTrainer=str(examples))
    assert "input_first" in log and "Mean Validation Dice" in log


def test_examples_of_python_use(shell):
    examples = Path(__file__).parents[2] / "examples"
    start = shell.root / "nnUNet_preprocessed/Dataset901_Tiny/nnUNetDantePlans_3d_fullres_start.pth"
    said = shell(sys.executable, examples / "share_an_adapter.py", shell.fold, start, shell.root / "shared")
    assert "largest difference of a rebuilt weight: 0" in said


def test_doctor_passes_here(shell):
    said = shell("nnunet-dante", "doctor")
    assert "FAIL" not in said and "Gradient audit passed" in said
