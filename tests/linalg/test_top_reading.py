import math
import re

import pytest
import torch

from laws.cases import bits
from linalg.matrices import assert_conventions, case, product
from tether import linalg
from tether.errors import ConfigError, ConvergenceError, RankTooLargeError
from tether.linalg import tall, top


def arrangements(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values: contiguous, transposed, and with strides."""
    spread = torch.zeros(2 * len(values), 3 * values.shape[1], dtype=values.dtype)
    spread[::2, ::3] = values
    return {"plain": values, "transposed": values.T.clone().T, "strided": spread[::2, ::3]}


@pytest.mark.parametrize("arrangement", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_the_same_values_give_the_same_bits_in_any_precision(half, arrangement, wide, route):
    of, rank = case("real", 420, 320), 5
    values = arrangements((of.weight.T if wide else of.weight).to(half))[arrangement]
    version, before = values._version, bits(values)
    found = [linalg.top_svd(w, rank) for w in (values, values.float(), values.double())]
    assert found[0].certificate.route == route
    assert_conventions(found[0], values, rank)
    first, *others = [[bits(t) for t in (svd.u, svd.s, svd.vt)] for svd in found]
    assert others == [first, first]
    assert (values._version, bits(values)) == (version, before)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_so_does_the_dense_route(half):
    values = torch.randn(11, 6).to(half)
    found = [linalg.top_svd(w, 3) for w in (values, values.float(), values.double())]
    first, *others = [[bits(t) for t in (svd.u, svd.s, svd.vt)] for svd in found]
    assert others == [first, first]


def test_the_transposed_weight_has_the_transposed_triplets(route):
    weight = case("real", 420, 320).weight
    one, other = linalg.top_svd(weight, 7), linalg.top_svd(weight.T.contiguous(), 7)
    sign = (one.u * other.vt.T).sum(0).sign()
    torch.testing.assert_close(other.vt.T * sign, one.u, rtol=0, atol=1e-4)
    torch.testing.assert_close(other.u * sign, one.vt.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_a_weight_in_half_precision_is_never_copied_whole(half, wide, monkeypatch):
    monkeypatch.setattr(top, "_GRAM", 256)
    monkeypatch.setattr(tall, "WHOLE", 20_000)
    monkeypatch.setattr(tall, "PANEL", 5_000)
    monkeypatch.setattr(tall.panels, "__defaults__", (5_000,))
    weight = case("real", 420, 320).weight.to(half)
    weight = weight.T if wide else weight
    expected = linalg.top_svd(weight.float(), 7)
    copied, convert = [], torch.Tensor.float

    def spy(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == half:
            copied.append(tensor.numel())
        return convert(tensor)

    monkeypatch.setattr(torch.Tensor, "float", spy)
    found = linalg.top_svd(weight, 7)
    monkeypatch.undo()
    assert found.certificate == expected.certificate
    assert found.certificate.route == "lanczos"
    assert 4_000 <= max(copied) <= 20_000
    for mine, other in zip((found.u, found.s, found.vt), (expected.u, expected.s, expected.vt),
                           strict=True):  # fmt: skip
        assert bits(mine) == bits(other)


def test_the_same_seed_gives_the_same_bits_and_others_the_same_product(route):
    of = case("real", 420, 320)
    state = torch.get_rng_state()
    one, again, other = (linalg.top_svd(of.weight, 9, 1e-4, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert [bits(t) for t in (one.u, one.s, one.vt)] == [
        bits(t) for t in (again.u, again.s, again.vt)
    ]
    assert bits(one.vt) != bits(other.vt)
    assert one.certificate != other.certificate
    apart = float((product(one) - product(other)).norm() / product(one).norm())
    assert apart <= 2e-4


def test_the_number_of_threads_changes_no_more_than_the_certificate_says(route):
    of, threads = case("real", 420, 320), torch.get_num_threads()
    try:
        found = []
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(linalg.top_svd(of.weight, 9))
    finally:
        torch.set_num_threads(threads)
    apart = float((product(found[0]) - product(found[1])).norm() / product(found[0]).norm())
    assert apart <= 2e-5


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e29])
@pytest.mark.parametrize("size", [9, 320])
def test_the_size_of_a_weight_does_not_matter(factor, size, route):
    weight = torch.randn(9, 6) if size == 9 else case("real", 420, 320).weight
    plain, scaled = linalg.top_svd(weight, 3), linalg.top_svd(weight * factor, 3)
    assert scaled.certificate.route == plain.certificate.route
    torch.testing.assert_close(scaled.s, plain.s * factor, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.vt, plain.vt, rtol=0, atol=1e-4)
    assert scaled.certificate.product_error == pytest.approx(
        plain.certificate.product_error, rel=0.5
    )


def test_float32_at_its_end_is_left_to_float64():
    weight = case("real", 420, 320).weight * 1e-37
    svd = linalg.top_svd(weight, 3)
    assert svd.certificate.route == "dense"
    assert_conventions(svd, weight, 3)


@pytest.mark.parametrize("rank", [1, 9])
def test_a_zero_matrix_has_zero_values_and_orthonormal_vectors(rank):
    weight = torch.zeros(400, 300)
    svd = linalg.top_svd(weight, rank)
    assert_conventions(svd, weight, rank)
    assert not svd.s.any()
    assert svd.certificate.excess == 0


def test_a_weight_that_wants_a_gradient_is_only_read():
    weight = case("real", 420, 320).weight.clone().requires_grad_()
    svd = linalg.top_svd(weight, 3)
    assert not svd.u.requires_grad
    assert weight.grad is None


@pytest.mark.parametrize("tolerance", [0.0, -1e-5, math.nan, math.inf, -math.inf])
def test_a_tolerance_that_cannot_be_meant_is_refused(tolerance):
    message = rf"^tolerance must be a positive number, not {re.escape(repr(tolerance))}\.$"
    with pytest.raises(ConfigError, match=message):
        linalg.top_svd(torch.randn(5, 4), 2, tolerance)


def test_an_unknown_criterion_is_refused():
    with pytest.raises(ConfigError, match=r"^criterion 'angle' is not one of product, excess\.$"):
        linalg.top_svd(torch.randn(5, 4), 2, criterion="angle")


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_that_a_matrix_cannot_have_is_refused(rank):
    message = rf"rank {rank} .* min\(shape\) 3 of matrix \(3, 5\)"
    with pytest.raises(RankTooLargeError, match=message):
        linalg.top_svd(torch.randn(3, 5), rank)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_a_backward_error_above_the_tolerance_is_refused(shape, monkeypatch):
    weight = torch.randn(shape)
    message = rf"matrix \({shape[0]}, {shape[1]}\).*exceeds tolerance 1.00e-30.*Raise the"
    with pytest.raises(ConvergenceError, match=message):
        linalg.top_svd(weight, 2, tolerance=1e-30)
    monkeypatch.setattr(top, "gram_eigenvectors", lambda matrix: torch.eye(8).double())
    monkeypatch.setattr(top, "guards", lambda rank: 0)
    with pytest.raises(ConvergenceError, match=r"exceeds tolerance 1.00e-05"):
        linalg.top_svd(weight, 2)
    assert linalg.top_svd(weight, 2, tolerance=1e3).backward_error > 0.01
