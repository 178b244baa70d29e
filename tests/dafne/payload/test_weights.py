"""payload/weights.py: the arithmetic of Dafne's merging is exact, and only descendants of one base are mixed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import tiny
import torch
from shipped import Model, load


class IncompatibleModelError(Exception):
    pass


@pytest.fixture(autouse=True)
def interfaces(monkeypatch):
    """Stands for the one name that is imported from dafne_dl; test_in_dafne.py runs the real one."""
    module = ModuleType("dafne_dl.interfaces")
    module.IncompatibleModelError = IncompatibleModelError
    monkeypatch.setitem(sys.modules, "dafne_dl", ModuleType("dafne_dl"))
    monkeypatch.setitem(sys.modules, "dafne_dl.interfaces", module)


@pytest.fixture
def pair(tmp_path):
    a = load(tiny.write_model_folder(tmp_path))
    b, generator = a.copy(), torch.Generator().manual_seed(0)
    b.set_weights({k: v + torch.randn(v.shape, generator=generator) for k, v in a.get_weights().items()})
    return a, b


def assert_weights(model, expected):
    found = model.get_weights()
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_merging_is_the_mean_bit_for_bit(pair):
    a, b = pair
    merged = a.apply_delta(a.factor_multiply(a, 0.5), a.factor_multiply(b, 0.5))
    x, y = a.get_weights(), b.get_weights()
    assert_weights(merged, {k: x[k] * 0.5 + y[k] * 0.5 for k in x})


def test_a_delta_is_the_difference_and_leads_back(pair):
    a, b = pair
    delta = a.calc_delta(b, a)
    x, y = a.get_weights(), b.get_weights()
    assert_weights(delta, {k: y[k] - x[k] for k in x})
    assert delta.is_delta
    assert delta.timestamp_id == a.timestamp_id
    back = a.apply_delta(a, delta)
    assert not back.is_delta
    for key, value in back.get_weights().items():
        torch.testing.assert_close(value, y[key])


def test_a_threshold_drops_small_differences(pair):
    a, b = pair
    found = a.calc_delta(b, a, 0.5).get_weights()
    assert all(v.abs()[v != 0].min() >= 0.5 for v in found.values() if v.any())


def test_the_models_that_are_merged_stay_as_they_are(pair):
    a, b = pair
    x, y = a.get_weights(), b.get_weights()
    a.calc_delta(b, a)
    a.apply_delta(a, b)
    a.factor_multiply(a, 3)
    assert_weights(a, x)
    assert_weights(b, y)


def test_copies_share_no_memory(pair):
    a, _ = pair
    before, other = a.get_weights(), a.copy()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1)
    assert_weights(a, before)


@pytest.mark.parametrize("operation", ["calc_delta", "apply_delta"])
def test_models_of_different_bases_are_not_mixed(pair, operation):
    a, _ = pair
    other = Model(a.functions, model_id="another", weights=a.get_weights())
    with pytest.raises(IncompatibleModelError, match="another"):
        getattr(a, operation)(a, other)


@pytest.mark.parametrize("factor", ["2", None, torch.tensor(2.0)])
def test_only_numbers_multiply(pair, factor):
    with pytest.raises(NotImplementedError, match="int or a float"):
        pair[0].factor_multiply(pair[0], factor)


def test_counters_of_batch_norm_survive_merging(tmp_path):
    a = load(tiny.write_model_folder(tmp_path))
    a.model.register_buffer("counter", torch.tensor(3))
    half = a.factor_multiply
    weights = a.get_weights()

    class Stub:
        model_id, is_delta = "one", False

        def __init__(self, values=weights):
            self.values = values

        def get_weights(self):
            return {k: v.clone() for k, v in self.values.items()}

        def set_weights(self, values):
            self.values = values

        def get_empty_copy(self):
            return Stub()

    merged = a.apply_delta(half(Stub(), 0.5), half(Stub(), 0.5))
    assert int(merged.values["counter"]) == 3


@pytest.mark.parametrize("change", ["lacking", "surplus", "shape"])
def test_weights_of_another_network_are_refused(pair, change):
    a, _ = pair
    weights = a.get_weights()
    key = next(iter(weights))
    if change == "lacking":
        del weights[key]
    else:
        weights["more" if change == "surplus" else key] = torch.zeros(1)
    with pytest.raises(ValueError, match="not this network's"):
        a.set_weights(weights)
