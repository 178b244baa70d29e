"""Which parameters the selective methods train."""

from __future__ import annotations

import pytest
import tiny
from torch import nn

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods import BitFit, ConvAdapter, DecoderOnly, NormAffine
from nnunet_dante.peft.inject import adapted

NETWORKS = {"plain": tiny.plain_unet, "residual": tiny.residual_unet, "2d": lambda: tiny.plain_unet(2),
            "primus": tiny.primus}


def trained(method, network: nn.Module) -> set[str]:
    plan = method.plan(network)
    plan.restrict(network)
    return {name for name, p in network.named_parameters() if p.requires_grad}


def heads(network: nn.Module) -> set[str]:
    last = "up_projection" if hasattr(network, "up_projection") else "decoder.seg_layers"
    names = [n for n, _ in network.named_parameters() if n.startswith(last)]
    return set(names) if last != "up_projection" else set(names[-2:])


@pytest.mark.parametrize("name", NETWORKS)
def test_bitfit_trains_biases_and_heads_alone(name):
    network = NETWORKS[name]()
    names = {n for n, _ in network.named_parameters()}
    assert trained(BitFit(), network) == {n for n in names if n.endswith("bias")} | heads(network)


@pytest.mark.parametrize("name", NETWORKS)
def test_norm_affine_trains_norms_and_heads_alone(name):
    network = NETWORKS[name]()
    norms = {n for n, p in network.named_parameters() if n.endswith((".weight", ".bias")) and p.ndim == 1
             and (n.split(".")[-2].startswith("norm") or ".decode.0.1." in n or ".decode.1.1." in n)}
    assert len(norms) > 8 and trained(NormAffine(), network) == norms | heads(network)


@pytest.mark.parametrize("method", [BitFit, NormAffine])
def test_full_decoder_adds_the_decoder_and_nothing_else(method):
    alone, decoder, both = (trained(m, tiny.residual_unet())
                            for m in (method(), DecoderOnly(), method(full_decoder=True)))
    assert both == alone | decoder and both > alone


def test_a_network_without_affine_norms_is_refused():
    network = tiny.plain_unet()
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d):
            module.weight = module.bias = None
    with pytest.raises(ConfigurationError, match="nothing that this method trains besides the head"):
        NormAffine().plan(network)


@pytest.mark.parametrize("network", [tiny.plain_unet(), tiny.residual_unet(), tiny.plain_unet(2)])
def test_every_convolution_but_the_heads_is_adapted_and_nothing_else_is_trained(network):
    convs = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    heads = list(network.decoder.seg_layers)
    method = ConvAdapter()
    method.adapt(network)
    assert {id(m) for m in adapted(network).values()} == {id(m) for m in convs} - {id(m) for m in heads}
    plan = method.plan(network)
    plan.restrict(network)
    names = {n for n, p in network.named_parameters() if p.requires_grad}
    assert all(n.endswith("pointwise") or n.startswith("decoder.seg_layers") for n in names)
    assert sum(n.endswith("pointwise") for n in names) == len(adapted(network))


def test_even_kernels_stay_frozen():
    network = tiny.plain_unet(kernels=[[3, 3, 3], [3, 3, 3], [2, 2, 2]])
    ConvAdapter().adapt(network)
    assert len(adapted(network)) > 2 and not any(2 in m.weight.shape[2:] for m in adapted(network).values())


def test_a_network_without_odd_kernels_is_refused():
    with pytest.raises(ConfigurationError, match="nnUNetTrainerLoRA"):
        ConvAdapter().adapt(tiny.primus())


def test_full_decoder_trains_the_decoder_as_it_is():
    network = tiny.residual_unet()
    method = ConvAdapter(full_decoder=True)
    method.adapt(network)
    method.plan(network).restrict(network)
    assert adapted(network) and all(n.startswith("encoder") for n in adapted(network))
    assert {n for n, p in network.named_parameters() if n.startswith("decoder")} == {
        n for n, p in network.named_parameters() if p.requires_grad and not n.endswith("pointwise")}
