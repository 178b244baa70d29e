from __future__ import annotations

import pytest
import tiny
import torch
from tiny import planned, trainable
from torch import nn

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods import (
    BitFit,
    DanteGradualUnfreezing,
    DecoderOnly,
    FineTune,
    GradualUnfreezing,
    HeadOnly,
    LoRA,
    Method,
    NormAffine,
)
from nnunet_dante.peft.inject import adapted
from nnunet_dante.training.trainers import TRAINERS

METHODS = [Method(), BitFit(full_decoder=True), NormAffine(full_decoder=True),
           *(trainer.method.with_overrides({"rank": 1}) for trainer in TRAINERS.values())]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}{getattr(m, 'encoder', '')}")
@pytest.mark.parametrize("build", [tiny.plain_unet, tiny.residual_unet])
def test_the_optimiser_holds_each_trained_parameter_once_head_first(method, build):
    network = build()
    plan = planned(method, network)
    held = [id(p) for group in plan.optimiser_groups() for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in network.parameters() if p.requires_grad}
    seg = {id(p) for p in network.decoder.seg_layers.parameters()}
    assert seg <= {id(p) for p in plan.optimiser_groups()[0]["params"]}
    assert all(group.name in plan.table() for group in plan.groups)


def test_lora_trains_factors_and_small_tensors_but_no_adapted_weight():
    network = tiny.plain_unet()
    planned(LoRA(rank=1), network)
    names = trainable(network)
    assert adapted(network) and not any(n.endswith("original") for n in names)
    assert "encoder.stages.0.0.convs.0.conv.weight" in names and "decoder.seg_layers.0.weight" in names
    assert {n for n in names if ".norm." in n} == {n for n, _ in network.named_parameters() if ".norm." in n}


def test_lora_decoder_leaves_the_encoder_alone_with_its_norms():
    network = tiny.residual_unet()
    planned(LoRA(rank=1, encoder=False), network)
    assert not any(n.startswith("encoder") for n in trainable(network))
    assert all(n.startswith("decoder") for n in adapted(network))


@pytest.mark.parametrize(("method", "prefixes"), [
    (HeadOnly(), ("decoder.seg_layers",)), (DecoderOnly(), ("decoder.",)),
    (LoRA(rank=1, encoder=False), ("decoder.",))])
def test_backward_stops_where_nothing_is_trained(method, prefixes):
    network = tiny.plain_unet()
    planned(method, network)
    sum(y.square().mean() for y in network(torch.rand(1, 1, 16, 16, 16))).backward()
    received = {n for n, p in network.named_parameters() if p.grad is not None}
    assert received == trainable(network) and all(n.startswith(prefixes) for n in received)


def test_a_closed_group_of_gradual_unfreezing_closes_its_norms_too():
    """Dante keeps all norms trained while it freezes, so backward runs through everything and little is saved."""
    network = tiny.plain_unet()
    plan = planned(GradualUnfreezing(epochs=20), network)
    plan.set_stage(0)
    assert trainable(network) == {n for n, _ in network.named_parameters() if n.startswith("decoder.seg_layers")}
    plan.set_stage(19)
    assert trainable(network) == {n for n, _ in network.named_parameters()}


@pytest.mark.parametrize("epochs", [1, 5, 20, 200])
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_dante_mode_freezes_the_first_blocks_never_the_norms(epochs, fraction):
    network = tiny.plain_unet()
    plan = planned(DanteGradualUnfreezing(epochs=epochs, fraction=fraction), network)
    owners = [m for m in network.modules() if list(m.parameters(recurse=False))]
    plan.set_stage(0)
    for i, module in enumerate(owners):
        frozen = i < int(fraction * len(owners)) and not isinstance(module, nn.InstanceNorm3d)
        assert all(p.requires_grad != frozen for p in module.parameters(recurse=False))
    ids = [id(p) for g in plan.groups for _, p in g.parameters]
    assert len(ids) == len(set(ids))


def test_set_stage_says_whether_it_changed_anything_and_drops_stale_gradients():
    network = tiny.plain_unet()
    plan = planned(GradualUnfreezing(epochs=20), network)
    assert plan.set_stage(0) and not plan.set_stage(1) and plan.set_stage(19)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    plan.set_stage(0)
    assert all((p.grad is None) != p.requires_grad for p in network.parameters())


def test_fine_tune_is_slower_towards_the_input():
    scales = FineTune().plan(tiny.plain_unet()).lr_scales
    assert scales[0] == 1 and scales[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(scales, scales[1:]))


def test_overrides_reach_the_methods_that_know_them():
    overrides = {"epochs": 7, "lr": 0.5, "rank": 3, "alpha": 1.5, "iterations": 9}
    lora = LoRA().with_overrides(overrides)
    assert (lora.epochs, lora.lr, lora.rank, lora.alpha) == (7, 0.5, 3, 1.5)
    assert HeadOnly().with_overrides(overrides).epochs == 7


def test_nonsense_is_refused_where_it_is_said():
    with pytest.raises(ConfigurationError, match="LoRA: lr is -1"):
        LoRA(lr=-1)
    with pytest.raises(ConfigurationError, match="epochs is 0"):
        HeadOnly(epochs=0)


def test_primus_is_served_by_lora_and_by_gradual_unfreezing():
    network = tiny.primus()
    planned(LoRA(rank=1), network)
    assert any("eva.blocks.0" in n for n in adapted(network))
    assert len(GradualUnfreezing(epochs=20).plan(tiny.primus()).schedule.stages) == 5
