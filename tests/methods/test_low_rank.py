from __future__ import annotations

import pytest
import tiny
from torch import nn

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods import LPFT, DoRA, LoRA
from nnunet_dante.peft.inject import adapted, settings, update


def planned(method: LoRA, network: nn.Module):
    method.adapt(network)
    plan = method.plan(network)
    plan.restrict(network)
    return plan


def trainable(network: nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


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
