from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.peft.inject import attach
from nnunet_dante.peft.pointwise import PointwiseDelta, has_centre


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, (1, 3, 5)])
@pytest.mark.parametrize(("groups", "dilation", "mode"), [(1, 1, "zeros"), (2, 1, "reflect"), (1, 2, "zeros")])
def test_it_is_a_parallel_1x1_convolution(dim, stride, kernel, groups, dilation, mode):
    sizes = kernel[:dim] if isinstance(kernel, tuple) else (kernel,) * dim
    conv = getattr(nn, f"Conv{dim}d")(4, 6, sizes, stride=stride, padding=[k // 2 * dilation for k in sizes],
                                      groups=groups, dilation=dilation, padding_mode=mode)
    x = torch.rand(2, 4, *[11] * dim)
    before = conv(x)
    update = PointwiseDelta(conv.weight.shape)
    attach(conv_in := nn.Sequential(conv), {conv: update})
    assert torch.equal(conv_in(x), before)
    nn.init.normal_(update.pointwise)
    parallel = getattr(functional, f"conv{dim}d")(x, update.pointwise.reshape(6, 4 // groups, *[1] * dim),
                                                  stride=stride, groups=groups)
    assert torch.allclose(conv_in(x), before + parallel, atol=1e-5)


def test_even_kernels_and_linear_layers_have_no_centre():
    assert has_centre((8, 4, 3, 1)) and not has_centre((8, 4, 3, 2)) and not has_centre((8, 4))
    with pytest.raises(ConfigurationError, match="all odd"):
        PointwiseDelta((8, 4, 2, 2))
