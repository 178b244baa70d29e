"""Added modules: a no-op at the start, stock keys untouched, everything by identity."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from nnunet_dante.errors import ConfigurationError, InjectionError
from nnunet_dante.methods import AdaptFormer, SpatialAdapter
from nnunet_dante.methods.groups import blocks, stem_modules
from nnunet_dante.peft.added_modules import add_beside, added_modules, is_added
from nnunet_dante.peft.audit import audit_gradients


class Narrow(AdaptFormer):
    width, scale = 3, 1.0


class Empty(AdaptFormer):
    width = 0


METHODS = [SpatialAdapter(), AdaptFormer(), Narrow()]
NETWORKS = {"plain 2d": lambda: tiny.plain_unet(2), "plain 3d": tiny.plain_unet,
            "residual 2d": lambda: tiny.residual_unet(2), "residual 3d": tiny.residual_unet,
            "anisotropic": lambda: tiny.plain_unet(strides=[[1, 1, 1], [1, 2, 2], [2, 1, 2]],
                                                   kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]]),
            "primus": tiny.primus}

each_method = pytest.mark.parametrize("method", METHODS, ids=["spatial", "adaptformer", "narrow"])


def patch(network: nn.Module) -> torch.Tensor:
    dim = next(p.ndim for p in network.parameters() if p.ndim > 3) - 2
    return torch.rand(2, 1, *[16] * dim, generator=torch.Generator().manual_seed(0))


def outputs(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        y = network.eval()(x)
    return list(y) if isinstance(y, list | tuple) else [y]


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def moved(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give the added modules weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in added_modules(network).values():
            for p in module.parameters():
                p.copy_(torch.rand(p.shape, generator=generator) - 0.3)
    return network


@each_method
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_changes_at_the_start_and_everything_after_a_step(method, name):
    network = NETWORKS[name]()
    x, before, keys = patch(network), outputs(network, patch(network)), list(network.state_dict())
    state = torch.get_rng_state()
    method.adapt(network)
    assert torch.equal(state, torch.get_rng_state()), "adding draws from the training's random numbers"
    assert equal(outputs(network, x), before)
    assert [k for k in network.state_dict() if not is_added(k)] == keys and len(network.state_dict()) > len(keys)
    assert not torch.equal(outputs(moved(network), x)[0], before[0])


@each_method
@pytest.mark.parametrize("name", NETWORKS)
def test_every_trained_tensor_is_added_or_of_the_head_and_receives_a_gradient(method, name):
    network = NETWORKS[name]()
    method.adapt(network)
    plan = method.plan(network)
    plan.restrict(network)
    audit_gradients(network, patch(network))
    head = {id(p) for _, p in plan.groups[0].parameters} if plan.groups[0].name == "head" else set()
    trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    assert head and all(is_added(n) or id(p) in head for n, p in trained)
    assert {n for n, _ in trained} >= {n for n, _ in network.named_parameters() if is_added(n)}


@each_method
@pytest.mark.parametrize("name", NETWORKS)
def test_state_dicts_with_and_without_the_modules(method, name):
    """One with them restores them; a stock one makes them a no-op; one with half of them is refused."""
    network, x = NETWORKS[name](), patch(NETWORKS[name]())
    stock, before = copy.deepcopy(network.state_dict()), outputs(network, x)
    method.adapt(network)
    full = copy.deepcopy(moved(network).state_dict())
    after = outputs(network, x)
    network.load_state_dict(stock)
    assert equal(outputs(network, x), before)
    network.load_state_dict(full)
    assert equal(outputs(network, x), after)
    key = next(k for k in full if is_added(k) and k.endswith("up.weight"))
    with pytest.raises(RuntimeError, match="Missing key"):
        network.load_state_dict({k: v for k, v in full.items() if k != key})


@each_method
@pytest.mark.parametrize("name", ["plain 3d", "residual 2d"])
def test_a_copy_lives_by_itself_and_aliases_stay_aliases(method, name):
    network, x = NETWORKS[name](), patch(NETWORKS[name]())
    method.adapt(network)
    before = outputs(moved(network), x)
    other = copy.deepcopy(network)
    assert equal(outputs(other, x), before)
    assert not equal(outputs(moved(other, seed=1), x), before) and equal(outputs(network, x), before)
    for part in (network, other):
        state = part.state_dict()
        for key in [k for k in state if k.startswith("encoder.")]:
            assert state[key].data_ptr() == state[f"decoder.{key}"].data_ptr()


@each_method
@pytest.mark.parametrize("name", ["plain 3d", "residual 3d"])
def test_one_graph_under_compile(method, name):
    network, x = NETWORKS[name](), patch(NETWORKS[name]())
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    method.adapt(network)
    expected = outputs(moved(network), x)
    with torch.no_grad():
        assert equal(list(compiled(x)), expected)


@each_method
def test_two_builds_start_with_the_same_modules(method):
    first, second = tiny.plain_unet(), tiny.plain_unet()
    for network in (first, second):
        method.adapt(network)
    one, two = ([m.state_dict() for m in added_modules(n).values()] for n in (first, second))
    assert all(equal(list(a.values()), list(b.values())) for a, b in zip(one, two, strict=True))


@each_method
def test_adapting_again_changes_nothing_and_another_method_is_refused(method):
    network = tiny.plain_unet()
    method.adapt(network)
    names = list(added_modules(network))
    method.adapt(network)
    assert list(added_modules(network)) == names
    with pytest.raises(InjectionError, match="already"):
        add_beside(network, blocks(network))


def test_adaptformer_stands_beside_each_block_once_and_reads_the_image():
    for network, count in ((tiny.plain_unet(), 5), (tiny.residual_unet(), 6)):
        assert len(stem_modules(network)) == 1
        AdaptFormer().adapt(network)
        assert len(added_modules(network)) == count
        assert [m.weight.shape[1] for m in stem_modules(network)] == [1, 1]


def test_what_shapes_the_network_cannot_be_overridden_by_plans():
    """Plans may change after a training; a checkpoint must still find its network."""
    method = Narrow().with_overrides({"width": 5, "scale": 2.0, "lr": 0.5})
    assert (method.width, method.scale, method.lr) == (3, 1.0, 0.5)


def test_nonsense_is_refused():
    with pytest.raises(ConfigurationError, match="width=0"):
        Empty().adapt(tiny.plain_unet())
    for method in METHODS:
        with pytest.raises(ConfigurationError, match="the parts of a Sequential are not known"):
            method.adapt(nn.Sequential(nn.Conv3d(1, 1, 1)))
