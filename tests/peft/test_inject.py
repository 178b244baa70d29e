"""The identities that make an adapted network a stock network from the outside."""

from __future__ import annotations

import copy
import io
import json

import pytest
import tiny
import torch
from torch import nn

from nnunet_dante.errors import InjectionError
from nnunet_dante.methods.groups import low_rank_targets
from nnunet_dante.peft.inject import adapted, attach, factors, inject, load_split, merge, original, remove, settings
from nnunet_dante.peft.low_rank import DecomposedLowRank, LowRankDelta, capped_rank
from nnunet_dante.peft.update import PointwiseDelta, has_centre

NETWORKS = {
    "plain 3d": lambda: (tiny.plain_unet(3), (1, 1, 16, 16, 16)),
    "plain 2d": lambda: (tiny.plain_unet(2), (1, 1, 16, 16)),
    "residual 3d": lambda: (tiny.residual_unet(3), (1, 1, 16, 16, 16)),
    "residual 2d": lambda: (tiny.residual_unet(2, channels=3), (1, 3, 16, 16)),
    "anisotropic": lambda: (tiny.plain_unet(3, kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]],
                                            strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]]), (1, 1, 8, 16, 16)),
    "primus": lambda: (tiny.primus(), (1, 1, 16, 16, 16)),
}
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = [
    *[(f"Conv{d}d", d, {"stride": s, "groups": g, "padding": 1, "padding_mode": m, "dilation": dil})
      for d in (1, 2, 3) for s, g, m, dil in [(1, 1, "zeros", 1), (2, 2, "reflect", 1), (1, 4, "replicate", 2)]],
    *[(f"ConvTranspose{d}d", d, {"stride": s, "groups": g}) for d in (1, 2, 3) for s, g in [(1, 1), (2, 2)]],
    ("Linear", 0, {}),
]


def base_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: original(module).detach() for name, module in adapted(network).items()}


def output(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = network.eval()(x)
    return y[0] if isinstance(y, list) else y


def stir(network: nn.Module) -> None:
    """Give every factor values, as training would."""
    with torch.no_grad():
        for factor in factors(network).values():
            factor.normal_()


@pytest.fixture(params=NETWORKS)
def case(request):
    torch.manual_seed(0)
    network, shape = NETWORKS[request.param]()
    return network, copy.deepcopy(network), torch.rand(shape)


def inject_all(network: nn.Module, **options) -> tuple[str, ...]:
    return inject(network, low_rank_targets(network), **({"rank": 2} | options))


def update_of(kind: str, module: nn.Module, **options):
    """The update of a layer, or None where it has none of this kind."""
    shape = module.weight.shape
    if kind == "conv_adapter":
        return PointwiseDelta(shape) if has_centre(shape) and type(module) in CONVS else None
    if not capped_rank(shape, options.get("rank", 2), **{k: v for k, v in options.items() if k == "factorisation"}):
        return None
    if kind == "dora":
        options |= {"groups": getattr(module, "groups", 1), "transposed": "Transpose" in type(module).__name__}
    return {"lora": LowRankDelta, "dora": DecomposedLowRank}[kind](shape, **({"rank": 2} | options))


@pytest.fixture(params=["lora", "dora", "conv_adapter"])
def add(request):
    """What gives all layers of a network their update."""
    def add_to(network: nn.Module) -> tuple[str, ...]:
        updates = {m: u for m in low_rank_targets(network) if (u := update_of(request.param, m))}
        return attach(network, updates) if updates else pytest.skip("no layer of this network has such an update")
    return add_to


def test_injecting_changes_nothing_bit_for_bit(case, add):
    network, stock, x = case
    names = add(network)
    assert names and torch.equal(output(network, x), output(stock, x))


def test_state_dict_has_the_stock_keys_in_the_stock_order(case, add):
    network, stock, _ = case
    add(network)
    assert list(network.state_dict()) == list(stock.state_dict())


def test_a_stock_network_with_the_state_dict_computes_the_live_output(case, add):
    network, stock, x = case
    add(network)
    stir(network)
    live = output(network, x)
    assert not torch.equal(live, output(stock, x))
    stock.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(output(stock, x), live)


def test_loading_stock_weights_makes_the_factors_a_no_op(case, add):
    network, stock, x = case
    add(network)
    stir(network)
    network.load_state_dict(stock.state_dict(), strict=True)
    assert torch.equal(output(network, x), output(stock, x))
    assert all(torch.equal(v, stock.state_dict()[k]) for k, v in base_weights(network).items())


def test_aliases_stay_one_tensor_so_files_do_not_grow(case, add):
    network, stock, _ = case
    sizes = []
    for n in (stock, network):
        if n is network:
            add(n)
        torch.save(n.state_dict(), buffer := io.BytesIO())
        sizes.append(buffer.tell())
    assert sizes[1] < 1.2 * sizes[0]


def test_merge_keeps_the_output_and_leaves_a_stock_network(case, add):
    network, stock, x = case
    add(network)
    stir(network)
    live = output(network, x)
    merge(network)
    assert torch.equal(output(network, x), live)
    assert is_stock(network, stock)


def test_remove_restores_the_base_bit_for_bit(case, add):
    network, stock, x = case
    add(network)
    stir(network)
    remove(network)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), stock.state_dict().values()))
    assert is_stock(network, stock)


