"""run.py: the demo is `adapt` on its own images; it replaces its own results and nobody else's; the whole run is a slow test."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nnunet_dante.demo.data import CT
from nnunet_dante.demo.run import DONOR, _clear, run_demo
from nnunet_dante.errors import ConfigurationError
from nnunet_dante.models.donor import open_donor
from nnunet_dante.models.labels import head_names
from nnunet_dante.models.network import build_network


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


def test_the_donor_in_the_package_is_a_small_network_that_knows_the_labels_of_the_ct():
    donor = open_donor(DONOR)
    assert head_names(donor.dataset_json) == ("background", *CT.structures)
    network = build_network(donor.plans, donor.dataset_json, donor.configuration)
    network.load_state_dict(donor.weights)
    assert sum(p.numel() for p in network.parameters()) < 100_000


@pytest.mark.slow
def test_the_demo_ends_in_a_report_with_curves_and_overlays(tmp_path):
    """Downloads the images, unless NNUNET_DANTE_DEMO_DATA names a folder with them."""
    data = os.environ.get("NNUNET_DANTE_DEMO_DATA")
    out = tmp_path / "demo"
    result = run_demo(out, data=Path(data) if data else None)
    assert result.report == out / "report.html" and result.dice["adapted"] > result.dice["donor"] + 0.2
    assert set(json.loads((out / "adapt.json").read_text())["done"]) >= {"transfer", "report", "files"}
    assert (out / "plots" / "dataset802_spinemr_only_case.png").stat().st_size > 10_000
    assert result.model.is_file() and result.dafne.is_file()
    model = next((out / "nnUNet_results" / "Dataset802_SpineMR").iterdir())
    assert json.loads((model / "dataset.json").read_text())["channel_names"] == {"0": "T2w"}
