"""What the weights tell: overlaps and intruder dimensions beside ones that are known."""

from dataclasses import replace

import pytest
import torch

from tether.checkpoint import Checkpoint
from tether.errors import BaseMismatchError
from tether.report.base import INTRUDER_TOP, measure, with_base
from tether.report.values import site_stats
from tether.value import Factors, LayerAdapter, Layout

from .conftest import adapter, layer, orthonormal

SHAPES = [(16, 12), (12, 16), (14, 14)]


def weight(shape):
    """A weight with singular values that fall from 12, and its singular vectors."""
    count = min(shape)
    u, v = orthonormal(shape[0], count), orthonormal(shape[1], count)
    s = torch.arange(count, 0, -1, dtype=torch.float64)
    return (u * s) @ v.T, u, v


def change(b, a):
    """A plain layer of ΔW = b·a."""
    return LayerAdapter(Factors(a, b), None, 1.0, Layout("linear", (len(b), a.shape[1])))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_along_the_top_directions(shape):
    matrix, u, v = weight(shape)
    stats = measure(matrix, change(0.1 * u[:, :2], v[:, :2].T))
    assert stats.count == 2
    assert (stats.top, stats.bottom) == pytest.approx((1, 0), abs=1e-12)
    assert stats.spectrum == pytest.approx(range(min(shape), 0, -1))
    assert stats.intruders == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_along_the_bottom_directions(shape):
    matrix, u, v = weight(shape)
    stats = measure(matrix, change(0.1 * u[:, -2:], v[:, -2:].T))
    assert (stats.top, stats.bottom) == pytest.approx((0, 1), abs=1e-12)


def test_both_sides_count_half():
    matrix, u, v = weight((16, 12))
    stats = measure(matrix, change(u[:, :1], v[:, -1:].T))
    assert (stats.top, stats.bottom) == pytest.approx((0.5, 0.5), abs=1e-12)


def test_a_random_change_has_the_share_that_is_expected_of_it():
    matrix, _, _ = weight((16, 12))
    found = [
        measure(matrix, change(torch.randn(16, 3).double(), torch.randn(3, 12).double()))
        for _ in range(300)
    ]
    assert found[0].expected == pytest.approx(3 / 2 * (1 / 16 + 1 / 12))
    # The standard deviation of one share is about 0.09, of the mean of 300 0.005.
    for share in ("top", "bottom"):
        mean = sum(getattr(each, share) for each in found) / 300
        assert mean == pytest.approx(found[0].expected, abs=0.025)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
def test_new_leading_directions_are_intruders(shape):
    matrix, u, v = weight(shape)
    # Each as large as anything in W, and equally far from all of its left singular vectors.
    mixed = u @ orthonormal(u.shape[1], u.shape[1])
    spread = torch.linalg.qr(mixed[:, :3])[0]
    stats = measure(matrix, change(1000 * spread, v[:, :3].T))
    cosines = (u.T @ spread).abs().amax(dim=0)
    assert stats.intruders == int((cosines < 0.5).sum()) > 0


def test_a_large_change_along_the_directions_of_the_weight_is_no_intruder():
    matrix, u, v = weight((40, 30))
    assert measure(matrix, change(1000 * u[:, 20:23], v[:, 20:23].T)).intruders == 0


def test_only_the_leading_vectors_count():
    matrix, u, v = weight((40, 30))
    outside = orthonormal(40, 40)
    outside = torch.linalg.qr(outside - u @ (u.T @ outside))[0][:, :1]
    # Below the tenth singular value of W, of 30.
    small = measure(matrix, change(15.5 * outside, v[:, -1:].T))
    large = measure(matrix, change(25.5 * outside, v[:, -1:].T))
    assert (small.intruders, large.intruders, INTRUDER_TOP) == (0, 1, 10)


def test_no_change_is_in_no_direction():
    matrix, _, _ = weight((16, 12))
    stats = measure(matrix, change(torch.zeros(16, 2).double(), torch.zeros(2, 12).double()))
    assert (stats.top, stats.bottom, stats.intruders) == (0, 0, 0)


def test_weights_come_from_a_model_folder(trained):
    base, value = trained
    sites = site_stats(value)
    model = Checkpoint.open(base)
    measured = with_base(value, sites, model, 0)
    for site in measured:
        matrix = model.tensor(f"{site.path}.weight").double()
        assert site.base.spectrum == pytest.approx(torch.linalg.svdvals(matrix).tolist())
        assert site.weight == pytest.approx(float(matrix.norm()))
        before = next(s for s in sites if s.path == site.path)
        assert replace(site, base=None, weight=before.weight) == before


@pytest.mark.parametrize("limit", [1, 3, 7, 10, 14, 20])
def test_some_of_the_sites_are_of_every_kind_and_depth(trained, limit):
    base, value = trained
    calls = []
    sites = with_base(
        value, site_stats(value), Checkpoint.open(base), limit, progress=lambda *d: calls.append(d)
    )
    read = [site for site in sites if site.base is not None]
    count = min(limit, 14)
    assert len(read) == count
    assert calls == [(i, count) for i in range(1, count + 1)]
    assert len({site.kind for site in read}) == min(limit, 7)
    if limit >= 3:
        assert {site.layer for site in read} == {0, 1}


def test_another_base_is_refused(trained):
    base, value = trained
    other = adapter(dict(value.layers))
    with pytest.raises(BaseMismatchError, match="verify=False"):
        with_base(other, site_stats(other), Checkpoint.open(base), 1)
    assert with_base(other, site_stats(other), Checkpoint.open(base), 1, verify=False)


def test_a_float16_weight_is_read_as_it_is():
    matrix, _, _ = weight((16, 12))
    half = matrix.half()
    stats = measure(half, layer([1.0], (16, 12)))
    assert stats.spectrum == pytest.approx(torch.linalg.svdvals(half.double()).tolist())
