from __future__ import annotations

import pytest
import tiny
import torch

from nnunet_dante.training.finite import described, not_finite, not_finite_weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_tensors_are_named_each_once(value):
    network = tiny.plain_unet(2)
    assert not_finite_weights(network) == []
    with torch.no_grad():
        network.encoder.stages[0][0].convs[0].conv.weight[0, 0, 1, 1] = value
    assert not_finite_weights(network) == ["encoder.stages.0.0.convs.0.conv.weight"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 7, -1])
def test_one_wrong_number_among_many_of_any_kind_is_seen_and_large_ones_are_not_wrong(value, place):
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tensors = [(str(kind), torch.full((999,), torch.finfo(kind).max, dtype=kind)) for kind in kinds]
    assert not_finite([*tensors, ("none", torch.zeros(0))]) == []
    for name, tensor in tensors:
        tensor[place] = value
        assert not_finite(tensors) == [name]
        tensor[place] = -torch.finfo(tensor.dtype).max


def test_whole_numbers_and_nothing_are_finite():
    assert not_finite([("steps", torch.tensor([1, 2]))]) == not_finite([]) == []


def test_many_are_counted_and_some_shown():
    text = described([f"w{i}" for i in range(9)])
    assert text.startswith("9 tensors") and "w4, ..." in text and "w5" not in text