def is_stock(network: nn.Module, stock: nn.Module) -> bool:
    return (not adapted(network) and not network._state_dict_hooks and not network._load_state_dict_pre_hooks
            and [(n, p.requires_grad) for n, p in network.named_parameters()]
            == [(n, p.requires_grad) for n, p in stock.named_parameters()]
            and [type(m) for m in network.modules()] == [type(m) for m in stock.modules()])


def test_a_deep_copy_is_independent(case, add):
    network, stock, x = case
    add(network)
    stir(network)
    live, twin = output(network, x), copy.deepcopy(network)
    remove(twin)
    assert torch.equal(output(twin, x), output(stock, x))
    assert torch.equal(output(network, x), live) and list(network.state_dict()) == list(stock.state_dict())


def test_base_and_factors_restore_the_network_exactly(case, add):
    network, _, x = case
    add(network)
    stir(network)
    live = output(network, x)
    base, kept = ({k: v.clone() for k, v in d.items()} for d in (base_weights(network), factors(network)))
    network.load_state_dict(network.state_dict())
    load_split(network, base=base, factors=kept)
    assert torch.equal(output(network, x), live)
    with pytest.raises(InjectionError, match="first"):
        load_split(network, base=base, factors=dict(list(kept.items())[1:]))


def test_settings_make_the_same_updates_again(case, add):
    network, stock, x = case
    add(network)
    stir(network)
    kinds = {c.KIND: c for c in (LowRankDelta, DecomposedLowRank, PointwiseDelta)}
    said = json.loads(json.dumps(settings(network)))
    merged = network.state_dict()
    for name, options in said.items():
        weight = base_weights(network)[name]
        made = kinds[options.pop("kind")](weight.shape, **options)
        made.load_state_dict({f: factors(network)[f"{name}.{f}"] for f in made.FACTORS})
        assert torch.equal(made.merged(weight), merged[name])


def test_only_the_originals_are_frozen_and_a_step_moves_only_factors(case, add):
    network, stock, x = case
    names = add(network)
    frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
    assert len(frozen) == len(names) and all(n.endswith("original") for n in frozen)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    y = network(x)
    sum(t.square().mean() for t in (y if isinstance(y, list) else [y])).backward()
    optimizer.step()
    assert not torch.equal(output(network, x), output(stock, x))
    assert all(torch.equal(v, stock.state_dict()[k]) for k, v in base_weights(network).items())


@pytest.mark.parametrize("update", [("lora", "channel"), ("lora", "flat"), ("dora", "channel"), ("dora", "flat"),
                                    ("conv_adapter",)], ids=" ".join)
