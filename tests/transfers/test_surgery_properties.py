"""surgery.py over all lists of names: what the donor knows keeps its function, and there and back is no change."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Rows, label_match
from torch.nn.functional import conv2d

from nnunet_dante.transfers.match import NameMatch
from nnunet_dante.transfers.match import match_names as match
from nnunet_dante.transfers.surgery import NEW_REGION_PROBABILITY, head_surgery, invert_channels, stem_surgery

FEATURES = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WORDS = st.sampled_from(["organ", "lesion", "vessel", "Core", "core ", "ORGAN", "oedema", "x"])


@st.composite
def heads(draw):
    """Rows as dataset.json gives them: a name once, background first and in softmax heads alone."""
    regions = draw(st.booleans())
    names = tuple(draw(st.lists(WORDS, unique_by=lambda n: n.strip().casefold(), min_size=1, max_size=6)))
    return Rows(names=names if regions else ("background", *names), regions=regions)


CHANNELS = st.lists(st.sampled_from(["T1", "t1", "T2", "FLAIR", "rgb_to_0_1"]), min_size=1, max_size=4).map(tuple)
FED_BACK = st.lists(WORDS, unique=True, max_size=4).map(tuple)


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def head_of(donor, seed):
    weights = {"w": random(len(donor.names), 3, seed=seed), "b": random(len(donor.names), seed=seed + 1)}
    return weights | {"alias": weights["w"]}


def moved_head(weights, donor, target):
    return head_surgery(weights, heads={"w": 0, "b": 0}, labels=label_match(donor, target))


def logits(weights):
    return FEATURES @ weights["w"].T + weights["b"]


@given(heads(), heads(), st.integers(0, 99))
def test_a_head_keeps_what_it_knows_whatever_the_target_names(donor, target, seed):
    weights = head_of(donor, seed)
    moved, report = moved_head(weights, donor, target)
    before, after = logits(weights), logits(moved)
    found = match(target.names, donor.names)
    rows = [(i, row) for row, i in enumerate(found) if i is not None and target.names[row] != "background"]
    shift = before[:, :1] if target.regions and not donor.regions else 0  # sigmoid of a difference is softmax of two
    known, taken = [row for _, row in rows], [i for i, _ in rows]
    assert torch.allclose(after[:, known], (before - shift)[:, taken], atol=1e-12)
    new = [row for row, i in enumerate(found) if i is None and target.names[row] != "background"]
    if target.regions:
        assert torch.allclose(after[:, new].sigmoid(), torch.tensor(NEW_REGION_PROBABILITY, dtype=torch.float64))
    elif known:
        old = [row for row in range(len(target.names)) if row not in new]
        assert (after[:, new] <= after[:, old].amax(1, keepdim=True) + 1e-12).all()
    one_sided = {"background"} if donor.regions != target.regions else set()
    assert sorted((*report.matched, *report.new)) == sorted(set(target.names) - one_sided)
    assert len(report.matched) + len(report.dropped) == len(set(donor.names) - one_sided)
    assert bool(report.rule) == bool(report.new) and moved["alias"] is moved["w"]


@given(heads(), heads(), st.integers(0, 99))
def test_a_head_is_the_donors_again_after_a_target_that_knew_it_all(donor, more, seed):
    names = donor.names + tuple(n for n, i in zip(more.names, match(more.names, donor.names))
                                if i is None and n != "background")
    target = Rows(names=names, regions=donor.regions)
    weights = head_of(donor, seed)
    back, _ = moved_head(moved_head(weights, donor, target)[0], target, donor)
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@given(CHANNELS, CHANNELS, FED_BACK, FED_BACK, st.integers(0, 99))
def test_a_stem_computes_what_it_did_on_the_channels_it_knows(donor, target, donor_fed, target_fed, seed):
    weights = {"stem": random(5, len(donor) + len(donor_fed), 3, 3, seed=seed)}
    moved, images, fed = stem_surgery(weights, stems=("stem",), channels=NameMatch(donor=donor, target=target),
                                      previous=NameMatch(donor=donor_fed, target=target_fed))
    found, found_fed = match(target, donor), match(target_fed, donor_fed)
    x = IMAGES[:, :len(donor) + len(donor_fed)].clone()
    y = random(2, len(target) + len(target_fed), 6, 6, seed=seed + 1)
    for place, i in enumerate((*found, *(None if i is None else len(donor) + i for i in found_fed))):
        if i is not None:
            y[:, place] = x[:, i]
    known = {*found, *(None if i is None else len(donor) + i for i in found_fed)}
    x[:, [i for i in range(x.shape[1]) if i not in known]] = 0  # what the target has not got
    if all(i is None for i in found):  # another modality: a signal common to all channels
        x[:, :len(donor)] = y[:, :len(target)] = IMAGES[:, 7:]
    assert torch.allclose(conv2d(x, weights["stem"]), conv2d(y, moved["stem"]), atol=1e-12)
    assert len(images.matched) == sum(i is not None for i in found) and len(fed.new) == sum(i is None for i in found_fed)


@given(st.integers(1, 6), st.sets(st.integers(0, 5)), st.integers(0, 99))
def test_inverted_channels_are_the_network_on_negated_ones_and_twice_is_no_change(n, wanted, seed):
    channels = tuple(sorted(c for c in wanted if c < n))
    weights = {"stem": random(4, n, 3, 3, seed=seed)}
    inverted = invert_channels(weights, stems=("stem",), channels=channels)
    x = IMAGES[:, :n]
    negated = x * torch.tensor([-1 if c in channels else 1 for c in range(n)])[:, None, None]
    assert torch.equal(conv2d(x, inverted["stem"]), conv2d(negated, weights["stem"]))
    assert torch.equal(invert_channels(inverted, stems=("stem",), channels=channels)["stem"], weights["stem"])
    assert math.prod(weights["stem"].shape) == 36 * n
