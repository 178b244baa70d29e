"""Shipped: nnU-Net's U-Nets, with each weight under the one name that a stock state dict lists first.

Stock networks register a weight under up to four names and need a package that a Dafne client must not install: it
brings triton, which aborts a process with TensorFlow. These here
compute the same, operation for operation, from torch alone.
"""

from __future__ import annotations

import torch
from torch import nn


class ConvBlock(nn.Module):
    """Convolution, then norm and activation where the architecture has them; dropout does nothing at inference."""

    def __init__(self, net, inputs, outputs, kernel, stride, *, bias, activation=True):
        super().__init__()
        self.conv = getattr(nn, f"Conv{net['dimension']}d")(
            inputs, outputs, kernel, stride, padding=[(k - 1) // 2 for k in kernel], bias=bias)
        self.norm = getattr(nn, net["norm"])(outputs, **net["norm_kwargs"]) if net["norm"] else nn.Identity()
        active = activation and net["activation"]
        self.activation = getattr(nn, net["activation"])(**net["activation_kwargs"]) if active else nn.Identity()
        self.activation_first = net["activation_first"]

    def forward(self, x):
        """(batch, inputs, *space) -> (batch, outputs, *space / stride)."""
        x = self.conv(x)
        return self.norm(self.activation(x)) if self.activation_first else self.activation(self.norm(x))


class Added(nn.Module):
    """What nnunet_dante's SpatialAdapter and AdaptFormer add to a block: scale * up(ReLU(down(pool(x))))."""

    def __init__(self, net, inputs, width, outputs, kernel, *, stride=(), bias=True, scale=1.0):
        super().__init__()
        conv, pool = (getattr(nn, f"{name}{net['dimension']}d") for name in ("Conv", "AvgPool"))
        self.pool = pool(stride, stride) if any(n != 1 for n in stride) else nn.Identity()
        self.down = conv(inputs, width, kernel, padding=kernel // 2, bias=bias)
        self.up = conv(width, outputs, kernel, padding=kernel // 2, bias=bias)
        self.scale = scale

    def forward(self, x):
        """(batch, inputs, *space) -> (batch, outputs, *space / stride), to be added to what the block returns."""
        return self.scale * self.up(torch.relu(self.down(self.pool(x))))


def beside(net, block, inputs, outputs, stride):
    """Return the block, with a bottleneck beside it if the network is one of AdaptFormer."""
    if how := net.get("adaptformer"):
        block.adaptformer = Added(net, inputs, how["width"], outputs, 1, stride=stride, scale=how["scale"])
        block.register_forward_hook(lambda block, given, found: found + block.adaptformer(given[0]))
    return block


class ConvBlocks(nn.Module):
    """A stage of a PlainConvUNet."""

    def __init__(self, net, inputs, outputs, kernel, stride, count):
        super().__init__()
        unit = [1] * len(kernel)
        shapes = [(outputs if i else inputs, outputs, unit if i else stride) for i in range(count)]
        self.convs = nn.Sequential(*(
            beside(net, ConvBlock(net, i, o, kernel, step, bias=net["bias"]), i, o, step) for i, o, step in shapes))

    def forward(self, x):
        """Run the convolutions in turn; the first one strides."""
        return self.convs(x)


class ResidualBlock(nn.Module):
    """ResNet-D block of two convolutions, or of three around a bottleneck (He 2019, arXiv 1812.01187)."""

    def __init__(self, net, inputs, outputs, kernel, stride, bottleneck):
        super().__init__()
        unit, bias = [1] * len(kernel), net["bias"]
        last: nn.Module = nn.Identity()
        if bottleneck:
            self.conv1 = ConvBlock(net, inputs, bottleneck, unit, unit, bias=bias)
            self.conv2 = ConvBlock(net, bottleneck, bottleneck, kernel, stride, bias=bias)
            last = ConvBlock(net, bottleneck, outputs, unit, unit, bias=bias, activation=False)
        else:
            self.conv1 = ConvBlock(net, inputs, outputs, kernel, stride, bias=bias)
            self.conv2 = ConvBlock(net, outputs, outputs, kernel, unit, bias=bias, activation=False)
        self.conv3 = last
        self.activation = getattr(nn, net["activation"])(**net["activation_kwargs"]) if net["activation"] \
            else nn.Identity()
        skip: list[nn.Module] = []
        if any(s != 1 for s in stride):
            skip.append(getattr(nn, f"AvgPool{net['dimension']}d")(stride, stride))
        if inputs != outputs:
            skip.append(ConvBlock(net, inputs, outputs, unit, unit, bias=False, activation=False))
        self.skip = nn.Sequential(*skip)

    def forward(self, x):
        """Activation of the convolutions' sum with the (pooled, projected) input."""
        shortcut = self.skip(x)
        return self.activation(self.conv3(self.conv2(self.conv1(x))).add_(shortcut))


class ResidualBlocks(nn.Module):
    """A stage of a ResidualEncoderUNet's encoder."""

    def __init__(self, net, inputs, outputs, kernel, stride, count, bottleneck):
        super().__init__()
        unit = [1] * len(kernel)
        shapes = [(outputs if i else inputs, outputs, unit if i else stride) for i in range(count)]
        self.blocks = nn.Sequential(*(
            beside(net, ResidualBlock(net, i, o, kernel, step, bottleneck), i, o, step) for i, o, step in shapes))

    def forward(self, x):
        """Run the blocks in turn; the first one strides."""
        return self.blocks(x)


class Encoder(nn.Module):
    """From the image to the features of every resolution, finest first."""

    def __init__(self, net):
        super().__init__()
        inputs, stages, kernels = net["channels"], [], net["kernels"]
        if net["residual"]:
            unit = [1] * net["dimension"]
            self.stem = ConvBlocks(net, inputs, net["stem"], kernels[0], unit, 1)
            inputs = net["stem"]
        for s, outputs in enumerate(net["features"]):
            shape = (inputs, outputs, kernels[s], net["strides"][s], net["blocks"][s])
            stages.append(ResidualBlocks(net, *shape, net["bottlenecks"][s]) if net["residual"]
                          else nn.Sequential(ConvBlocks(net, *shape)))
            inputs = outputs
        self.stages = nn.Sequential(*stages)

    def forward(self, x):
        """Return the list of feature maps."""
        x = self.stem(x) if hasattr(self, "stem") else x
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """From the features back to the logits; a head for each resolution, of which only the finest is used."""

    def __init__(self, net):
        super().__init__()
        conv, up = (getattr(nn, f"{name}{net['dimension']}d") for name in ("Conv", "ConvTranspose"))
        stages, transposed, heads, features = [], [], [], net["features"]
        for s in range(len(features) - 1, 0, -1):
            below, skip, stride = features[s], features[s - 1], net["strides"][s]
            transposed.append(up(below, skip, stride, stride, bias=net["bias"]))
            count = net["decoder_blocks"][len(features) - 1 - s]
            stages.append(ConvBlocks(net, 2 * skip, skip, net["kernels"][s - 1], [1] * len(stride), count))
            heads.append(conv(skip, net["heads"], 1, bias=True))
        self.stages, self.transpconvs, self.seg_layers = map(nn.ModuleList, (stages, transposed, heads))
        if net.get("spatial_adapter"):
            last, n = stages[-1], features[0]
            last.spatial_adapter = Added(net, n, n, n, 3, bias=False)
            last.register_forward_hook(lambda stage, _, found: found + stage.spatial_adapter(found))

    def forward(self, features):
        """Return logits (batch, heads, *space) at full resolution."""
        x = features[-1]
        for stage, up, skip in zip(self.stages, self.transpconvs, reversed(features[:-1])):
            x = stage(torch.cat((up(x), skip), 1))
        return self.seg_layers[-1](x)


class UNet(nn.Module):
    """PlainConvUNet or ResidualEncoderUNet; `settings` says all that Dafne's functions need to know about it."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings["architecture"])
        self.decoder = Decoder(settings["architecture"])

    def forward(self, x):
        """(batch, channels, *space) -> logits (batch, heads, *space)."""
        return self.decoder(self.encoder(x))


def build(settings):
    """Return the network in evaluation mode, all weights zero, drawing no random numbers.

    Dafne builds the network three times for a merge and fills it afterwards; a file that lost its weights must
    segment nothing rather than something at random.
    """
    with torch.device("meta"):
        network = UNet(settings)
    network.to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.detach().zero_()
    return network.eval()