@pytest.mark.parametrize(("kind", "dim", "options"), LAYERS)
def test_every_layer_kind(kind, dim, options, update):
    """Groups, linear layers and other padding modes crash or go wrong in Dante 1.0.3b3."""
    torch.manual_seed(0)
    layer = getattr(nn, kind)(8, 8, *([3] if dim else []), **options)
    network = nn.Sequential(layer)
    stock, x = copy.deepcopy(network), torch.rand(2, 8, *[9] * dim)
    made = update_of(update[0], layer, **({"rank": 1, "factorisation": update[1]} if update[1:] else {}))
    if made is None:
        pytest.skip("this layer has no such update")
    attach(network, {layer: made})
    assert torch.equal(output(network, x), output(stock, x))
    stir(network)
    live = output(network, x)
    assert not torch.equal(live, output(stock, x))
    stock.load_state_dict(network.state_dict())
    assert torch.equal(output(stock, x), live)
    merge(network)
    assert torch.equal(output(network, x), live)


@pytest.mark.parametrize(("kind", "dim", "options"), LAYERS)
def test_a_layer_can_be_the_whole_network(kind, dim, options):
    torch.manual_seed(0)
    layer = getattr(nn, kind)(8, 8, *([3] if dim else []), **options)
    stock, x = copy.deepcopy(layer), torch.rand(2, 8, *[9] * dim)
    assert inject(layer, [layer], rank=1) == ("weight",)
    assert list(layer.state_dict()) == list(stock.state_dict())
    assert list(nn.ModuleDict({"module": layer}).state_dict()) == [f"module.{key}" for key in stock.state_dict()]
    stir(layer)
    stock.load_state_dict(layer.state_dict())
    live = output(layer, x)
    assert torch.equal(output(stock, x), live)
    layer.load_state_dict(layer.state_dict())
    assert torch.equal(base_weights(layer)["weight"], stock.weight) and not layer.parametrizations.weight[0].delta().any()
    merge(layer)
    assert torch.equal(output(layer, x), live) and is_stock(layer, stock)


@pytest.mark.parametrize("update", [LowRankDelta, DecomposedLowRank])
def test_dropout_acts_in_training_only_and_never_on_the_stock_weights(update):
    torch.manual_seed(0)
    network = tiny.plain_unet(2)
    stock, x = copy.deepcopy(network), torch.rand(1, 1, 16, 16)
    bottleneck = network.encoder.stages[2][0].convs[0].conv
    attach(network, {bottleneck: update(bottleneck.weight.shape, rank=2, dropout=0.5)})
    stir(network)
    live = output(network, x)
    drawn = {network.train()(x)[0].sum().item() for _ in range(20)}
    assert 1 < len(drawn) <= 4  # two rank-one parts, each there or not
    stock.load_state_dict(network.state_dict())
    assert torch.equal(output(stock, x), live)
    merge(network)
    assert torch.equal(output(network, x), live)


def test_nnunets_own_loader_of_pretrained_weights(tmp_path):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    network, donor = tiny.plain_unet(), tiny.plain_unet()
    inject_all(network)
    stir(network)
    torch.save({"network_weights": donor.state_dict()}, tmp_path / "donor.pth")
    load_pretrained_weights(network, str(tmp_path / "donor.pth"))
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, donor.state_dict()[key]) or ".seg_layers." in key


def test_state_dict_keys_below_a_wrapper():
    network = tiny.plain_unet()
    inject_all(network)
    wrapped = nn.ModuleDict({"module": network})
    assert list(wrapped.state_dict()) == [f"module.{k}" for k in network.state_dict()]
    wrapped.load_state_dict(wrapped.state_dict(), strict=True)


def test_it_compiles_to_one_graph_and_keeps_its_keys(add):
    torch._dynamo.reset()  # it counts the networks that other tests have compiled
    network = tiny.plain_unet(2)
    add(network)
    stir(network)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    x = torch.rand(1, 1, 16, 16)
    assert torch.allclose(compiled(x)[0], network(x)[0], atol=1e-6)
    assert list(compiled._orig_mod.state_dict()) == list(tiny.plain_unet(2).state_dict())


def test_misuse_is_refused():
    network = tiny.plain_unet()
    with pytest.raises(InjectionError, match="not a layer of this PlainConvUNet"):
        inject(network, [nn.Conv3d(8, 8, 3)])
    with pytest.raises(InjectionError, match="call inject first"):
        merge(network)
    inject_all(network)
    with pytest.raises(InjectionError, match="adapted already"):
        inject_all(network)
