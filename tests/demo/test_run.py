"""run.py: the demo is `adapt` on its own images; it replaces its own results and nobody else's; the whole run is a slow test."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nnunet_dante.demo.data import CT
from nnunet_dante.demo.run import CONFIGURATION, DONOR_PLANS, _clear, run_demo, small_plans
from nnunet_dante.errors import ConfigurationError


def test_an_earlier_demo_is_replaced_and_other_files_stay(tmp_path):
    _clear(tmp_path)
    (tmp_path / "nnUNet_raw").mkdir()
    for name in ("adapt.json", "notes.txt"):
        (tmp_path / name).touch()
    _clear(tmp_path)
    assert not (tmp_path / "nnUNet_raw").exists() and not (tmp_path / "adapt.json").exists()
    assert (tmp_path / "notes.txt").exists()


def test_nnunet_folders_of_the_user_are_refused_and_untouched(tmp_path):
    (tmp_path / "nnUNet_raw" / "Dataset001_Mine").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="nnUNet_raw.*choose a new folder"):
        run_demo(tmp_path)
    assert (tmp_path / "nnUNet_raw" / "Dataset001_Mine").is_dir()


def test_the_small_plans_build_a_small_network():
    import tiny
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = small_plans(tiny.plans(CT.dataset, features=(32, 64, 128, 256)))
    assert plans["plans_name"] == DONOR_PLANS
    manager = PlansManager(plans).get_configuration(CONFIGURATION)
    network = get_network_from_plans(manager.network_arch_class_name, manager.network_arch_init_kwargs,
                                     manager.network_arch_init_kwargs_req_import, 1, len(CT.labels))
    assert sum(p.numel() for p in network.parameters()) < 100_000
    assert manager.data_identifier == f"{DONOR_PLANS}_{CONFIGURATION}"


@pytest.mark.slow
def test_the_demo_ends_in_a_report_with_curves_and_overlays(tmp_path):
    """Downloads the images, unless NNUNET_DANTE_DEMO_DATA names a folder with them."""
    data = os.environ.get("NNUNET_DANTE_DEMO_DATA")
    out = tmp_path / "demo"
    result = run_demo(out, data=Path(data) if data else None)
    assert result.report == out / "report.html" and result.dice["adapted"] > result.dice["donor"] + 0.2
    assert set(json.loads((out / "adapt.json").read_text())["done"]) >= {"transfer", "report", "files"}
    assert (out / "plots" / "dataset802_spinemr_worst_case.png").stat().st_size > 10_000
    assert result.model.is_file() and result.dafne.is_file()
    model = next((out / "nnUNet_results" / "Dataset802_SpineMR").iterdir())
    assert json.loads((model / "dataset.json").read_text())["channel_names"] == {"0": "T2w"}
