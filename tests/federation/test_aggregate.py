"""aggregate.py: averages are exact, refusals name the reason, and no site can do more than its share."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dante.errors import FederationError
from nnunet_dante.federation.aggregate import Average, Update, distance, far_off, frozen_factor, refusal, trained_in

LABELS = ("background", "liver", "spleen")
HEADS = {"head.weight": 0}
cases = st.lists(st.integers(1, 500), min_size=1, max_size=6)
seeds = st.integers(0, 2**31)
few = settings(max_examples=40, deadline=None)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_update(site: str, number: int, seed: int, *, draws=("liver", "spleen"), size: float = 1.0) -> Update:
    generator = drawn(seed)
    return Update(site=site, cases=number, draws=frozenset(draws), tensors={
        "norm.bias": size * torch.randn(5, generator=generator),
        "head.weight": size * torch.randn(3, 4, 1, generator=generator)})


def average(updates, *, start=None, trim=0):
    whole = Average(labels=LABELS, heads=HEADS, trim=trim)
    for update in updates:
        whole.add(update)
    return whole.result(start or {"norm.bias": torch.zeros(5), "head.weight": torch.zeros(3, 4, 1)})


@few
@given(cases, seeds)
def test_the_mean_is_weighted_by_cases(numbers, seed):
    updates = [some_update(str(i), n, seed + i) for i, n in enumerate(numbers)]
    for name, tensor in average(updates).items():
        expected = sum(u.cases * u.tensors[name].double() for u in updates) / sum(numbers)
        assert torch.allclose(tensor.double(), expected, atol=1e-6)


@few
@given(cases, seeds)
def test_equal_sites_give_what_one_gives_bit_for_bit(numbers, seed):
    alone = some_update("a", 1, seed).tensors
    together = average([some_update(str(i), n, seed) for i, n in enumerate(numbers)])
    assert all(torch.equal(together[name], alone[name]) for name in alone)


@few
@given(cases, seeds, st.randoms(use_true_random=False), st.integers(0, 3))
def test_the_order_of_replies_does_not_matter(numbers, seed, random, trim):
    updates = [some_update(str(i), n, seed + i) for i, n in enumerate(numbers)]
    shuffled = random.sample(updates, len(updates))
    one, other = average(updates, trim=trim), average(shuffled, trim=trim)
    assert all(torch.allclose(one[name], other[name], rtol=1e-6, atol=1e-7) for name in one)


@few
@given(st.integers(1, 5), st.integers(1, 4), seeds, st.sampled_from(["alternating", "frozen"]), st.booleans())
def test_the_average_of_one_factor_is_the_average_of_the_merged_weights(sites, rank, seed, averaging, odd):
    generator = drawn(seed)
    a, b = torch.randn(27, 6, rank, generator=generator), torch.randn(27, rank, 4, generator=generator)
    names = {"w.lora_A": a, "w.lora_B": b}
    trained = trained_in(names, averaging, int(odd))
    updates = [Update(site=str(i), cases=i + 1, draws=frozenset(),
                      tensors={n: torch.randn(names[n].shape, generator=generator) for n in trained})
               for i in range(sites)]
    merged = average(updates, start=names)
    weights = sum(u.cases for u in updates)
    full = [{**names, **u.tensors} for u in updates]
    expected = sum(u.cases * (f["w.lora_A"] @ f["w.lora_B"]).double() for u, f in zip(updates, full)) / weights
    assert torch.allclose((merged["w.lora_A"] @ merged["w.lora_B"]).double(), expected, atol=1e-5, rtol=1e-6)


def test_averaging_both_factors_would_be_wrong():
    generator = drawn(0)
    a, b = torch.randn(3, 6, 2, generator=generator), torch.randn(3, 2, 4, generator=generator)
    exact = (a @ b).mean(0)
    assert torch.linalg.norm(a.mean(0) @ b.mean(0) - exact) > 0.5 * torch.linalg.norm(exact)


def test_rounds_alternate_and_a_frozen_factor_stays():
    names = ["w.lora_A", "w.lora_B", "norm.bias"]
    assert [trained_in(names, "alternating", r) for r in (0, 1, 2)] == [
        ("w.lora_B", "norm.bias"), ("w.lora_A", "norm.bias"), ("w.lora_B", "norm.bias")]
    assert {trained_in(names, "frozen", r) for r in range(4)} == {("w.lora_B", "norm.bias")}
    with pytest.raises(FederationError, match="'mean'.*alternating, frozen"):
        frozen_factor("mean", 0)


def test_a_row_of_a_head_is_averaged_over_the_sites_that_draw_its_label():
    updates = [some_update("a", 3, 1), some_update("b", 1, 2, draws=["liver"]), some_update("c", 2, 3, draws=[])]
    rows = average(updates)["head.weight"].double()
    one, two, three = (u.tensors["head.weight"].double() for u in updates)
    assert torch.allclose(rows[0], (3 * one + two + 2 * three)[0] / 6)
    assert torch.allclose(rows[1], (3 * one + two)[1] / 4)
    assert torch.allclose(rows[2], one[2])


@pytest.mark.parametrize("trim", [0, 1])
def test_a_row_that_no_site_draws_stays_as_it_was(trim):
    start = {"norm.bias": torch.zeros(5), "head.weight": torch.full((3, 4, 1), 7.0)}
    rows = average([some_update("a", 3, 1, draws=["liver"])], start=start, trim=trim)["head.weight"]
    assert (rows[2] == 7).all() and not (rows[:2] == 7).any()
    assert (start["head.weight"] == 7).all()


def test_rows_of_a_transposed_head_are_its_second_axis():
    start = {"head.weight": torch.zeros(4, 2)}
    whole = Average(labels=("background", "liver"), heads={"head.weight": 1})
    whole.add(Update(site="a", cases=1, tensors={"head.weight": torch.ones(4, 2)}, draws=frozenset()))
    assert whole.result(start)["head.weight"].tolist() == [[1, 0]] * 4


@few
@given(st.integers(1, 9), st.integers(1, 4), seeds)
def test_the_trimmed_mean_leaves_out_the_smallest_and_largest_values(sites, trim, seed):
    updates = [some_update(str(i), i + 1, seed + i) for i in range(sites)]
    left_out = min(trim, (sites - 1) // 2)
    ordered = torch.stack([u.tensors["norm.bias"].double() for u in updates]).sort(0).values
    expected = ordered[left_out:sites - left_out].mean(0)
    assert torch.allclose(average(updates, trim=trim)["norm.bias"].double(), expected, atol=1e-6)


@few
@given(seeds, st.sampled_from([1e-6, 1e6, 1e30]))
def test_one_site_cannot_move_the_trimmed_mean_out_of_the_range_of_the_others(seed, size):
    honest = [some_update(str(i), 1, seed + i) for i in range(4)]
    moved = average([*honest, some_update("odd", 400, seed + 9, size=size)], trim=1)
    values = torch.stack([u.tensors["norm.bias"] for u in honest])
    assert (moved["norm.bias"] >= values.amin(0) - 1e-6).all() and (moved["norm.bias"] <= values.amax(0) + 1e-6).all()


def test_memory_of_the_average_does_not_grow_with_the_sites():
    def held(sites: int, trim: int) -> int:
        whole = Average(labels=LABELS, heads=HEADS, trim=trim)
        for i in range(sites):
            whole.add(some_update(str(i), 1, i))
        return sum(t.nbytes for total in whole._sums.values() for t in
                   [getattr(total, "total", getattr(total, "middle", None)), *getattr(total, "low", []),
                    *getattr(total, "high", [])] if isinstance(t, torch.Tensor))

    assert held(10, 0) == held(100, 0) and held(10, 2) == held(100, 2)


EXPECTED = {"norm.bias": torch.zeros(5), "head.weight": torch.zeros(3, 4, 1)}


def changed(**tensors) -> Update:
    given = some_update("a", 1, 0)
    return Update(site="a", cases=1, draws=given.draws, tensors={
        **given.tensors, **{name.replace("_", ".", 1): value for name, value in tensors.items()}})


@pytest.mark.parametrize(("update", "reason"), [
    (changed(norm_bias=torch.full((5,), math.nan)), "norm.bias holds NaN"),
    (changed(norm_bias=torch.tensor([0, 0, math.inf, 0, 0])), "norm.bias holds NaN or infinite"),
    (changed(norm_bias=torch.zeros(6)), r"norm.bias has shape \(6,\)"),
    (changed(norm_bias=torch.zeros(5, dtype=torch.float64)), "type torch.float64"),
    (changed(other_bias=torch.zeros(5)), "sends other.bias"),
    (Update(site="a", cases=1, tensors={}, draws=frozenset()), "does not send head.weight .2 names"),
    (some_update("a", 0, 0), "0 training cases"), (some_update("a", -3, 0), "-3 training cases"),
    (some_update("a", 2**40, 0), "training cases"), (some_update("a", 1.5, 0), "1.5 training cases")])
def test_updates_that_cannot_be_averaged_are_refused_with_the_reason(update, reason):
    import re

    assert re.search(reason, refusal(update, EXPECTED))


@few
@given(st.dictionaries(st.sampled_from(["norm.bias", "head.weight", "x"]),
                       st.tuples(st.lists(st.integers(0, 4), max_size=3),
                                 st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]),
                                 st.sampled_from([0.0, math.nan, math.inf, 1e38]))))
def test_whatever_tensors_arrive_the_average_is_finite_or_the_update_is_refused(content):
    tensors = {name: torch.full(shape, value).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
               for name, (shape, dtype, value) in content.items()}
    update = Update(site="a", cases=1, tensors=tensors, draws=frozenset(LABELS))
    if refusal(update, EXPECTED) is None:
        assert all(t.isfinite().all() and t.shape == EXPECTED[n].shape for n, t in average([update]).items())


def test_good_updates_are_accepted():
    assert refusal(some_update("a", 1, 0), EXPECTED) is None


def test_an_update_far_longer_than_the_others_is_refused_by_name():
    lengths = {"a": 1.0, "b": 1.2, "c": 0.8, "odd": 500.0}
    assert list(far_off(lengths, 10)) == ["odd"] and "500" in far_off(lengths, 10)["odd"]
    assert not far_off(lengths, 0)
    assert not far_off({"a": 1.0, "odd": 500.0}, 10)  # nobody can tell which of two is odd
    assert far_off({"a": 0.0, "b": 0.0, "odd": 1.0}, 10)


def test_the_length_of_an_update():
    assert distance({"a": torch.tensor([3.0, 1.0])}, {"a": torch.tensor([0.0, 5.0]), "b": torch.ones(1)}) == 5
