from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nnunet_dante import BitFit, ConvAdapter, DecoderOnly, DoRA, GradualUnfreezing, LoRA, NormAffine
from nnunet_dante.peft.convolution import spare_gradients
from nnunet_dante.peft.inject import attach, merge, original
from nnunet_dante.peft.update import PointwiseDelta


def adapted(dim=2, *, dtype=torch.float64, **options):
    torch.manual_seed(0)
    conv = getattr(nn, f"Conv{dim}d")(4, 6, options.pop("kernel", 3), dtype=dtype, **options)
    update = PointwiseDelta(conv.weight.shape)
    network = nn.Sequential(conv)
    attach(network, {conv: update})
    spare_gradients(network)
    nn.init.normal_(update.pointwise)
    return conv, update.to(dtype)


def stock(conv, x):
    """The same layer as torch runs it, gradient of the whole kernel and all."""
    return parametrize.type_before_parametrizations(conv)._conv_forward(
        conv, x, conv.parametrizations.weight(), conv.bias)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2},
                                     {"padding": 1, "groups": 2}, {"padding": 1, "bias": False}, {"padding": 0},
                                     {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"},
                                     {"kernel": 1, "stride": 2}])
@pytest.mark.parametrize("input_requires_grad", [True, False])
def test_output_and_gradients_are_the_stock_layers(dim, options, input_requires_grad):
    conv, update = adapted(dim, **options)
    x = torch.rand(2, 4, *[7, 8, 9][:dim], dtype=torch.float64, requires_grad=input_requires_grad)
    wanted = [t for t in (x, conv.bias, update.pointwise) if t is not None and t.requires_grad]
    y, expected = conv(x), stock(conv, x)
    weight = torch.rand_like(y)
    assert torch.equal(y, expected)
    for got, true in zip(torch.autograd.grad(y, wanted, weight), torch.autograd.grad(expected, wanted, weight)):
        assert got.shape == true.shape and torch.allclose(got, true)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_input_without_a_batch_axis_is_taken_as_torch_takes_it(dim):
    conv, update = adapted(dim, padding=1)
    x = torch.rand(4, *[7, 8, 9][:dim], dtype=torch.float64, requires_grad=True)
    y, expected = conv(x), stock(conv, x)
    assert y.shape == (6, *x.shape[1:]) and torch.equal(y, expected)
    for got, true in zip(*(torch.autograd.grad(z.square().sum(), (x, update.pointwise)) for z in (y, expected))):
        assert torch.equal(got, true)


def test_an_empty_batch_is_taken_too():
    conv, update = adapted(2, padding=1)
    y = conv(torch.rand(0, 4, 5, 5, dtype=torch.float64))
    y.sum().backward()
    assert y.shape == (0, 6, 5, 5) and not update.pointwise.grad.any()


