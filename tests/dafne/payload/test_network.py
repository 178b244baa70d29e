"""payload/network.py: nnU-Net's networks, computed from torch alone, with each weight once."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import tiny
import torch
from shipped import settings_of

from nnunet_dante.dafne.payload.network import build
from nnunet_dante.dafne.settings import settings_for
from nnunet_dante.models.checkpoint import unique_tensors
from nnunet_dante.models.donor import open_donor
from nnunet_dante.models.network import build_network

INPLACE = {"inplace": True}


def both(tmp_path, *, configuration="3d_fullres", architecture="PlainConvUNet", edit=None):
    """nnU-Net's network of a donor's plans, edited, and the shipped one, with the same random weights."""
    donor = open_donor(tiny.write_model_folder(tmp_path, configuration=configuration, architecture=architecture))
    if edit is not None:
        edit(donor.plans["configurations"][configuration]["architecture"]["arch_kwargs"])
        architecture = donor.plans["configurations"][configuration]["architecture"]
        architecture["_kw_requires_import"] += ["block"] if "block" in architecture["arch_kwargs"] else []
    stock = build_network(donor.plans, donor.dataset_json, configuration)
    stock.decoder.deep_supervision = False
    own = build(settings_for(donor, orientation="RAS", as_shown=False, mirroring=False, tile_step=0.5))
    own.load_state_dict(unique_tensors(stock.state_dict()))
    return stock.eval(), own


def assert_equal(stock, own, channels=1, size=16):
    dim = own.settings["dimension"]
    x = torch.rand(2, channels, *[size] * dim, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(stock(x.clone()), own(x.clone()))


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_the_same_numbers_as_nnunet(tmp_path, architecture, configuration):
    stock, own = both(tmp_path, architecture=architecture, configuration=configuration)
    assert_equal(stock, own)
    assert list(own.state_dict()) == list(unique_tensors(stock.state_dict()))


def anisotropic(kwargs):
    kwargs |= {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 1]]}


def deeper(kwargs):
    kwargs |= {"n_conv_per_stage_decoder": [2, 1], "conv_bias": False}
    kwargs |= {k: [2, 3, 2] for k in ("n_conv_per_stage", "n_blocks_per_stage") if k in kwargs}


def other_layers(kwargs):
    kwargs |= {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d", "nonlin": "torch.nn.ReLU", "nonlin_kwargs": INPLACE}


def with_dropout(kwargs):
    kwargs |= {"dropout_op": "torch.nn.modules.dropout.Dropout3d", "dropout_op_kwargs": {"p": 0.5}}


def scalars(kwargs):
    kwargs |= {"kernel_sizes": 3, "strides": [1, 2, 2], "n_conv_per_stage_decoder": 1}


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("edit", [anisotropic, deeper, other_layers, with_dropout, scalars])
def test_every_option_of_the_plans(tmp_path, architecture, edit):
    assert_equal(*both(tmp_path, architecture=architecture, edit=edit))


def test_activation_before_norm(tmp_path):
    assert_equal(*both(tmp_path, edit=lambda kwargs: kwargs.update(nonlin_first=True)))


def bottlenecks(kwargs):
    kwargs |= {"block": "dynamic_network_architectures.building_blocks.residual.BottleneckD",
               "bottleneck_channels": [2, 4, 6], "stem_channels": 6}


def test_bottleneck_blocks_and_a_wider_stem(tmp_path):
    assert_equal(*both(tmp_path, architecture="ResidualEncoderUNet", edit=bottlenecks))


def test_building_draws_no_random_numbers_and_leaves_zeros(tmp_path):
    settings = settings_of(tiny.write_model_folder(tmp_path))
    state = torch.get_rng_state()
    network = build(settings)
    assert torch.equal(state, torch.get_rng_state())
    assert not network.training
    assert all(not p.any() for p in network.parameters())


@pytest.mark.parametrize("edit", [lambda kwargs: None, anisotropic, deeper], ids=["usual", "anisotropic", "deeper"])
@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("trainer", ["nnUNetTrainerSpatialAdapter", "nnUNetTrainerAdaptFormer"])
def test_added_modules_compute_the_same_under_the_same_names(tmp_path, trainer, architecture, edit):
    donor = open_donor(tiny.write_model_folder(tmp_path, architecture=architecture))
    edit(donor.plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"])
    stock = build_network(donor.plans, donor.dataset_json, "3d_fullres", trainer_name=trainer)
    stock.decoder.deep_supervision = False
    weights = {k: torch.randn_like(v) * 0.1 for k, v in unique_tensors(stock.state_dict()).items()}
    for key, parameter in unique_tensors(stock.state_dict()).items():
        parameter.copy_(weights[key])
    own = build(settings_for(dataclasses.replace(donor, network_trainer=trainer), orientation="RAS", as_shown=False,
                             mirroring=False, tile_step=0.5))
    own.load_state_dict(weights)
    assert list(own.state_dict()) == list(weights)
    assert_equal(stock.eval(), own)
    assert_equal(stock, copy.deepcopy(own))
