"""network.py: nnU-Net's own network, and the keys that surgery works on."""

from __future__ import annotations

import pytest
import tiny
import torch

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.models.checkpoint import unique_tensors
from nnunet_dante.models.network import build_network, differences, head_rows, stem_weights
from nnunet_dante.peft.added_modules import is_added


@pytest.mark.parametrize(("configuration", "channels"), [("2d", 1), ("3d_fullres", 1), ("3d_cascade_fullres", 3)])
@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_heads_and_stem_of_unets(configuration, channels, architecture):
    plans = tiny.plans("D", architecture=architecture)
    network = build_network(plans, tiny.dataset_json(), configuration)
    state = network.state_dict()
    assert head_rows(network) == {k: 0 for k in state if k.startswith("decoder.seg_layers")}
    stems = stem_weights(plans, tiny.dataset_json(), configuration)
    (weight,) = unique_tensors({key: state[key] for key in stems}).values()
    assert weight.shape[1] == channels
    assert all(weight.data_ptr() != state[key].data_ptr() for key in state if key not in stems)
    assert all(state[k].shape[0] == 3 for k in head_rows(network))


def test_head_of_primus_keeps_its_rows_in_the_second_dimension():
    network = tiny.primus(channels=2, classes=5)
    state, rows = network.state_dict(), head_rows(network)
    assert {state[k].shape[dim] for k, dim in rows.items()} == {5}
    assert {state[k].ndim for k in rows} == {1, 5}


@pytest.mark.parametrize(("trainer", "layers"), [("nnUNet_Primus_S_Trainer", 1), ("nnUNet_PrimusV2S_Trainer", 2)])
def test_every_layer_of_primus_that_reads_the_image_is_found(trainer, layers):
    plans, content = tiny.plans("D"), tiny.dataset_json()
    state = build_network(plans, content, "3d_fullres", trainer_name=trainer).state_dict()
    stems = stem_weights(plans, content, "3d_fullres", trainer_name=trainer)
    assert len(unique_tensors({key: state[key] for key in stems})) == layers


def test_old_key_modality_is_counted_too():
    content = tiny.dataset_json()
    content["modality"] = content.pop("channel_names")
    assert stem_weights(tiny.plans("D"), content, "2d")


def test_differences_name_missing_foreign_and_misshapen_keys():
    one, other = {"a": torch.ones(1), "b": torch.ones(2)}, {"b": torch.ones(3), "c": torch.ones(1)}
    assert differences(one, one) == []
    assert differences(other, one) == ["a is missing", "c is not part of the network",
                                       "b has shape (3,), the network (2,)"]


def test_bad_requests():
    with pytest.raises(ConfigurationError, match="'4d' is not in the plans"):
        build_network(tiny.plans("D"), tiny.dataset_json(), "4d")
    with pytest.raises(ConfigurationError, match="'NoTrainer' is not part of nnU-Net"):
        build_network(tiny.plans("D"), tiny.dataset_json(), "2d", trainer_name="NoTrainer")


def test_a_network_with_added_modules_has_them_and_is_built_by_their_trainer():
    plans, content = tiny.plans("D"), tiny.dataset_json()
    stock = build_network(plans, content, "3d_fullres").state_dict()
    for trainer, count in (("nnUNetTrainerSpatialAdapter", 2), ("nnUNetTrainerAdaptFormer", 20)):
        network = build_network(plans, content, "3d_fullres", trainer_name=trainer)
        added = {k: v for k, v in network.state_dict().items() if k not in stock}
        assert len(unique_tensors(added)) == count and all(map(is_added, added))
        assert set(head_rows(network)) == {k for k in stock if k.startswith("decoder.seg_layers")}
    stems = stem_weights(plans, content, "3d_fullres", trainer_name="nnUNetTrainerAdaptFormer")
    assert {k.split(".")[-2] for k in stems} == {"conv", "0", "down"}, "the bottleneck beside the stem reads the image"
