import os

import pytest
import torch

from nnunet_dante.training import launch


def test_the_folder_holds_the_trainer_module_and_nothing_else():
    files = [f.name for f in launch.trainers_folder().iterdir() if f.suffix == ".py"]
    assert files == ["nnunet_dante_trainers.py"]


def test_the_search_path_keeps_what_the_user_had_and_names_us_once(monkeypatch):
    ours = str(launch.trainers_folder())
    monkeypatch.setenv(launch.VARIABLE, os.pathsep.join(["/mine", ours]))
    assert launch.search_path() == os.pathsep.join([ours, "/mine"])
    monkeypatch.delenv(launch.VARIABLE)
    assert launch.search_path() == ours


def test_nnunets_own_search_finds_every_trainer(monkeypatch):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_dante.training import trainers

    monkeypatch.setenv(launch.VARIABLE, launch.search_path())
    for name, cls in trainers.TRAINERS.items():
        assert recursive_find_trainer_class_by_name(name) is cls


def test_own_trainers_are_found_without_importing_nnunets(monkeypatch):
    from nnunet_dante.training import trainers

    assert trainers.find_trainer("nnUNetTrainer_5epochs").__name__ == "nnUNetTrainer_5epochs"
    monkeypatch.setattr(trainers, "recursive_find_trainer_class_by_name", lambda name: pytest.fail("searched"))
    assert trainers.find_trainer("nnUNetTrainerLoRA") is trainers.nnUNetTrainerLoRA
    with pytest.raises(pytest.fail.Exception, match="searched"):
        trainers.find_trainer("LoRA")  # a method, which is in the same module


def test_train_runs_nnunets_command_with_our_search(monkeypatch):
    from nnunetv2.run import run_training

    from nnunet_dante.training import checks, trainers

    monkeypatch.setattr(checks, "check_arguments", lambda arguments: [])
    monkeypatch.setattr(run_training, "recursive_find_trainer_class_by_name", None)
    monkeypatch.setattr(run_training, "run_training_entry", lambda: None)
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setenv(launch.VARIABLE, "")
    launch.train(["901"])
    assert run_training.recursive_find_trainer_class_by_name is trainers.find_trainer


def test_printed_commands_name_the_device_where_torch_finds_no_cuda_gpu(monkeypatch):
    def printed(cuda: bool, mps: bool) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        return launch.train_command("Dataset1234_Mine", "2d", "all", plans="P", trainer="nnUNetTrainerLoRA")

    command = "nnunet-dante train Dataset1234_Mine 2d all -p P -tr nnUNetTrainerLoRA"
    assert printed(cuda=True, mps=False) == command
    assert printed(cuda=False, mps=True) == f"{command} -device mps"
    assert printed(cuda=False, mps=False) == f"{command} -device cpu"
