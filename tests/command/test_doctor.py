import sys

import pytest

from nnunet_dante.command import doctor


def test_a_version_outside_the_range_fails_the_check_and_the_others_still_run(monkeypatch):
    monkeypatch.setattr(doctor, "unsupported", lambda: {"torch": "torch 2.5.1 is installed, x needs torch>=2.6"})
    checks = doctor.diagnose()
    first = next(checks)
    assert (first.name, first.passed) == ("versions", False)
    assert 'torch 2.5.1 is installed' in first.seen and 'pip install "torch' in first.seen
    assert next(checks).name == "torchvision"


def test_without_metadata_the_versions_are_shown_and_not_judged(monkeypatch):
    monkeypatch.setattr(doctor, "unsupported", dict)
    monkeypatch.setattr(doctor, "supported", dict)
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    first = next(doctor.diagnose())
    assert first.passed and "torch without metadata" in first.seen and "no metadata to check them by" in first.seen


def test_it_recognises_a_torchvision_of_another_torch(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(RuntimeError, match="built for another torch.*pip install"):
        doctor._torchvision()


def test_it_says_what_to_do_about_folders(monkeypatch, tmp_path):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(RuntimeError, match='export nnUNet_raw='):
        doctor._folder("nnUNet_raw")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "missing"))
    with pytest.raises(RuntimeError, match="missing does not exist"):
        doctor._folder("nnUNet_raw")
