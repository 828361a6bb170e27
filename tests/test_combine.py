"""Combining adapters, against float64 sums of the dense changes and against plain loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from combining import LAYOUTS, adapter, changes, close, exact_sum, layer
from laws.cases import PROFILE, bits, factors_of, truth
from tether import combine
from tether.combine.dare import drop
from tether.combine.ties import elect, trim
from tether.errors import ConfigError
from tether.provenance import Provenance
from tether.value import Adapter

# Adapters of all kinds mixed: seed, rank, anchored, scaling, weight, and which sites.
DRAWN = st.lists(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**20),
            "rank": st.integers(1, 4),
            "anchored": st.booleans(),
            "scaling": st.sampled_from((0.3, 1.0, 16.0)),
            "weight": st.sampled_from((1.0, -0.6, 0.0, 2.5, 0.1)),
            "sites": st.sets(st.sampled_from(list(LAYOUTS)), min_size=1),
        }
    ),
    min_size=1,
    max_size=4,
)


def build(drawn) -> tuple[list[Adapter], list[float]]:
    values, weights = [], []
    for index, item in enumerate(drawn):
        settings = {key: item[key] for key in ("rank", "anchored", "scaling")}
        sites = tuple(name for name in LAYOUTS if name in item["sites"])
        values.append(adapter(item["seed"] + index, sites, **settings))
        weights.append(item["weight"])
    return values, weights


@PROFILE
@given(drawn=DRAWN)
def test_cat_and_linear_are_the_exact_sum(drawn):
    values, weights = build(drawn)
    wanted = exact_sum(values, weights)
    cat, linear = combine.cat(values, weights), combine.linear(values, weights)
    close(changes(cat), wanted, 1e-6)
    close(changes(linear), wanted, 1e-6)
    for site, value in wanted.items():
        parts = [
            (2 if v.layers[site].anchor else 1) * v.layers[site].rank
            for v, w in zip(values, weights, strict=True)
            if w and site in v.layers
        ]
        assert cat.sites[site].rank == max(1, sum(parts))
        assert linear.sites[site].rank == max(1, int(torch.linalg.matrix_rank(value)))
        assert max(cat.sites[site].error, linear.sites[site].error) < 1e-6
        assert cat.sites[site].norm == pytest.approx(float(value.norm()), rel=1e-9)
    for result in (cat, linear):
        for here in result.adapter.layers.values():
            assert (here.anchor, here.scaling, here.dropout) == (None, 1.0, 0.0)
            assert {here.trainable.A.dtype, here.trainable.B.dtype} == {torch.float32}


@PROFILE
@given(drawn=DRAWN, rank=st.integers(1, 6))
def test_svd_is_the_best_of_its_rank_and_says_its_error(drawn, rank):
    values, weights = build(drawn)
    result = combine.svd(values, weights, rank=rank)
    found = changes(result)
    for site, wanted in exact_sum(values, weights).items():
        spectrum = torch.linalg.svdvals(wanted)
        size = float(wanted.norm())
        best = float(spectrum[rank:].norm()) / size if size else 0.0
        measured = float((found[site] - wanted).norm()) / size if size else 0.0
        assert result.sites[site].rank <= rank
        assert result.sites[site].error == pytest.approx(measured, rel=1e-6, abs=1e-9)
        assert measured == pytest.approx(best, rel=1e-4, abs=1e-6)


@PROFILE
@given(drawn=DRAWN)
def test_svd_with_room_for_the_whole_is_cat(drawn):
    values, weights = build(drawn)
    close(changes(combine.svd(values, weights, rank=99)), exact_sum(values, weights), 1e-6)
    close(changes(combine.svd(values, weights, rank=18)), exact_sum(values, weights), 1e-6)


def test_svd_meets_a_tolerance_with_the_smallest_rank():
    values = [adapter(1, rank=4), adapter(2, rank=4)]
    wanted = exact_sum(values, (1, 1))
    for tolerance in (0.5, 0.2, 0.05):
        result = combine.svd(values, tolerance=tolerance)
        for site, here in result.sites.items():
            spectrum = torch.linalg.svdvals(wanted[site])
            assert here.error <= tolerance
            assert spectrum[here.rank - 1 :].norm() > tolerance * spectrum.norm()
    with pytest.raises(ConfigError, match=r"site 'linear': rank 1 leaves .* above tolerance 0.01"):
        combine.svd(values, rank=1, tolerance=0.01)


@PROFILE
@given(drawn=DRAWN, data=st.data())
def test_the_order_of_the_adapters_does_not_matter(drawn, data):
    values, weights = build(drawn)
    order = data.draw(st.permutations(range(len(values))))
    others, other_weights = [values[i] for i in order], [weights[i] for i in order]
    for method, settings in (
        (combine.cat, {}),
        (combine.linear, {}),
        (combine.svd, {"rank": 18}),
        (combine.ties, {"density": 0.4, "rank": 18}),
    ):
        one = changes(method(values, weights, **settings))
        two = changes(method(others, other_weights, **settings))
        close(two, {site: one[site] for site in two}, 2e-6)


@pytest.mark.parametrize("weight", [1.0, -0.3, 4.0])
def test_one_adapter_is_itself_times_its_weight(weight):
    value = adapter(3)
    wanted = exact_sum([value], [weight])
    for result in (
        combine.cat([value], [weight]),
        combine.linear([value], [weight]),
        combine.svd([value], [weight], rank=4),
        combine.ties([value], [weight], density=1.0, rank=4),
        combine.dare([value], [weight], density=1.0, rank=4),
        combine.dare([value], [weight], density=1.0, rank=4, then="ties"),
    ):
        close(changes(result), wanted, 1e-6)
        assert result.error < 1e-6


def test_adapters_that_share_an_anchor_share_half_of_the_rank():
    first, generator = adapter(1, ("linear",)), torch.Generator().manual_seed(9)
    moved = layer(LAYOUTS["linear"], generator).trainable
    second = replace(first, layers={"linear": replace(first.layers["linear"], trainable=moved)})
    assert combine.cat([first, second]).sites["linear"].rank == 8
    assert combine.linear([first, second]).sites["linear"].rank == 6


def test_terms_that_cancel_leave_exactly_nothing():
    value = adapter(1)
    halves = [value, value, value]
    for method in (combine.cat, combine.linear):
        result = method(halves, [1.0, -0.5, -0.5])
        assert {(s.rank, s.norm, s.error) for s in result.sites.values()} == {(1, 0.0, 0.0)}
        assert not any(change.any() for change in changes(result).values())
    near = combine.linear([value, value], [1.0, -(1 - 1e-6)])
    close(changes(near), exact_sum([value], [1e-6]), 1e-6)


def test_weights_of_zero_leave_zero_sites():
    values = [adapter(1, ("linear",)), adapter(2, ("row",))]
    for method, settings in (
        (combine.cat, {}),
        (combine.linear, {}),
        (combine.svd, {"rank": 2}),
        (combine.ties, {"density": 0.5, "rank": 2}),
        (combine.dare, {"density": 0.5, "rank": 2}),
    ):
        result = method(values, [0.0, 0.0], **settings)
        assert list(result.sites) == ["linear", "row"]
        assert not any(change.any() for change in changes(result).values())
        assert result.error == 0
        half = method(values, [0.0, 1.0], **settings)
        assert half.sites["linear"].norm == 0 < half.sites["row"].norm


def reference_ties(parts: list[np.ndarray], weights, density: float, majority: str) -> np.ndarray:
    """Algorithm 1 of arXiv:2306.01708, one entry after the other."""
    trimmed = []
    for part, weight in zip(parts, weights, strict=True):
        keep = max(1, int(density * part.size))
        smallest = sorted((abs(x) for x in part.flat), reverse=True)[keep - 1]
        trimmed.append([weight * x if abs(x) >= smallest else 0.0 for x in part.flat])
    merged = []
    for entries in zip(*trimmed, strict=True):
        sign = np.sign(sum(entries))
        votes = sum(np.sign(x) for x in entries)
        if majority == "frequency" and votes != 0:
            sign = np.sign(votes)
        agreeing = [x for x in entries if np.sign(x) == sign and sign != 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return np.array(merged).reshape(parts[0].shape)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -1.0, 2.0)])
def test_ties_is_algorithm_1(weights, density, majority):
    values = [adapter(seed, rank=3, dtype=torch.float64) for seed in (1, 2, 3)]
    result = combine.ties(values, weights, density=density, rank=99, majority=majority)
    wanted = {}
    for site in LAYOUTS:
        parts = [truth(value.layers[site]).numpy() for value in values]
        wanted[site] = torch.from_numpy(reference_ties(parts, weights, density, majority))
    close(changes(result), wanted, 1e-6)
    for site, here in result.sites.items():
        assert here.norm == pytest.approx(float(wanted[site].norm()), rel=1e-9)


def test_ties_and_dare_report_what_their_rank_leaves_out():
    values = [adapter(1), adapter(2)]
    for method, settings in (
        (combine.ties, {"density": 0.3}),
        (combine.dare, {"density": 0.5, "seed": 4}),
        (combine.dare, {"density": 0.5, "then": "ties"}),
    ):
        whole = changes(method(values, rank=99, **settings))
        for rank in (1, 3):
            result = method(values, rank=rank, **settings)
            found = changes(result)
            for site, here in result.sites.items():
                spectrum = torch.linalg.svdvals(whole[site])
                measured = float((found[site] - whole[site]).norm() / spectrum.norm())
                best = float(spectrum[rank:].norm() / spectrum.norm())
                assert here.rank == min(rank, *whole[site].shape)
                assert here.error == pytest.approx(measured, rel=1e-5, abs=1e-6)
                assert here.error == pytest.approx(best, rel=1e-4, abs=1e-6)


def test_trim_keeps_equal_entries_whatever_their_order():
    entries = torch.tensor([1.0, -3.0, 2.0, -2.0, 0.5])
    for order in (range(5), range(4, -1, -1)):
        kept = trim(entries[list(order)], 0.4)
        assert torch.equal(kept, torch.tensor([0, -3.0, 2, -2, 0])[list(order)])
    assert torch.equal(trim(entries, 1.0), entries)
    assert torch.equal(trim(entries, 0.01), torch.tensor([0, -3.0, 0, 0, 0]))


def test_elect_is_odd_and_an_undecided_entry_is_zero():
    one, two = torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([-1.0, -1.0, 5.0, 1.0])
    for majority in ("total", "frequency"):
        found = elect([one, two], majority)
        assert torch.equal(found, torch.tensor([0.0, 2.0, 5.0, 2.0]))
        assert torch.equal(elect([-one, -two], majority), -found)
    three = [torch.tensor([5.0]), torch.tensor([-1.0]), torch.tensor([-2.0])]
    assert float(elect(three, "total")) == 5.0
    assert float(elect(three, "frequency")) == -1.5


def dropped(change: Tensor, kept: Tensor, density: float) -> Tensor:
    """Which entries were dropped; the others must be rescaled."""
    gone = kept == 0
    torch.testing.assert_close(kept[~gone], change[~gone] / density)
    return gone


def test_dare_is_drop_rescale_and_sum():
    """The masks of the adapters are seen where each is combined alone, at its place."""
    values, density = [adapter(seed, dtype=torch.float64) for seed in (1, 2)], 0.6
    alone = [
        changes(combine.dare(values, weights, density=density, rank=99, seed=5))
        for weights in ((1.0, 0.0), (0.0, 1.0))
    ]
    weights = (0.5, -2.0)
    both = changes(combine.dare(values, weights, density=density, rank=99, seed=5))
    close(both, {s: 0.5 * alone[0][s] - 2.0 * alone[1][s] for s in LAYOUTS}, 1e-6)
    voted = changes(combine.dare(values, weights, density=density, rank=99, seed=5, then="ties"))
    for site in LAYOUTS:
        parts = [change[site].numpy().round(6) for change in alone]
        wanted = torch.from_numpy(reference_ties(parts, weights, 1.0, "total"))
        torch.testing.assert_close(voted[site], wanted, rtol=0, atol=2e-5)


def test_what_is_dropped_depends_on_seed_place_and_site_alone():
    same = layer(LAYOUTS["linear"], torch.Generator().manual_seed(1), rank=4)
    value = Adapter({"a": same, "b": same}, Provenance("pissa"))
    change = truth(same)

    def mask(place: int, site: str, seed: int = 0, values=(value, value)) -> bytes:
        weights = [float(index == place) for index in range(len(values))]
        found = changes(combine.dare(values, weights, density=0.5, rank=99, seed=seed))[site]
        small = 1e-5 * float(change.abs().max())
        return bits(dropped(change, torch.where(found.abs() < small, 0, found), 0.5))

    masks = {
        "place 0, a": mask(0, "a"),
        "place 1, a": mask(1, "a"),
        "place 0, b": mask(0, "b"),
        "seed 1": mask(0, "a", seed=1),
    }
    assert len(set(masks.values())) == len(masks)
    only = Adapter({"a": same}, Provenance("pissa"))
    assert mask(0, "a", values=(only,)) == masks["place 0, a"]
    one, two = (combine.dare([value, value], density=0.5, rank=3, seed=7) for _ in range(2))
    for name, tensor in factors_of(one.adapter).items():
        assert bits(tensor) == bits(factors_of(two.adapter)[name])


def test_dropping_keeps_the_expectation():
    change = torch.randn(30, 20)
    generator, draws, density = torch.Generator().manual_seed(0), 2000, 0.3
    total, count = torch.zeros_like(change), 0
    for _ in range(draws):
        kept = drop(change, density, generator)
        total += kept
        count += int((kept != 0).sum())
    # Standard deviation of the mean: |x|·√((1 − d)/d/draws).
    deviation = change.abs() * math.sqrt((1 - density) / density / draws)
    scores = (total / draws - change) / deviation
    assert float(scores.abs().max()) < 5
    assert float(scores.square().mean()) == pytest.approx(1.0, abs=0.2)
    assert count / draws / change.numel() == pytest.approx(density, abs=0.005)


def test_progress_and_the_error_of_all_sites():
    values, seen = [adapter(1), adapter(2)], []
    result = combine.svd(values, rank=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]
    wanted, found = exact_sum(values, (1, 1)), changes(result)
    lost = sum(float((found[s] - wanted[s]).norm()) ** 2 for s in wanted)
    size = sum(float(wanted[s].norm()) ** 2 for s in wanted)
    assert result.error == pytest.approx(math.sqrt(lost / size), rel=1e-6)
