import re

import pytest
import torch

from laws.cases import FAMILIES
from linalg.matrices import (
    Case,
    assert_conventions,
    assert_triplets,
    case,
    exact_svd,
    product,
    true_errors,
)
from tether import linalg
from tether.linalg import tall, top
from tether.linalg.estimate import EPS, ROUNDING, Estimate
from tether.linalg.top import Aim

SHAPES = [(24, 7), (7, 24), (12, 12), (1, 17), (17, 1)]
TOLERANCES = (1e-2, 1e-3, 1e-5)


def assert_certified(svd: linalg.TruncatedSVD, of: Case) -> tuple[float, float]:
    """The certificate holds, as far as it says that it does."""
    error, excess = true_errors(svd, of)
    certificate = svd.certificate
    if certificate.unique and error < 2e-2:
        assert error / 3 <= certificate.product_error <= 3 * error + ROUNDING
    return error, excess


@pytest.mark.parametrize("shape", SHAPES)
def test_small_weights_give_the_largest_triplets(shape):
    weight = torch.randn(shape)
    u, s, vt = exact_svd(weight)
    for rank in range(1, min(shape) + 1):
        svd = linalg.top_svd(weight, rank)
        assert_conventions(svd, weight, rank)
        assert_triplets(svd, (u[:, :rank], s[:rank], vt[:rank]))
        assert svd.backward_error < 1e-14
        assert svd.certificate.route == "dense"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_weights_decomposes(name):
    weight = FAMILIES[name](torch.Generator().manual_seed(0))
    s = exact_svd(weight)[1]
    for rank in range(1, min(weight.shape) + 1):
        svd = linalg.top_svd(weight, rank)
        assert_conventions(svd, weight, rank)
        torch.testing.assert_close(
            svd.s.double(), s[:rank], rtol=1e-6, atol=1e-7 * float(s[0]) + 1e-30
        )
        rest = float((weight.double() - product(svd)).norm())
        assert rest == pytest.approx(float(s[rank:].norm()), rel=1e-6, abs=1e-6 * float(s[0]))


@pytest.mark.parametrize("shape", [(420, 320), (320, 420), (320, 320)])
@pytest.mark.parametrize("name", ["real", "random", "power", "low rank"])
def test_larger_weights_give_the_largest_triplets(name, shape, route):
    of = case(name, *shape)
    for rank in (1, 9):
        svd = linalg.top_svd(of.weight, rank, 2e-6)
        assert svd.certificate.route == route
        assert svd.certificate.fallback == ""
        assert_conventions(svd, of.weight, rank)
        assert assert_certified(svd, of)[0] <= 2e-6
        torch.testing.assert_close(svd.s.double(), of.s[:rank], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [16, 200])
def test_a_short_side_above_1024_is_never_multiplied_to_a_gram_matrix(rank, monkeypatch):
    monkeypatch.setattr(tall.Tall, "gram", None)
    of = case("real", 1100, 1040)
    svd = linalg.top_svd(of.weight, rank)
    assert (svd.certificate.route, svd.certificate.fallback) == ("lanczos", "")
    assert_conventions(svd, of.weight, rank)
    assert assert_certified(svd, of)[0] <= 1e-5


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [((600, 256), 5, "dense"), ((300, 257), 5, "gram"), ((300, 300), 100, "gram"),
     ((300, 300), 101, "dense")],
)  # fmt: skip
def test_the_route_is_chosen_by_the_short_side_and_the_rank(shape, rank, expected):
    svd = linalg.top_svd(case("power", *shape).weight, rank, 1e-2)
    assert (svd.certificate.route, svd.certificate.fallback) == (expected, "")


@pytest.mark.parametrize("criterion", linalg.CRITERIA)
@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize(
    ("rank", "route"),
    [(1, "gram"), (16, "gram"), (16, "lanczos"), (60, "lanczos")],
    indirect=["route"],
)
@pytest.mark.parametrize(
    "name", ["real", "random", "power", "line", "step 16", "step 16 of 1e-3", "gap 1e-3"]
)
def test_the_tolerance_is_met_and_the_certificate_true(name, rank, tolerance, criterion, route):
    of = case(name, 420, 320)
    svd = linalg.top_svd(of.weight, rank, tolerance, criterion=criterion)
    error, excess = assert_certified(svd, of)
    if svd.certificate.unique or criterion == "excess":
        assert (error if criterion == "product" else excess) <= tolerance


@pytest.mark.parametrize("name", ["real", "power"])
@pytest.mark.parametrize("rank", [1, 16])
def test_a_product_error_of_1e_6_is_met(name, rank, route):
    of = case(name, 420, 320)
    svd = linalg.top_svd(of.weight, rank, 1e-6)
    assert svd.certificate.route == route
    assert assert_certified(svd, of)[0] <= 1e-6


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_the_certificate_is_true_for_every_start(seed, tolerance, route):
    of = case("real", 420, 320)
    svd = linalg.top_svd(of.weight, 16, tolerance, seed=seed)
    assert assert_certified(svd, of)[0] <= tolerance


@pytest.mark.parametrize("name", ["real", "random", "line"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 1e-7])
def test_the_excess_is_estimated(name, tolerance, route):
    of = case(name, 420, 320)
    found = []
    for rank in (4, 16, 40):
        svd = linalg.top_svd(of.weight, rank, tolerance, criterion="excess")
        if svd.certificate.route != "dense":
            found.append((svd.certificate.excess, true_errors(svd, of)[1]))
    assert found
    for estimated, true in found:
        assert true <= tolerance
        assert true / 3 - 1e-13 <= estimated <= 3 * true + 1e-13


