"""network.py: nnU-Net's own network, and the keys that surgery works on."""

from __future__ import annotations

import pytest
import tiny
import torch

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.nnunet.network import build_network, differences, head_rows, stem_weights


@pytest.mark.parametrize(("configuration", "channels"), [("2d", 1), ("3d_fullres", 1), ("3d_cascade_fullres", 3)])
@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_heads_and_stem_of_unets(configuration, channels, architecture):
    network = build_network(tiny.plans("D", architecture=architecture), tiny.dataset_json(), configuration)
    state = network.state_dict()
    assert head_rows(network) == {k: 0 for k in state if k.startswith("decoder.seg_layers")}
    (stem,) = stem_weights(network)
    assert stem.startswith("encoder.")
    assert state[stem].shape[1] == channels
    assert all(state[k].shape[0] == 3 for k in head_rows(network))


def test_head_and_stem_of_primus():
    network = tiny.primus(channels=2, classes=5)
    state, rows = network.state_dict(), head_rows(network)
    assert {state[k].shape[dim] for k, dim in rows.items()} == {5}
    assert {state[k].ndim for k in rows} == {1, 5}
    assert [state[k].shape[1] for k in stem_weights(network)] == [2]


def test_differences_name_missing_foreign_and_misshapen_keys():
    one, other = {"a": torch.ones(1), "b": torch.ones(2)}, {"b": torch.ones(3), "c": torch.ones(1)}
    assert differences(one, one) == []
    assert differences(other, one) == ["a is missing", "c is not part of the network",
                                       "b has shape (3,), the network (2,)"]


def test_bad_requests():
    with pytest.raises(ConfigurationError, match="'4d' is not in the plans"):
        build_network(tiny.plans("D"), tiny.dataset_json(), "4d")
    with pytest.raises(ConfigurationError, match="'NoTrainer' is none of nnU-Net's own"):
        build_network(tiny.plans("D"), tiny.dataset_json(), "2d", trainer_name="NoTrainer")
