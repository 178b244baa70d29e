from __future__ import annotations

import pytest
import tiny

from nnunet_dante.peft.modes import all_requiring_gradients, evaluating


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_gradients_come_back_also_after_an_error(fails):
    network = tiny.plain_unet(2)
    network.encoder.eval().requires_grad_(False)
    modes, required = [m.training for m in network.modules()], [p.requires_grad for p in network.parameters()]
    try:
        with evaluating(network), all_requiring_gradients(network):
            assert not any(m.training for m in network.modules())
            assert all(p.requires_grad for p in network.parameters())
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == required
