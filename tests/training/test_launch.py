import os

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
    for name in [n for n in dir(trainers) if n.startswith("nnUNetTrainer") and n != "nnUNetTrainer"]:
        assert recursive_find_trainer_class_by_name(name) is getattr(trainers, name)
