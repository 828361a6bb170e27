"""What is measured of an adapter, beside matrices whose answer is known."""

import math

import pytest
import torch

import tether
from tether.algebra import delta
from tether.errors import NonFiniteError
from tether.integrations.transformers import measure_drift
from tether.report.values import drift_of, site_stats

from .conftest import adapter, layer


def test_a_site_of_known_singular_values():
    (site,) = site_stats(adapter({"model.layers.3.mlp.up_proj": layer([4.0, 2.0, 0.5])}))
    assert (site.layer, site.kind, site.shape, site.rank) == (3, "mlp.up_proj", (12, 9), 3)
    assert site.spectrum == pytest.approx((4, 2, 0.5))
    assert site.energy == pytest.approx((16 / 20.25, 20 / 20.25, 1))
    assert site.norm == pytest.approx(math.sqrt(20.25))
    assert site.relative == pytest.approx(math.sqrt(20.25) / 10)
    assert site.anchor == ()
    assert site.base is None


@pytest.mark.parametrize(
    ("values", "rank"), [([3.0], 1), ([2.0, 2.0, 2.0, 2.0], 4), ([1.0, 1e-9], 1), ([0.0, 0.0], 0)]
)
def test_the_effective_rank_counts_equal_directions(values, rank):
    (site,) = site_stats(adapter({"a": layer(values)}))
    assert site.effective_rank == pytest.approx(rank, abs=1e-12)


def test_of_an_anchored_site_both_are_measured(trained):
    _, value = trained
    for site in site_stats(value):
        one = value.layers[site.path]
        exact = torch.linalg.svdvals(delta(one).double())
        # ΔW itself is in float32 here.
        assert site.spectrum == pytest.approx(exact[: len(site.spectrum)].tolist(), abs=1e-6)
        anchor = torch.linalg.svdvals(one.scaling * one.anchor.B @ one.anchor.A)
        assert site.anchor == pytest.approx(anchor[:2].tolist(), abs=1e-6)
        assert len(site.spectrum) == 4


@pytest.mark.parametrize(
    ("path", "index", "kind"),
    [
        ("lm_head", None, "lm_head"),
        ("h.10.attn.c_attn", 10, "attn.c_attn"),
        ("0", 0, "0"),
        ("layers.2.experts.7.up", 2, "experts.7.up"),
        ("a.11.b1.1", 11, "b1.1"),
    ],
)
def test_layer_and_kind_of_a_path(path, index, kind):
    (site,) = site_stats(adapter({path: layer([1.0])}))
    assert (site.layer, site.kind) == (index, kind)


def test_drift_is_that_of_the_callback(tiny_llama):
    handle = tether.attach(tiny_llama(initializer_range=0.15), tether.LoraConfig(rank=2))
    start = drift_of(0, site_stats(handle.snapshot()))
    assert (start.relative, start.effective_rank) == (0, 0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    point, known = drift_of(7, site_stats(handle.snapshot())), measure_drift(handle)
    assert point.step == 7
    assert point.relative == pytest.approx(known.relative, rel=1e-12)
    assert point.effective_rank == pytest.approx(known.effective_rank, rel=1e-12)


def test_without_norms_of_the_base_nothing_is_relative():
    sites = site_stats(adapter({"a": layer([1.0]), "b": layer([2.0])}, weight=None))
    assert [site.relative for site in sites] == [None, None]
    assert drift_of(1, sites).relative is None
    (site,) = site_stats(adapter({"a": layer([1.0])}, weight=0.0))
    assert site.relative is None


def test_what_is_not_finite_is_refused():
    bad = layer([1.0])
    bad.trainable.A[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"site 'x\.y'"):
        site_stats(adapter({"x.y": bad}))


def test_progress_counts_the_sites():
    calls = []
    site_stats(adapter({"a": layer([1.0]), "b": layer([1.0])}), lambda *done: calls.append(done))
    assert calls == [(1, 2), (2, 2)]
