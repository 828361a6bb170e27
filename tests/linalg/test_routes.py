"""Ways that are given up, and products of other precisions."""

import pytest
import torch

from linalg.matrices import case, true_errors
from tether import linalg
from tether.linalg import tall, top
from tether.linalg.lanczos import Lanczos


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The sizes of every basis after every step."""
    sizes, step = [], Lanczos.step

    def counted(self: Lanczos) -> None:
        step(self)
        sizes.append(self.size)

    monkeypatch.setattr(Lanczos, "step", counted)
    return sizes


@pytest.fixture
def half(monkeypatch) -> list[torch.dtype]:
    """A processor that multiplies bfloat16, short sides of a few hundred, the products' dtypes."""
    monkeypatch.setattr(top, "_GRAM", 256)
    monkeypatch.setattr(top, "fast_bfloat16", lambda device: True)
    used, rough = [], tall.Tall.rough

    def spied(self: tall.Tall) -> object:
        used.append(torch.bfloat16)
        return rough(self)

    monkeypatch.setattr(tall.Tall, "rough", spied)
    return used


@pytest.mark.parametrize(
    ("criterion", "tolerance"), [("excess", 1e-6), ("excess", 5e-7), ("product", 1e-2)]
)
@pytest.mark.parametrize("shape", [(420, 320), (320, 420)])
@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_products_meet_wide_tolerances_and_are_certified(
    criterion, tolerance, shape, seed, half
):
    of = case("real", *shape)
    svd = linalg.top_svd(of.weight, 16, tolerance, criterion=criterion, seed=seed)
    assert (svd.certificate.route, svd.certificate.fallback) == ("bfloat16", "")
    error, excess = true_errors(svd, of)
    assert (error if criterion == "product" else excess) <= tolerance
    assert error / 3 <= svd.certificate.product_error <= 3 * error
    assert excess / 3 <= svd.certificate.excess <= 3 * excess
    assert half == [torch.bfloat16]


@pytest.mark.parametrize(("criterion", "tolerance"), [("product", 1e-3), ("excess", 1e-8)])
def test_bfloat16_products_are_not_tried_where_they_cannot_do(criterion, tolerance, half):
    svd = linalg.top_svd(case("real", 420, 320).weight, 16, tolerance, criterion=criterion)
    assert svd.certificate.route == "lanczos"
    assert not half


def test_without_such_a_processor_nothing_is_rounded(half, monkeypatch):
    monkeypatch.setattr(top, "fast_bfloat16", lambda device: False)
    svd = linalg.top_svd(case("real", 420, 320).weight, 16, 1e-6, criterion="excess")
    assert svd.certificate.route == "lanczos"
    assert not half


def test_what_bfloat16_products_miss_is_done_again_and_said(half, monkeypatch):
    monkeypatch.setattr(top.Aim, "rough", True)
    of = case("real", 420, 320)
    svd = linalg.top_svd(of.weight, 16, 1e-5)
    assert svd.certificate.route == "lanczos"
    assert svd.certificate.fallback.startswith("bfloat16: product error ")
    assert true_errors(svd, of)[0] <= 1e-5


def test_a_processor_is_asked_only_what_it_knows():
    assert tall.fast_bfloat16(torch.device("cpu")) in (True, False)
    assert not tall.fast_bfloat16(torch.device("meta"))


def test_large_weights_that_stop_converging_are_given_up_early(steps, monkeypatch):
    monkeypatch.setattr(top, "_GRAM", 256)
    of = case("outlier", 660, 600)
    svd = linalg.top_svd(of.weight, 16, 1e-6)
    assert svd.certificate.route == "dense"
    assert max(steps) < 450, "long before the last vectors"
    assert f"after {max(steps)} of 600 vectors" in svd.certificate.fallback
    assert true_errors(svd, of)[0] < 1e-7


def test_a_slow_beginning_is_no_end(steps):
    # Until the basis holds the cut, the error does not fall at all.
    history = [(0, 1.0), *((k, 1.4) for k in range(200, 600, 50))]
    assert not top._stalled(history)
    assert not top._stalled([*history, (600, 0.2), (650, 0.05), (700, 0.03), (750, 0.02)])
    assert top._stalled(
        [(0, 1.0), (1, 0.2), (2, 0.01), (3, 0.007), (4, 0.007), (5, 0.006), (6, 0.006)]
    )


def test_a_tolerance_below_rounding_is_not_tried(steps):
    of = case("real", 420, 320)
    svd = linalg.top_svd(of.weight, 16, 1e-7)
    assert not steps
    assert svd.certificate.route == "dense"
    assert svd.certificate.fallback == "tolerance 1.0e-07 is below float32's rounding"
    assert true_errors(svd, of)[0] <= 1e-7


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_products_are_exact_whatever_the_process_allows_and_the_setting_comes_back(
    setting, monkeypatch
):
    seen, normal = set(), tall.Tall.gram

    def spied(self: tall.Tall) -> torch.Tensor:
        seen.add(torch.get_float32_matmul_precision())
        return normal(self)

    monkeypatch.setattr(tall.Tall, "gram", spied)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        linalg.top_svd(case("real", 420, 320).weight, 16)
        assert torch.get_float32_matmul_precision() == setting
        with pytest.raises(ZeroDivisionError), linalg.full_precision():
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"highest"}
