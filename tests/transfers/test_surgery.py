"""surgery.py: what the donor knows keeps its function, whatever is added or removed."""

from __future__ import annotations

import pytest
import tiny
import torch
from arithmetic import clear, tolerance
from tiny import Rows, label_match
from torch.nn.functional import conv3d

from nnunet_dante.errors import TransferError
from nnunet_dante.models.checkpoint import alias_sets, unique_tensors
from nnunet_dante.transfers.match import NameMatch
from nnunet_dante.transfers.surgery import NEW_REGION_PROBABILITY, head_surgery, stem_surgery

DONOR = Rows(names=("background", "organ", "lesion"))
BUILDERS = {"plain": tiny.plain_unet, "residual": tiny.residual_unet}
HEAD = tolerance(5)  # a row of a head adds up four features and a bias
STEM = {"plain": "encoder.stages.0.0.convs.0.conv.weight", "residual": "encoder.stem.convs.0.conv.weight"}


def same(a, b):
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=HEAD)


def head_keys(state):
    return {key: 0 for key in state if key.startswith("decoder.seg_layers.")}


def outputs(build, state, x, *, channels=1, classes=3, **options):
    network = build(channels=channels, classes=classes, **options).eval()
    network.load_state_dict(state)
    with torch.no_grad():
        return network(x)


@pytest.fixture(params=BUILDERS)
def kind(request):
    return request.param


@pytest.mark.parametrize("dim", [2, 3])
def test_permuted_labels_permute_every_head(kind, dim):
    build, x = BUILDERS[kind], torch.randn(1, 1, *[16] * dim)
    state = build(dim).state_dict()
    moved, report = head_surgery(state, heads=head_keys(state), labels=label_match(DONOR, Rows(names=("background", "Lesion", "organ"))))
    before, after = outputs(build, state, x, dim=dim), outputs(build, moved, x, dim=dim)
    assert len(before) == 2
    assert all(same(a, b[:, [0, 2, 1]]) for a, b in zip(after, before))
    assert (report.new, report.dropped, report.rule) == ((), (), "")


def test_new_labels_never_win_and_known_logits_are_unchanged(kind):
    build, x = BUILDERS[kind], torch.randn(1, 1, 16, 16, 16)
    state = build().state_dict()
    target = Rows(names=("background", "new", "lesion", "organ", "newer"))
    moved, report = head_surgery(state, heads=head_keys(state), labels=label_match(DONOR, target))
    for before, after in zip(outputs(build, state, x), outputs(build, moved, x, classes=5)):
        assert same(after[:, [0, 3, 2]], before)
        decided = clear(before, by=HEAD)
        assert decided.float().mean() > 0.99
        assert torch.equal(after.argmax(1)[decided], torch.tensor([0, 3, 2])[before.argmax(1)[decided]])
    assert report.matched == ("background", "lesion", "organ")
    assert report.new == ("new", "newer")
    assert "never win before training" in report.rule


def test_dropped_labels_leave_the_others_unchanged():
    state = tiny.plain_unet().state_dict()
    x = torch.randn(1, 1, 16, 16, 16)
    moved, report = head_surgery(state, heads=head_keys(state), labels=label_match(DONOR, Rows(names=("background", "lesion"))))
    assert report.dropped == ("organ",)
    for before, after in zip(outputs(tiny.plain_unet, state, x), outputs(tiny.plain_unet, moved, x, classes=2)):
        assert same(after, before[:, [0, 2]])