def test_gradcheck():
    conv, update = adapted(2, padding=1, stride=2)
    x = torch.rand(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    name = "parametrizations.weight.0.pointwise"
    assert torch.autograd.gradcheck(lambda x, p, b: functional_call(conv, {name: p, "bias": b}, (x,)),
                                    (x, update.pointwise, conv.bias))


def test_only_small_gradients_are_made():
    conv, update = adapted(3, padding=1)
    conv(torch.rand(1, 4, 5, 5, 5, dtype=torch.float64)).sum().backward()
    assert original(conv).grad is None and update.pointwise.grad is not None


def test_an_original_that_wants_a_gradient_gets_the_whole_one():
    conv, _ = adapted(padding=1)
    original(conv).requires_grad_(True)
    x = torch.rand(1, 4, 5, 5, dtype=torch.float64)
    got, true = (torch.autograd.grad(run.square().sum(), original(conv))[0] for run in (conv(x), stock(conv, x)))
    assert true.abs().sum() > 0 and torch.equal(got, true)


def test_autocast_gives_the_dtypes_and_numbers_of_the_stock_layer():
    conv, update = adapted(dtype=torch.float32, padding=1)
    x = torch.rand(2, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = conv(x), stock(conv, x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    wanted = [x, update.pointwise, conv.bias]
    for got, true in zip(torch.autograd.grad(y.float().sum(), wanted), torch.autograd.grad(expected.float().sum(), wanted)):
        assert got.dtype == torch.float32 and torch.allclose(got, true, rtol=0.02, atol=0.1)


def prepared(method, network):
    method.adapt(network)
    plan = method.plan(network)
    plan.restrict(network)
    return plan


def as_torch_runs_it(network):
    """A copy whose convolutions are stock, or those of `parametrize`."""
    stock = copy.deepcopy(network)
    for module in stock.modules():
        module.__dict__.pop("_conv_forward", None)
    return stock


def step(network):
    """The gradients of a step by name, and what forward and backward multiply."""
    dim = 3 if any(isinstance(m, nn.Conv3d) for m in network.modules()) else 2
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        sum(y.square().mean() for y in network(torch.rand(2, 1, *[16] * dim))).backward()
    return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}, counter.get_total_flops()


def same(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-4, atol=1e-6) for n in a)


@pytest.mark.parametrize("build", [tiny.plain_unet, tiny.residual_unet])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("method", [DecoderOnly(), LoRA(encoder=False), LoRA(encoder=False, factorisation="flat"),
                                    DoRA(encoder=False), ConvAdapter(), BitFit()], ids=repr)
def test_the_gradients_are_the_stock_ones_for_less(method, build, dim):
    network = build(dim)
    prepared(method, network)
    (got, flops), (true, all_flops) = step(network), step(as_torch_runs_it(network))
    # The gradient of a bias alone costs only on a CPU, and where no count of multiplications sees it.
    assert got and same(got, true) and (flops < all_flops or isinstance(method, BitFit) and flops == all_flops)


def kept_bytes(network):
    """What a forward pass keeps for backward, each memory once."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = tensor, storage.nbytes()  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(torch.rand(2, 1, 16, 16))
    assert outputs
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("method", [NormAffine(), BitFit()], ids=repr)
def test_frozen_kernels_keep_no_input(method):
    network = tiny.plain_unet(2)
    prepared(method, network)
    stock = as_torch_runs_it(network)
    assert kept_bytes(network) < kept_bytes(stock)
    assert same(step(network)[0], step(stock)[0])


@pytest.mark.parametrize("direction", ["output_first", "input_first"])
def test_every_stage_of_a_schedule_gives_the_stock_gradients(direction):
    network = tiny.plain_unet(2)
    method = GradualUnfreezing(epochs=20, direction=direction)
    plan, spared = prepared(method, network), []
    for stage in plan.schedule.stages:
        plan.set_stage(stage.first_epoch)
        network.zero_grad()
        (got, flops), (true, all_flops) = step(network), step(as_torch_runs_it(network))
        assert same(got, true)
        spared.append(all_flops - flops)
    assert spared[-1] == 0 and (max(spared) > 0) == (direction == "output_first")


def test_stages_read_their_own_features_first():
    """What `spare_gradients` takes the order of a decoder's concatenation from."""
    network = tiny.residual_unet(2)
    read = {}
    for up, stage in zip(network.decoder.transpconvs, network.decoder.stages):
        up.register_forward_hook(lambda up, _, y: read.update({id(up): y}))
        stage.register_forward_pre_hook(
            lambda _, inputs, up=up: read.update({up: torch.equal(inputs[0][:, :up.out_channels], read[id(up)])}))
    network(torch.rand(1, 1, 16, 16))
    assert [read[up] for up in network.decoder.transpconvs] == [True, True]


def test_torch_is_never_asked_for_the_gradient_of_a_bias_without_its_kernel():
    network = tiny.plain_unet(2)
    prepared(BitFit(), network)
    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution_backward.default and not args[7]:
                asked.append(args[10])
            return function(*args, **kwargs or {})

    with Asked():
        network(torch.rand(1, 1, 16, 16))[0].sum().backward()
    assert len(asked) > 1 and not any(bias and not kernel for _, kernel, bias in asked)


def test_a_copy_trains_itself_and_merging_leaves_a_stock_layer():
    network = tiny.plain_unet(2)
    prepared(ConvAdapter(), network)
    twin = copy.deepcopy(network)
    x = torch.rand(2, 1, 16, 16)
    twin(x)[0].sum().backward()
    grads = {n for n, p in twin.named_parameters() if p.grad is not None}
    assert any("pointwise" in n for n in grads) and all(p.grad is None for p in network.parameters())
    merge(network)
    with torch.no_grad():
        assert {type(m).__name__ for m in network.modules() if isinstance(m, nn.Conv2d)} == {"Conv2d"}
        assert torch.equal(network(x)[0], twin(x)[0])


@pytest.mark.parametrize("method", [ConvAdapter(), BitFit(), DecoderOnly(), NormAffine()], ids=repr)
def test_one_graph_forward_and_backward_under_compile(method):
    torch._dynamo.reset()  # it counts the networks that other tests have compiled
    network = tiny.plain_unet(2)
    prepared(method, network)
    compiled, x = torch.compile(network, backend="aot_eager", fullgraph=True), torch.rand(2, 1, 16, 16)
    trained = [p for p in network.parameters() if p.requires_grad]
    got, true = (torch.autograd.grad(sum(y.square().mean() for y in run(x)), trained) for run in (compiled, network))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, true))


@pytest.mark.parametrize("method", [ConvAdapter(), BitFit(), DecoderOnly()], ids=repr)
def test_a_compiled_graph_holds_torchs_own_convolutions(method):
    """Some versions of torch split graphs for DDP and refuse a function with a backward of its own inside."""
    torch._dynamo.reset()
    network, seen = tiny.plain_unet(2), []
    prepared(method, network)

    def look(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(network, backend=look, fullgraph=True)(torch.rand(2, 1, 16, 16))
    assert torch.conv2d in seen and not any("autograd_function" in str(target) for target in seen)
