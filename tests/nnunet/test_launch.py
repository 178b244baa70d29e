import os
import sys

import pytest

from nnunet_dante.nnunet import doctor, launch


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

    from nnunet_dante.nnunet import trainers

    monkeypatch.setenv(launch.VARIABLE, launch.search_path())
    for name in [n for n in dir(trainers) if n.startswith("nnUNetTrainer") and n != "nnUNetTrainer"]:
        assert recursive_find_trainer_class_by_name(name) is getattr(trainers, name)


def test_doctor_recognises_a_torchvision_of_another_torch(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(RuntimeError, match="built for another torch.*pip install"):
        doctor._torchvision()


def test_doctor_says_what_to_do_about_folders(monkeypatch, tmp_path):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(RuntimeError, match='export nnUNet_raw='):
        doctor._folder("nnUNet_raw")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "missing"))
    with pytest.raises(RuntimeError, match="missing does not exist"):
        doctor._folder("nnUNet_raw")