@pytest.mark.parametrize("donor_regions", [False, True])
def test_where_no_structure_is_known_new_labels_start_where_the_donor_saw_any_and_let_gradients_through(donor_regions):
    donor = Rows(names=("organ",), regions=True) if donor_regions else Rows(names=("background", "organ"))
    state = tiny.plain_unet(classes=len(donor.names)).state_dict()
    x = torch.randn(1, 1, 16, 16, 16)
    scores = outputs(tiny.plain_unet, state, x, classes=len(donor.names))[0]
    state["decoder.seg_layers.1.bias"][-1] -= (scores[:, -1] - (0 if donor_regions else scores[:, 0])).mean()  # sees about half
    moved, report = head_surgery(state, heads=head_keys(state), labels=label_match(donor, Rows(names=("background", "a", "b"))))
    before = outputs(tiny.plain_unet, state, x, classes=len(donor.names))[0]
    lead = before[:, 0] if donor_regions else before[:, 1] - before[:, 0]
    saw, decided = lead > 0, lead.abs() > 2 * HEAD
    after = outputs(tiny.plain_unet, moved, x)[0]
    assert 0 < saw.float().mean() < 1
    assert decided.float().mean() > 0.99
    assert torch.equal(after.argmax(1)[decided] > 0, saw[decided])
    assert same(after[:, 1], after[:, 2])
    assert "any structure" in report.rule

    network = tiny.plain_unet()
    network.load_state_dict(moved)
    torch.nn.functional.cross_entropy(network(x)[0], torch.zeros(1, 16, 16, 16, dtype=torch.long)).backward()
    assert next(network.encoder.parameters()).grad.abs().max() > 0


def test_new_regions_start_absent_and_known_ones_are_unchanged():
    state = tiny.plain_unet(classes=2).state_dict()
    x = torch.randn(1, 1, 16, 16, 16)
    moved, report = head_surgery(state, heads=head_keys(state), labels=label_match(Rows(names=("whole", "core"), regions=True), Rows(names=("core", "oedema"), regions=True)))
    for before, after in zip(outputs(tiny.plain_unet, state, x, classes=2), outputs(tiny.plain_unet, moved, x, classes=2)):
        assert same(after[:, 0], before[:, 1])
        assert torch.allclose(after[:, 1].sigmoid(), torch.tensor(NEW_REGION_PROBABILITY))
    assert (report.matched, report.new, report.dropped) == (("core",), ("oedema",), ("whole",))


def test_binary_softmax_label_and_sigmoid_region_are_the_same_probability_both_ways():
    state = tiny.plain_unet(classes=2).state_dict()
    x = torch.randn(1, 1, 16, 16, 16)
    label, region = Rows(names=("background", "organ")), Rows(names=("organ",), regions=True)
    to_region, report = head_surgery(state, heads=head_keys(state), labels=label_match(label, region))
    p_label = outputs(tiny.plain_unet, state, x, classes=2)[0].softmax(1)[:, 1]
    p_region = outputs(tiny.plain_unet, to_region, x, classes=1)[0].sigmoid()[:, 0]
    assert torch.allclose(p_label, p_region, atol=1e-6)
    back, report_back = head_surgery(to_region, heads=head_keys(to_region), labels=label_match(region, label))
    assert torch.allclose(outputs(tiny.plain_unet, back, x, classes=2)[0].softmax(1)[:, 1], p_label, atol=1e-6)
    for found in (report, report_back):
        assert (found.matched, found.new, found.dropped) == (("organ",), (), ())


def test_aliases_stay_aliases(kind):
    state = BUILDERS[kind](channels=2).state_dict()
    moved, *_ = stem_surgery(state, stems=(STEM[kind],), channels=NameMatch(donor=("a", "b"), target=("b", "c")))
    moved, _ = head_surgery(moved, heads=head_keys(state), labels=label_match(DONOR, Rows(names=("background", "x"))))
    assert list(moved) == list(state)
    assert alias_sets(moved) == alias_sets(state)
    assert list(unique_tensors(moved)) == list(unique_tensors(state))


def test_inputs_are_not_changed():
    state = tiny.plain_unet(channels=2).state_dict()
    copy = {k: v.clone() for k, v in state.items()}
    stem_surgery(state, stems=(STEM["plain"],), channels=NameMatch(donor=("a", "b"), target=("c",)))
    head_surgery(state, heads=head_keys(state), labels=label_match(DONOR, Rows(names=("background", "x"))))
    assert all(torch.equal(copy[k], state[k]) for k in state)


