"""Laws 5 and 6: the plain LoRA is the live adapter, and a smaller one costs what it says."""

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

import tether
from laws.cases import SIZES, Case, bits, law, truth
from tether import algebra


def relative(changed: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.linalg.norm(changed - exact) / torch.linalg.norm(exact))


def half_limit(case: Case) -> float:
    """What rounding the factors to bfloat16 may cost.

    Up to 2^-8 for each of the two. Over many entries that averages to 2.4e-3; where a factor is a
    scalar, or is one but for small entries, nothing averages.
    """
    return 2 * 2**-8 if case.family in ("1xn", "zero") else 4e-3


@law()
def test_a_plain_lora_keeps_the_change_at_every_size(case):
    start = tether.init(case.model(), case.config())
    for size in SIZES:
        adapter = dataclasses.replace(case, size=size).moved(start)
        plain = tether.to_lora(adapter)
        assert not plain.anchored
        for path, layer in adapter.layers.items():
            exact = truth(layer)
            assert relative(algebra.delta(layer).double(), exact) <= 1e-6
            assert relative(truth(plain.layers[path]), exact) <= 1e-6
            half = plain.layers[path].trainable.to(torch.bfloat16)
            half = dataclasses.replace(plain.layers[path], trainable=half)
            assert relative(truth(half), exact) <= half_limit(case)


@law(examples=1)
def test_a_written_lora_keeps_the_change_and_the_report_measures_it(case):
    adapter = case.moved(tether.init(case.model(), case.config()))
    limits = {torch.float32: 1e-6, torch.bfloat16: half_limit(case), torch.float16: 2 * 2**-11}
    for dtype, limit in limits.items():
        with TemporaryDirectory() as folder:
            report = tether.save_as_lora(adapter, Path(folder, "plain"), dtype=dtype)
            written = tether.load(Path(folder, "plain"))
        assert set(report.sites) == set(written.layers) == set(adapter.layers)
        lost = size = 0.0
        for path, layer in adapter.layers.items():
            exact, found = truth(layer), truth(written.layers[path])
            site, error = report.sites[path], relative(found, exact)
            assert error <= limit
            assert site.error == pytest.approx(error, 1e-6, 1e-12)
            assert site.norm == pytest.approx(float(exact.norm()), 1e-9)
            lost += float((found - exact).square().sum())
            size += float(exact.square().sum())
        assert report.error == pytest.approx((lost / size) ** 0.5, 1e-6, 1e-12)
        assert (report.dtype, report.rank) == (str(dtype)[6:], max_rank(tether.to_lora(adapter)))


def max_rank(adapter: tether.Adapter) -> int:
    return max(layer.rank for layer in adapter.layers.values())


@law()
def test_a_plain_lora_acts_on_the_base_as_the_live_adapter_does(case):
    model = case.model().double().eval()
    x, ids = case.batch()
    x = x.double()
    base = [y.clone() for y in model(x, ids)]
    adapter = case.moved(tether.init(model, case.config()))
    embedding, linear = truth(adapter.layers["embedding"]), truth(adapter.layers["linear"])
    expected = (x @ linear.T, torch.zeros_like(base[1]), embedding.T[ids])
    for value in (adapter, tether.to_lora(adapter)):
        handle = tether.attach(model, value, dtype=torch.float64)
        for live, before, change in zip(model(x, ids), base, expected, strict=True):
            assert torch.linalg.norm(live - before - change) <= 1e-6 * torch.linalg.norm(change)
        handle.detach()


@law()
def test_compressing_meets_the_best_error_there_is_and_reports_it(case):
    adapter = case.moved(tether.init(case.model(), case.config()))
    for layer in adapter.layers.values():
        exact = truth(layer)
        tails = torch.linalg.svdvals(exact).square().flip(0).cumsum(0).flip(0).sqrt()
        best = [*(float(t / tails[0]) for t in tails), *[0.0] * 2 * layer.rank]  # [k]: of rank k

        for rank in {1, layer.rank}:
            result = algebra.compress(layer, rank=rank)
            assert result.layer.rank == rank
            assert result.layer.anchor is None
            assert result.error == pytest.approx(relative(truth(result.layer), exact), 1e-6, 1e-12)
            assert result.error <= best[rank] + 1e-6

        for tolerance in (0.5, 0.1, 1e-3):
            result = algebra.compress(layer, tolerance=tolerance)
            assert result.error == pytest.approx(relative(truth(result.layer), exact), 1e-6, 1e-12)
            assert result.error <= tolerance
            smaller = result.layer.rank - 1
            # The 0.1 % margin that rounding the factors needs.
            assert smaller == 0 or best[smaller] > tolerance * 0.998


@law(examples=1)
def test_compressing_without_a_limit_is_the_concatenation(case):
    adapter = case.moved(tether.init(case.model(), case.config()))
    for path, layer in adapter.layers.items():
        result = algebra.compress(layer)
        plain = tether.to_lora(adapter).layers[path]
        assert result.error <= 1e-6
        assert result.layer.rank == layer.rank * (1 if layer.anchor is None else 2)
        assert bits(plain.trainable.A) == bits(result.layer.trainable.A)
        assert bits(plain.trainable.B) == bits(result.layer.trainable.B)
