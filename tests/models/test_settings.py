"""dante_block.py: what is written is read back; what is wrong is named."""

from __future__ import annotations

import json

import pytest

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.models.settings import checked_overrides, new_dante_block, read_dante_block

ENTRY = {"file": "p_start.pth", "sha256": "a" * 64, "donor": {}}


def test_written_is_read_through_json():
    block = new_dante_block("3d_fullres", ENTRY, {"epochs": 3, "lr": None, "alpha": 4})
    found = read_dante_block({"dante": json.loads(json.dumps(block))})
    assert found == block
    assert found["overrides"] == {"epochs": 3, "alpha": 4.0}
    assert found["start_weights"] == {"3d_fullres": ENTRY}


def test_plans_without_a_block_are_the_defaults():
    found = read_dante_block({"plans_name": "nnUNetPlans"})
    assert (found["start_weights"], found["overrides"]) == ({}, {})


@pytest.mark.parametrize(("name", "value", "message"), [
    ("epoch", 3, "'epoch' is unknown; allowed are"), ("epochs", 0, "a whole number of at least 1"),
    ("epochs", 2.5, "must be a whole number"), ("rank", True, "must be a whole number"),
    ("lr", -1.0, "a number above 0"), ("lr", float("nan"), "must be a number"), ("alpha", "4", "must be a number")])
def test_bad_overrides(name, value, message):
    with pytest.raises(ConfigurationError, match=message):
        checked_overrides({name: value})


@pytest.mark.parametrize("block", [{"format": 2}, {}, "x"])
def test_other_formats_are_refused(block):
    with pytest.raises(ConfigurationError, match="reads format 1"):
        read_dante_block({"plans_name": "P", "dante": block})


@pytest.mark.parametrize("entry", [{"file": "../x.pth"}, {"file": "/x.pth"}, {"file": "a\\b.pth"}, {"file": "x.py"},
                                   {"sha256": "abc"}, {"sha256": None}])
def test_start_weights_cannot_lead_out_of_the_folder(entry):
    block = new_dante_block("2d", ENTRY | entry, {})
    with pytest.raises(ConfigurationError, match=r"start_weights\[...\]\.(file|sha256).*without folders, a sha256 of 64 hex digits"):
        read_dante_block({"dante": block})


@pytest.mark.parametrize("change", [
    {"start_weights": {"2d": 3}}, {"overrides": [1]}, {"options": "x"}, {"start_weights": {"2d": ENTRY | {"label_map": 3}}},
    {"start_weights": {"2d": ENTRY | {"mirroring_axes": [3]}}}, {"start_weights": {"2d": {"sha256": "a" * 64}}},
    {"start_weights": {"2d": ENTRY | {"donor": None}}}, {"start_weights": {2: ENTRY}}])
def test_damage_anywhere_in_the_block_is_named(change):
    with pytest.raises(ConfigurationError, match=r"block of plans 'P' is damaged: .*\$"):
        read_dante_block({"plans_name": "P", "dante": {"format": 1, **change}})


def test_what_a_later_version_adds_is_kept():
    block = {"format": 1, "later": [1], "start_weights": {"2d": ENTRY | {"of_tomorrow": True}}}
    assert read_dante_block({"dante": block}) == block | {"overrides": {}}
