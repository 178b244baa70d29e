import sys

import pytest
import torch

from nnunet_dante.command import doctor
from nnunet_dante.errors import UnsupportedVersionError


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


@pytest.mark.parametrize("error", [
    RuntimeError("operator torchvision::nms does not exist"), ImportError("_C.so: undefined symbol: _ZN3c10"),
    AttributeError("partially initialized module 'torchvision' has no attribute 'extension'"),
    OSError("libtorch_cuda.so: cannot open shared object file")])
def test_it_recognises_a_torchvision_of_another_torch_and_names_the_one_that_fits(monkeypatch, error):
    class Broken:
        def find_spec(self, name, *_):
            if name == "torchvision":
                raise error

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setattr(torch, "__version__", "2.8.0+cpu")
    found = next(check for check in doctor.diagnose() if check.name == "torchvision")
    assert not found.passed and "built for another torch" in found.seen and str(error) in found.seen
    assert '"torchvision==0.23.*"' in found.seen


def test_a_missing_torchvision_is_not_taken_for_one_of_another_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UnsupportedVersionError, match="torchvision is not installed.*pip install"):
        doctor.torchvision_version()


def test_it_says_what_to_do_about_folders(monkeypatch, tmp_path):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    assert "`adapt`, `predict`, `ui` and `demo` need no folders" in doctor._folder("nnUNet_raw")
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    with pytest.raises(RuntimeError, match='another of .* is: export nnUNet_raw='):
        doctor._folder("nnUNet_raw")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "missing"))
    with pytest.raises(RuntimeError, match="missing does not exist"):
        doctor._folder("nnUNet_raw")