def test_an_estimate_is_good_enough_where_it_is_small_and_can_be_trusted():
    product, excess = Aim(5, 1e-3, "product"), Aim(5, 1e-3, "excess")
    assert product.met(Estimate(4e-4, 1.0, True, 1e-2))
    assert not product.met(Estimate(6e-4, 0.0, True, 1e-2))
    assert not product.met(Estimate(4e-4, 0.0, True, 4e-2))
    assert excess.met(Estimate(1.9e-2, 2e-4, True, 1e-2))
    assert not excess.met(Estimate(1.9e-2, 3e-4, True, 1e-2))
    assert not excess.met(Estimate(2.1e-2, 2e-4, True, 1e-2))
    assert not excess.met(Estimate(1.9e-2, 2e-4, True, 4e-2))
    assert excess.met(Estimate(9e-7, 18.0, True, 1.0))  # a weight of low rank
    assert not Aim(5, 1.0, "product").met(Estimate(2.1e-2, 0.0, True, 1e-2))


@pytest.mark.parametrize("criterion", linalg.CRITERIA)
@pytest.mark.parametrize("rank", [2, 16])
def test_small_triplets_beside_a_large_one_are_found_too(rank, criterion, route):
    of = case("outlier 1e3", 420, 320)
    error, excess = true_errors(linalg.top_svd(of.weight, rank, 1e-3, criterion=criterion), of)
    assert (error if criterion == "product" else excess) <= 1e-3


def test_excess_is_met_earlier_than_the_product():
    of = case("real", 1100, 1040)
    errors = {
        criterion: true_errors(linalg.top_svd(of.weight, 16, 1e-4, criterion=criterion), of)
        for criterion in linalg.CRITERIA
    }
    assert errors["product"][0] <= 1e-4
    assert errors["excess"][0] > 1e-3
    assert errors["excess"][1] <= 1e-4


@pytest.mark.parametrize("small", [256, 1000])
def test_a_cut_is_unique_but_within_a_cluster(small, route, monkeypatch):
    monkeypatch.setattr(top, "_SMALL", small)
    of = case("cluster", 420, 320)  # the values 16 to 18 are equal
    for rank in range(13, 21):
        svd = linalg.top_svd(of.weight, rank, 1e-4)
        assert svd.certificate.unique == (rank not in {16, 17})
        error, excess = true_errors(svd, of)
        assert excess < 1e-8
        if svd.certificate.unique:
            assert error <= 1e-4
    assert linalg.top_svd(case("gap 1e-5", 420, 320).weight, 16, 1e-4).certificate.unique


def test_a_flat_spectrum_is_no_reason_to_give_up(route):
    for weight in (case("flat", 420, 320).weight, torch.eye(320)):
        svd = linalg.top_svd(weight, 16)
        assert (svd.certificate.route, svd.certificate.unique) == (route, False)
        assert_conventions(svd, weight, 16)
        # Sines below 1e-3 cost 1e-6 of the energy.
        torch.testing.assert_close(svd.s, torch.ones(16), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "rank", "tolerance", "criterion"),
    [("outlier", 16, 1e-5, "product"), ("outlier", 16, 1e-6, "excess"),
     ("step 16", 1, 1e-5, "product"), ("step 16 of 1e-3", 1, 1e-4, "product"),
     ("real", 16, 4e-7, "product"), ("real", 100, 1e-3, "product")],
)  # fmt: skip
def test_what_float32_cannot_reach_is_found_by_float64(name, rank, tolerance, criterion, route):
    of = case(name, 420, 320)
    svd = linalg.top_svd(of.weight, rank, tolerance, criterion=criterion)
    assert svd.certificate.route == "dense"
    why = re.fullmatch(
        rf"{route}: {criterion} error (\d\.\de[+-]\d\d) after (\d+) of 320 vectors",
        svd.certificate.fallback,
    )
    assert float(why[1]) > tolerance / 4
    assert 100 < int(why[2]) <= 304
    assert_conventions(svd, of.weight, rank)
    error, excess = true_errors(svd, of)
    assert error <= 2 * EPS
    assert svd.certificate.product_error == EPS
    assert excess <= 1e-8


def test_a_gap_that_float32_products_blur_is_polished_in_float64(route, monkeypatch):
    of, used, polish = case("gap 1e-5", 420, 320), [], top._polish
    precisions = [None, torch.float32]

    def spy(tall, rows, aim, unseen, way):
        used.append(rows.dtype)
        return polish(tall, rows.to(precisions[0] or rows.dtype), aim, unseen, way)

    monkeypatch.setattr(top, "_polish", spy)
    svd = linalg.top_svd(of.weight, 16, 1e-5)
    assert svd.certificate.route == route
    assert used[-1] == torch.float64
    assert assert_certified(svd, of)[0] <= 1e-5

    used.clear()
    linalg.top_svd(case("real", 420, 320).weight, 16, 1e-5)
    assert set(used) == {torch.float32}  # where it is enough

    # Nor does float32 pass for enough where it is not.
    precisions[0] = torch.float32
    assert linalg.top_svd(of.weight, 16, 1e-5).certificate.route == "dense"


@pytest.mark.parametrize("name", ["real", "power", "line"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_the_backward_error_bounds_the_residual(name, tolerance, route):
    of = case(name, 420, 320)
    svd = linalg.top_svd(of.weight, 9, tolerance)
    weight, u, s, vt = (t.double() for t in (of.weight, svd.u, svd.s, svd.vt))
    size = float(s.norm())
    for residual in (weight @ vt.T - u * s, weight.T @ u - vt.T * s):
        # The rounding of the triplets to float32 comes on top.
        assert float(residual.norm()) / size <= svd.backward_error + 10 * EPS
    if tolerance == 1e-2:
        assert svd.backward_error <= 1e-2