@pytest.mark.parametrize("dim", [2, 3])
def test_permuted_and_added_channels_compute_the_same(kind, dim):
    build = BUILDERS[kind]
    state = build(dim, channels=2).state_dict()
    x = torch.randn(1, 2, *[16] * dim)
    moved, report, _ = stem_surgery(state, stems=(STEM[kind],), channels=NameMatch(donor=("T1", "T2"), target=("T2", "new", "t1")))
    more = torch.stack([x[:, 1], torch.randn_like(x[:, 0]), x[:, 0]], dim=1)
    before, after = outputs(build, state, x, channels=2, dim=dim), outputs(build, moved, more, channels=3, dim=dim)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, after))  # through the whole network
    assert (report.matched, report.new, report.dropped) == (("T2", "t1"), ("new",), ())
    assert "zero kernels" in report.rule


def test_a_dropped_channel_equals_a_zero_channel(kind):
    build = BUILDERS[kind]
    state = build(channels=2).state_dict()
    x = torch.randn(1, 1, 16, 16, 16)
    moved, report, _ = stem_surgery(state, stems=(STEM[kind],), channels=NameMatch(donor=("T1", "T2"), target=("T2",)))
    padded = torch.cat([torch.zeros_like(x), x], dim=1)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in
               zip(outputs(build, state, padded, channels=2), outputs(build, moved, x)))
    assert report.dropped == ("T1",)


@pytest.mark.parametrize(("donor", "target"), [(("CT",), ("MR",)), (("CT",), ("T1", "T2")), (("a", "b"), ("x",))])
def test_another_modality_keeps_the_strength_of_a_common_signal(donor, target):
    state = tiny.plain_unet(channels=len(donor)).state_dict()
    moved, report, _ = stem_surgery(state, stems=(STEM["plain"],), channels=NameMatch(donor=donor, target=target))
    x = torch.randn(1, 1, 8, 8, 8)
    before = conv3d(x.expand(-1, len(donor), -1, -1, -1), state[STEM["plain"]])
    after = conv3d(x.expand(-1, len(target), -1, -1, -1), moved[STEM["plain"]])
    assert torch.allclose(before, after, atol=1e-6)
    assert "mean of the donor's kernels" in report.rule


def test_cascade_inputs_move_by_label_name():
    state = tiny.plain_unet(channels=3).state_dict()
    key = STEM["plain"]
    moved, _, fed = stem_surgery(state, stems=(key,), channels=NameMatch(donor=("CT",), target=("CT",)),
                                 previous=NameMatch(donor=("organ", "lesion"), target=("lesion", "vessel", "organ")))
    old, new = state[key], moved[key]
    assert torch.equal(new[:, [0, 1, 3]], old[:, [0, 2, 1]])
    assert not new[:, 2].any()
    assert (fed.matched, fed.new) == (("lesion", "organ"), ("vessel",))


def test_rows_of_a_transposed_convolution_are_its_second_dimension():
    weights = {"w": torch.randn(5, 3, 2, 2, 2), "b": torch.randn(3)}
    moved, _ = head_surgery(weights, heads={"w": 1, "b": 0}, labels=label_match(DONOR, Rows(names=("background", "lesion"))))
    assert torch.equal(moved["w"], weights["w"][:, [0, 2]])
    assert torch.equal(moved["b"], weights["b"][[0, 2]])


def test_dataset_json_of_another_network_is_refused():
    state = tiny.plain_unet(classes=4).state_dict()
    with pytest.raises(TransferError, match="has 4 rows, its dataset.json names 3"):
        head_surgery(state, heads=head_keys(state), labels=label_match(DONOR, DONOR))
    with pytest.raises(TransferError, match="reads 1 channels, its dataset.json names CT, PET"):
        stem_surgery(state, stems=(STEM["plain"],), channels=NameMatch(donor=("CT", "PET"), target=("CT",)))
