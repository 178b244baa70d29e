import pytest
import tiny
from torch import nn

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods.groups import head_modules, low_rank_targets, parameter_groups, stem_modules
from nnunet_dante.peft.inject import inject

NETWORKS = {"plain": tiny.plain_unet, "residual": tiny.residual_unet, "plain 2d": lambda: tiny.plain_unet(2),
            "primus": tiny.primus}
UNET = ["head", "decoder.0", "decoder.1", "bottleneck", "encoder.1", "encoder.0"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("adapted", [False, True])
def test_groups_are_disjoint_and_complete(name, adapted):
    network = NETWORKS[name]()
    if adapted:
        inject(network, low_rank_targets(network), rank=1)
    groups = parameter_groups(network)
    found = [id(p) for g in groups for _, p in g.parameters]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in network.parameters()}
    names = dict(network.named_parameters())
    assert all(names[n] is p for g in groups for n, p in g.parameters)
    assert [g.name for g in groups] == (["head", "decoder", "block.1", "block.0", "stem"] if name == "primus" else UNET)


def test_order_is_depth_not_registration():
    """decoder.parameters() holds the encoder too, and stages are registered deepest first."""
    network = tiny.plain_unet(features=(4, 8, 12))
    groups = {g.name: g for g in parameter_groups(network)}
    widths = {name: max(p.shape[0] for _, p in g.parameters if p.ndim > 1) for name, g in groups.items()}
    assert widths["decoder.0"] == 8 and widths["decoder.1"] == 12  # transposed convs are stored (in, out)
    assert widths["bottleneck"] == 12 and widths["encoder.1"] == 8 and widths["encoder.0"] == 4
    assert not any(n.startswith("encoder") for n, _ in groups["decoder.0"].parameters)


def test_factors_are_in_the_group_of_their_module():
    network = tiny.residual_unet()
    before = {g.name: {n.rsplit(".", 1)[0] for n, _ in g.parameters} for g in parameter_groups(network)}
    inject(network, low_rank_targets(network), rank=1)
    for group in parameter_groups(network):
        for name, _ in group.parameters:
            assert name.split(".parametrizations")[0].rsplit(".weight", 1)[0] in before[group.name] or \
                name.rsplit(".", 1)[0] in before[group.name]


def test_head_and_stem_are_no_low_rank_targets():
    for network in (tiny.plain_unet(channels=4), tiny.residual_unet(channels=4), tiny.primus()):
        targets = {id(m) for m in low_rank_targets(network)}
        assert len(targets) == len(low_rank_targets(network)) > 0
        assert not targets & {id(m) for m in (*head_modules(network), *stem_modules(network))}
    assert all(m.in_channels == 4 for m in stem_modules(tiny.plain_unet(channels=4)))
    assert all(m.out_channels == 3 for m in head_modules(tiny.plain_unet(classes=3)))


def test_unknown_networks_are_refused_with_what_is_supported():
    with pytest.raises(ConfigurationError, match="Sequential .*PlainConvUNet, ResidualEncoderUNet.* and Primus"):
        parameter_groups(nn.Sequential(nn.Conv3d(1, 1, 1)))
    extended = tiny.plain_unet()
    extended.extra = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="extra.weight"):
        parameter_groups(extended)
