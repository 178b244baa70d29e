"""Start weights that are damaged or of another network stop the training, and say so."""

from __future__ import annotations

import pytest
import tiny
import torch
from running import build, with_overrides

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.models.checkpoint import file_sha256
from nnunet_dante.training import trainers
from nnunet_dante.training.provenance import load_start_weights


def loaded(tmp_path, content, **entry):
    torch.save(content, tmp_path / "start.pth")
    network = tiny.plain_unet()
    load_start_weights(network, tmp_path, {"file": "start.pth", "sha256": file_sha256(tmp_path / "start.pth"),
                                           "donor": {"trainer": "nnUNetTrainer"}} | entry)
    return network


def test_weights_of_the_network_are_loaded(tmp_path):
    weights = {key: value + 1 for key, value in tiny.plain_unet().state_dict().items()}
    assert all(torch.equal(value, weights[key])
               for key, value in loaded(tmp_path, {"network_weights": weights}).state_dict().items())


@pytest.mark.parametrize(("content", "said"), [
    ({}, "holds no network_weights"), ({"network_weights": [1]}, "holds no network_weights"),
    ({"network_weights": {7: torch.ones(1)}}, "holds no network_weights"),
    ({"network_weights": {"w": torch.ones(1)}}, "does not fit"), ({"network_weights": {"": torch.ones(1)}}, "does not fit")])
def test_other_content_is_refused(tmp_path, content, said):
    with pytest.raises(ConfigurationError, match=said):
        loaded(tmp_path, content)


def test_files_that_are_not_those_of_the_plans_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="were written for"):
        loaded(tmp_path, {}, sha256="0" * 64)
    with pytest.raises(ConfigurationError, match="does not hold"):
        loaded(tmp_path, {}, file="other.pth")


def moved(entry):
    entry["label_map"] = dict(reversed(entry["label_map"].items()))


READ = {  # field -> a change of it, and what a training then does
    "file": (lambda e: e.update(file="other.pth"), "does not hold them"),
    "sha256": (lambda e: e.update(sha256="0" * 64), "the plans were written for"),
    "label_map": (moved, "labels .*the start weights are for"),
    "channel_map": (lambda e: e.update(channel_map={"CT": None}), "channels .*the start weights are for CT"),
    "mirroring_axes": (lambda e: e.update(mirroring_axes=[7]), "mirroring axes"),
    "network_trainer": (lambda e: e.update(network_trainer="Nobody"), "'Nobody'"),
    "encoder_only": (lambda e: e.update(encoder_only=True), "decoder")}
PROVENANCE = {"donor", "geometry", "inverted_channels"}  # who the weights come from, for people: `inspect` and reports show them


def test_every_field_of_a_transfers_block_is_read_or_provenance(prepared):
    block = with_overrides(prepared)["dante"]
    assert set(block) == {"format", "version", "start_weights", "overrides"}  # `read_dante_block` reads them
    assert set(block["start_weights"]["3d_fullres"]) == {*READ, *PROVENANCE}


@pytest.mark.parametrize("field", READ)
def test_a_changed_field_changes_the_training(prepared, field):
    plans = with_overrides(prepared)
    change, message = READ[field]
    change(plans["dante"]["start_weights"]["3d_fullres"])
    with pytest.raises(ConfigurationError, match=message):
        build(trainers.nnUNetTrainerHeadOnly, prepared, plans=plans).initialize()
