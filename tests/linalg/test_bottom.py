import pytest
import torch
from torch import Tensor

from laws.cases import FAMILIES, bits
from linalg.matrices import assert_conventions, assert_triplets, exact_svd, product, with_spectrum
from tether import linalg
from tether.errors import ConvergenceError, RankTooLargeError
from tether.linalg import bottom

SHAPES = [(24, 7), (7, 24), (12, 12), (1, 17), (17, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_bottom_svd_gives_the_smallest_triplets(shape):
    weight = torch.randn(shape)
    u, s, vt = exact_svd(weight)
    for rank in range(1, min(shape) + 1):
        svd = linalg.bottom_svd(weight, rank)
        assert_conventions(svd, weight, rank)
        assert_triplets(svd, (u[:, -rank:], s[-rank:], vt[-rank:]))
        assert svd.backward_error < 1e-14
        assert svd.certificate is None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_weights_decomposes(name):
    weight = FAMILIES[name](torch.Generator().manual_seed(0))
    s = exact_svd(weight)[1]
    for rank in range(1, min(weight.shape) + 1):
        svd = linalg.bottom_svd(weight, rank)
        assert_conventions(svd, weight, rank)
        torch.testing.assert_close(
            svd.s.double(), s[-rank:], rtol=1e-6, atol=1e-7 * float(s[0]) + 1e-30
        )
        rest, left = (weight.double() - product(svd)).norm(), s[: len(s) - rank].norm()
        assert float(rest) == pytest.approx(float(left), rel=1e-6, abs=1e-6 * float(s[0]))


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_size_of_a_weight_does_not_matter(factor):
    weight = torch.randn(9, 6)
    plain, scaled = linalg.bottom_svd(weight, 3), linalg.bottom_svd(weight * factor, 3)
    torch.testing.assert_close(scaled.s, plain.s * factor, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.vt, plain.vt, rtol=1e-5, atol=1e-5)


def test_bottom_svd_keeps_what_a_float32_svd_loses():
    weight = with_spectrum(96, 64, torch.logspace(0, -6, 64))
    rank = 8
    _, s, vt = exact_svd(weight)
    mine, theirs = linalg.bottom_svd(weight, rank), torch.linalg.svd(weight, full_matrices=False)

    def lost(vectors: Tensor) -> float:
        """Sine of the angle between the subspaces."""
        inside = vectors.double() @ vt[-rank:].T @ vt[-rank:]
        return float(torch.linalg.matrix_norm(vectors.double() - inside, 2))

    def error(values: Tensor) -> float:
        return float((values.double() - s[-rank:]).abs().max() / s[0])

    assert error(mine.s) < 1e-11
    assert error(theirs[1][-rank:]) > 1e-8
    assert lost(mine.vt) < 1e-5
    assert lost(theirs[2][-rank:]) > 1e-3


def test_the_same_values_give_the_same_bits_in_any_precision_and_are_not_written():
    half = torch.randn(11, 6).bfloat16()
    version, before = half._version, bits(half)
    found = [linalg.bottom_svd(weight, 3) for weight in (half, half.float(), half.double())]
    first, *others = [[bits(t) for t in (svd.u, svd.s, svd.vt)] for svd in found]
    assert others == [first, first]
    assert (half._version, bits(half)) == (version, before)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_a_backward_error_above_the_tolerance_is_refused(shape, monkeypatch):
    weight = torch.randn(shape)
    message = rf"matrix \({shape[0]}, {shape[1]}\).*exceeds tolerance 0.*Raise the"
    with pytest.raises(ConvergenceError, match=message):
        linalg.bottom_svd(weight, 2, tolerance=0.0)
    monkeypatch.setattr(bottom, "gram_eigenvectors", lambda matrix: torch.eye(8).double())
    with pytest.raises(ConvergenceError, match=r"exceeds tolerance 1.00e-05"):
        linalg.bottom_svd(weight, 2)
    assert linalg.bottom_svd(weight, 2, tolerance=1e3).backward_error > 0.01


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_that_a_matrix_cannot_have_is_refused(rank):
    message = rf"rank {rank} .* min\(shape\) 3 of matrix \(3, 5\)"
    with pytest.raises(RankTooLargeError, match=message):
        linalg.bottom_svd(torch.randn(3, 5), rank)
