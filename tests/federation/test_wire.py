"""wire.py and the bytes of a round: what arrives is read within bounds, and adapters are a small part of a network."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_dante.errors import FederationError
from nnunet_dante.federation.aggregate import trained_in
from nnunet_dante.federation.state import put, reordered, trained_tensors
from nnunet_dante.federation.wire import packed, unpacked
from nnunet_dante.methods import FineTune, LoRA

EXPECTED = {"w.lora_B": torch.arange(24.0).reshape(2, 3, 4), "norm.bias": torch.ones(5), "scale": torch.tensor(2.0)}


def as_bytes(tensors) -> dict[str, bytes]:
    found = {}
    for name, array in packed(tensors).items():
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        found[name] = stream.getvalue()
    return found


def test_what_is_sent_arrives_bit_for_bit():
    arrived = unpacked(as_bytes(EXPECTED), EXPECTED, whole=True)
    assert all(torch.equal(arrived[name], tensor) for name, tensor in EXPECTED.items())


def test_a_site_may_get_a_part_and_a_server_must_get_all():
    part = {"norm.bias": as_bytes(EXPECTED)["norm.bias"]}
    assert list(unpacked(part, EXPECTED, whole=False)) == ["norm.bias"]
    with pytest.raises(FederationError, match="does not send 'scale'.*2 names"):
        unpacked(part, EXPECTED, whole=True)


@pytest.mark.parametrize("header", ["(9000000000000,)", "(-5,)", "(5, 1)", "(5,"])
def test_a_header_that_claims_more_than_the_message_holds_takes_no_memory(header):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {header}, }}".ljust(117).encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(20)
    with pytest.raises(FederationError, match="norm.bias cannot be read"):
        unpacked({"norm.bias": data}, EXPECTED, whole=False)


def test_pickled_objects_are_refused():
    stream = io.BytesIO()
    np.save(stream, np.array([print] * 5, dtype=object), allow_pickle=True)
    with pytest.raises(FederationError, match="norm.bias cannot be read"):
        unpacked({"norm.bias": stream.getvalue()}, EXPECTED, whole=False)


@given(st.sampled_from(sorted(EXPECTED)), st.data())
def test_damaged_arrays_lead_to_an_error_or_to_a_tensor_of_the_right_shape(name, data):
    whole = bytearray(as_bytes(EXPECTED)[name])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[:data.draw(st.integers(0, len(whole)))]) if data.draw(st.booleans()) else bytes(whole)
    try:
        tensor = unpacked({name: cut}, EXPECTED, whole=False)[name]
    except FederationError:
        return
    assert tensor.shape == EXPECTED[name].shape and tensor.dtype == torch.float32


@given(st.binary(max_size=300))
def test_whatever_bytes_arrive_no_other_error_is_raised(data):
    with pytest.raises(FederationError):
        unpacked({"norm.bias": data}, EXPECTED, whole=False)


def test_rows_of_heads_come_back_after_two_changes_of_order():
    tensors, heads = {"head.weight": torch.randn(3, 2), "t": torch.randn(2, 3), "n": torch.randn(4)}, {"head.weight": 0, "t": 1}
    mine, theirs = ("background", "Spleen", "liver"), ("background", "liver", "spleen")
    there = reordered(tensors, heads, given=mine, wanted=theirs)
    assert torch.equal(there["head.weight"], tensors["head.weight"][[0, 2, 1]])
    assert torch.equal(there["t"], tensors["t"][:, [0, 2, 1]])
    back = reordered(there, heads, given=theirs, wanted=mine)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("method", [LoRA(rank=2), FineTune()])
def test_the_tensors_of_a_network_can_be_taken_and_put_back(method):
    one, other = tiny.plain_unet(), tiny.plain_unet()
    other.load_state_dict(one.state_dict())
    plans = []
    for network in (one, other):
        method.adapt(network)
        plans.append(method.plan(network))
    source = {name: torch.randn_like(tensor) for name, tensor in trained_tensors(one, plans[0]).items()}
    for network, plan in zip((one, other), plans):
        put(source, trained_tensors(network, plan))
    state = other.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in one.state_dict().items())


def test_bytes_of_a_round_for_the_default_network():
    """The default 3d_fullres network of six stages, 30.8 million weights, and LoRA of rank 8."""
    network = tiny.plain_unet(features=(32, 64, 128, 256, 320, 320), blocks=2)
    whole = sum(p.numel() for p in network.parameters()) * 4
    LoRA().adapt(network)
    tensors = trained_tensors(network, LoRA().plan(network))
    mib = {(averaging, round_): sum(tensors[n].nbytes for n in trained_in(tensors, averaging, round_)) / 2**20
           for averaging in ("alternating", "frozen") for round_ in (0, 1)}
    print({key: round(value, 3) for key, value in mib.items()}, whole / 2**20)
    assert 115 < whole / 2**20 < 121
    assert all(size < whole / 2**20 / 24 for size in mib.values())
