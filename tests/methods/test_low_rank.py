from __future__ import annotations

import pytest
import tiny
from tiny import planned, trainable
from torch import nn

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods import LPFT, DoRA, LoRA
from nnunet_dante.peft.inject import adapted, settings, update


def test_dora_adapts_what_lora_adapts_and_knows_each_layers_outputs():
    plain, decomposed = tiny.residual_unet(), tiny.residual_unet()
    planned(LoRA(rank=1), plain)
    planned(DoRA(rank=1), decomposed)
    assert list(adapted(plain)) == list(adapted(decomposed))
    for module in adapted(decomposed).values():
        assert update(module).magnitude.shape == (module.out_channels,)
    assert {s["kind"] for s in settings(decomposed).values()} == {"dora"}


@pytest.mark.parametrize(("epochs", "share", "switch"), [(100, 0.2, 20), (3, 0.2, 1), (1, 0.2, 0), (10, 0.0, 0),
                                                         (2, 0.99, 1)])
def test_lpft_trains_the_heads_until_the_switch_then_all_that_lora_trains(epochs, share, switch):
    network, lora = tiny.plain_unet(), tiny.plain_unet()
    plan = planned(LPFT(rank=1, epochs=epochs, head_share=share), network)
    planned(LoRA(rank=1), lora)
    for epoch in range(epochs):
        plan.set_stage(epoch)
        heads = {n for n, _ in network.named_parameters() if n.startswith("decoder.seg_layers")}
        assert trainable(network) == (heads if epoch < switch else trainable(lora))


def test_lpft_must_come_to_its_second_part():
    with pytest.raises(ConfigurationError, match="head_share is 1"):
        LPFT(head_share=1)


def wanted_ranks(network: nn.Module) -> dict[str, int]:
    return {name: s["rank"] for name, s in settings(network).items()}


def test_ranks_by_pattern_the_first_that_matches_counts():
    network = tiny.residual_unet(features=(16, 16, 16))
    planned(LoRA(rank=3, factorisation="flat", ranks={"decoder.stages.0.*": 2, "decoder.*": 4, "encoder.stages.2*": 1}),
            network)
    for name, rank in wanted_ranks(network).items():
        assert rank == (2 if name.startswith("decoder.stages.0.") else 4 if name.startswith("decoder.") else
                        1 if name.startswith("encoder.stages.2") else 3)
        assert update(adapted(network)[name]).scale == 16 / rank
    assert set(wanted_ranks(network).values()) == {1, 2, 3, 4}


def test_targets_by_pattern_leave_the_other_weights_frozen_and_small_tensors_trained():
    every, some = tiny.plain_unet(), tiny.plain_unet()
    planned(LoRA(rank=1), every)
    planned(LoRA(rank=1, targets=["decoder.transpconvs.*", "encoder.stages.1*"]), some)
    assert set(adapted(some)) == {n for n in adapted(every) if n.startswith(("decoder.transpconvs", "encoder.stages.1"))}
    small = {n for n in trainable(every) if "parametrizations" not in n}
    assert {n for n in trainable(some) if "parametrizations" not in n} == small


def test_layers_that_factors_cannot_spare_are_trained_in_full_where_they_are_targets_only():
    networks = [tiny.residual_unet(features=(4, 8, 12)) for _ in range(2)]
    planned(LoRA(rank=1), networks[0])
    planned(LoRA(rank=1, targets=("encoder.*",)), networks[1])
    decoder = [{n for n in trainable(network) if n.startswith("decoder.stages") and n.endswith("conv.weight")}
               for network in networks]
    assert not decoder[1]
    assert {n for n in adapted(networks[0]) if n.startswith("encoder")} == set(adapted(networks[1]))


@pytest.mark.parametrize("option", ["targets", "ranks"])
def test_a_pattern_that_matches_nothing_is_refused_with_names(option):
    method = LoRA(**{option: {"decoder.*": 1, "dekoder.*": 2} if option == "ranks" else ("decoder.*", "dekoder.*")})
    with pytest.raises(ConfigurationError, match=rf"{option}: 'dekoder.\*' matches none of the .*transpconvs"):
        method.adapt(tiny.plain_unet())


@pytest.mark.parametrize(("options", "named"), [
    ({"targets": "decoder.*"}, "targets is 'decoder"), ({"targets": ()}, "targets"), ({"lr_ratio": 0}, "lr_ratio is 0"),
    ({"dropout": 1}, "dropout is 1"), ({"full_decoder": True, "encoder": False}, "nnUNetTrainerDecoderOnly")])
def test_options_that_cannot_work_are_refused(options, named):
    with pytest.raises(ConfigurationError, match=named):
        LoRA(**options)


def test_the_stabilised_scale_divides_by_the_root_of_the_rank():
    network = tiny.plain_unet()
    planned(LoRA(rank=4, alpha=6.0, rank_stabilised=True), network)
    assert {update(m).scale for m in adapted(network).values()} == {3.0}


@pytest.mark.parametrize("method", [LoRA(rank=1, lr=1e-3, lr_ratio=0.25), LPFT(rank=1, lr=1e-3, lr_ratio=0.25, epochs=10),
                                    DoRA(rank=1, lr=1e-3, lr_ratio=0.25)])
def test_the_ratio_sets_the_rate_of_lora_b_alone(method):
    network = tiny.residual_unet()
    plan = planned(method, network)
    names = {id(p): n for n, p in network.named_parameters()}
    groups = plan.optimiser_groups()
    assert groups[0]["name"] == "head"
    for group in groups:
        for p in group["params"]:
            assert group["lr_scale"] == (0.25 if names[id(p)].endswith("lora_B") else 1)
    plan.set_stage(9)
    assert trainable(network) == {names[id(p)] for g in groups for p in g["params"]}


def test_full_decoder_trains_the_decoder_as_it_is_and_the_encoder_low_rank():
    network = tiny.residual_unet()
    planned(LoRA(rank=1, full_decoder=True), network)
    assert adapted(network) and all(n.startswith("encoder") for n in adapted(network))
    assert {n for n, _ in network.named_parameters() if n.startswith("decoder")} <= trainable(network)


def test_with_and_without_encoder_share_the_layers_among_them():
    every, decoder, encoder = (tiny.plain_unet() for _ in range(3))
    planned(LoRA(rank=1), every)
    planned(LoRA(rank=1, encoder=False), decoder)
    planned(LoRA(rank=1, full_decoder=True), encoder)
    assert set(adapted(every)) == set(adapted(decoder)) | set(adapted(encoder))
    assert not set(adapted(decoder)) & set(adapted(encoder))
