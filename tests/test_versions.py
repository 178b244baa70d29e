import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import nnunet_dante
from nnunet_dante import versions
from nnunet_dante.errors import DanteError, UnsupportedVersionError

OWN = ["nnunetv2>=2.8.1", "torch>=2.6", "tomli>=2; python_version < '3'", "peft>=99; extra == 'test'"]
GOOD = {"nnunetv2": "2.8.1", "torch": "2.6.0+cu124", "peft": "0.1", "tomli": "1.0"}


@pytest.fixture
def machine(monkeypatch):
    """Metadata as an installation would show them: {name: version}, to be changed by the test."""
    there = dict(GOOD)
    demands = {"nnunet-dante": OWN, "nnunetv2": ["torch!=2.9.*,>=2.1.2", "numpy>=99"]}

    def version(name):
        if name not in there:
            raise PackageNotFoundError(name)
        return there[name]

    def requires(name):
        if name not in demands:
            raise PackageNotFoundError(name)
        return demands[name]

    def metadata(name):
        return {"Requires-Python": ">=3.10"} if requires(name) else {}

    for function in (version, requires, metadata):
        monkeypatch.setattr(versions, function.__name__, function)
    monkeypatch.setattr(versions.platform, "python_version", lambda: there.get("Python", "3.12.1"))
    there["demands"] = demands
    return there


@pytest.mark.parametrize("name, version", [
    ("nnunetv2", "2.8.1"), ("nnunetv2", "2.8.7.post1"), ("torch", "2.6.0"), ("torch", "2.15.0+cu132"),
    ("torch", "2.10.0a0+b558c986e8.nv25.11"), ("Python", "3.10.0"), ("Python", "3.13.0"), ("Python", "3.14.0rc1")])
def test_versions_in_the_range_are_accepted(machine, name, version):
    machine[name] = version
    assert versions.unsupported() == {}
    versions.refuse_unsupported()


@pytest.mark.parametrize("name, version, says", [
    ("nnunetv2", "2.8.0", 'nnunetv2 2.8.0 is installed.*pip install "nnunetv2>=2.8.1"'),
    ("torch", "2.5.1+cpu", "torch 2.5.1.cpu is installed.*>=2.6"),
    ("torch", "2.9.1", "torch 2.9.1 is installed.*!=2.9"),
    ("Python", "3.9.18", "Python 3.9.18 is installed.*needs Python>=3.10.*virtual environment")])
def test_versions_outside_are_refused_by_name_with_the_range_and_the_remedy(machine, name, version, says):
    machine[name] = version
    with pytest.raises(UnsupportedVersionError, match=says) as caught:
        versions.refuse_unsupported()
    assert isinstance(caught.value, DanteError)


@pytest.mark.parametrize("version", ["2.9.0", "2.10.1", "3.0.0rc1"])
def test_a_newer_nnunet_is_used_with_a_warning(machine, version):
    machine["nnunetv2"] = version
    with pytest.warns(UserWarning, match=rf"nnunetv2 {version} is installed; .* tested with 2.8. .*nnunetv2<2.9"):
        versions.refuse_unsupported()


@pytest.mark.parametrize("version", ["2.8.1", "2.8.9", "2.8.1.post2"])
def test_tested_versions_are_used_without_a_warning(machine, version, recwarn):
    machine["nnunetv2"] = version
    versions.refuse_unsupported()
    assert not recwarn


def test_all_that_is_wrong_is_named_at_once(machine):
    machine.update(nnunetv2="2.5", torch="2.4.0")
    with pytest.raises(UnsupportedVersionError, match="nnunetv2 2.5 .*; torch 2.4.0 "):
        versions.refuse_unsupported()


def test_a_small_dependency_out_of_range_is_reported_and_does_not_stop_a_training(machine):
    machine["demands"]["nnunet-dante"] = [*OWN, "tqdm>=4.65"]
    machine["tqdm"] = "4.60"
    assert list(versions.unsupported()) == ["tqdm"]
    versions.refuse_unsupported()


@pytest.mark.parametrize("gone", ["nnunet-dante", "nnunetv2", "torch"])
def test_missing_metadata_break_nothing(machine, gone):
    machine.pop(gone, None)
    machine["demands"].pop(gone, None)
    assert versions.unsupported() == {}
    assert bool(versions.supported()) == (gone != "nnunet-dante")
    assert versions.installed("nnunetv2") == (None if gone == "nnunetv2" else "2.8.1")


def test_the_ranges_of_this_installation_name_the_framework_and_hold_here():
    ranges = versions.supported()
    assert all(str(ranges[name]) for name in versions.FRAMEWORK)
    assert versions.unsupported() == {}
    assert "2.9.0" not in ranges["torch"], "nnU-Net's own exclusion"


@pytest.mark.parametrize("name, version", [("nnunetv2", "2.7.0"), ("torch", "2.1.0")])
@pytest.mark.parametrize("module", ["nnunet_dante.training.trainers", "nnunet_dante.training.trainer",
                                    "nnunet_dante_trainers"])
def test_importing_the_trainers_is_refused_before_torch_is_imported(tmp_path, name, version, module):
    fake = tmp_path / f"{name}-{version}.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    from nnunet_dante.training.launch import trainers_folder

    paths = [tmp_path, trainers_folder(), Path(nnunet_dante.__file__).parents[1]]
    code = (f"import sys\ntry:\n    import {module}\nexcept Exception as error:\n"
            "    print(type(error).__name__, error, 'torch' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))})
    assert said.stdout.startswith(f"UnsupportedVersionError {name} {version} is installed"), said
    assert said.stdout.rstrip().endswith("False")
