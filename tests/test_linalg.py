import numpy as np
import pytest
import torch
from torch import Tensor

from laws.cases import FAMILIES, bits
from tether import linalg
from tether.errors import ConvergenceError, NonFiniteError, RankTooLargeError

SHAPES = [(24, 7), (7, 24), (12, 12), (1, 17), (17, 1)]


def family(name: str) -> Tensor:
    return FAMILIES[name](torch.Generator().manual_seed(0))


def with_spectrum(m: int, n: int, s: Tensor) -> Tensor:
    """A random float32 matrix whose singular values are about `s`."""
    u = torch.linalg.qr(torch.randn(m, len(s), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, len(s), dtype=torch.float64))[0]
    return ((u * s.double()) @ v.T).float()


def exact_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return torch.from_numpy(u), torch.from_numpy(s), torch.from_numpy(vt)


def assert_conventions(svd: linalg.TruncatedSVD, weight: Tensor, rank: int) -> None:
    """Shapes, dtype, orthonormality, order, signs."""
    m, n = weight.shape
    assert [tuple(t.shape) for t in (svd.u, svd.s, svd.vt)] == [(m, rank), (rank,), (rank, n)]
    for tensor in (svd.u, svd.s, svd.vt):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
    one = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(svd.u.double().T @ svd.u.double(), one, rtol=0, atol=1e-6)
    torch.testing.assert_close(svd.vt.double() @ svd.vt.double().T, one, rtol=0, atol=1e-6)
    assert (svd.s >= 0).all()
    assert (svd.s.diff() <= 0).all()
    largest = svd.vt.gather(1, svd.vt.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


def assert_triplets(svd: linalg.TruncatedSVD, exact: tuple[Tensor, Tensor, Tensor]) -> None:
    """Equal to the exact triplets, up to the common sign of a pair."""
    u, s, vt = exact
    torch.testing.assert_close(svd.s.double(), s, rtol=1e-6, atol=1e-7 * float(s[0]))
    left, right = (svd.u.double() * u).sum(0), (svd.vt.double() * vt).sum(1)
    torch.testing.assert_close(left.abs(), torch.ones_like(left), rtol=0, atol=1e-6)
    torch.testing.assert_close(right, left, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_top_svd_gives_the_largest_triplets(shape):
    weight = torch.randn(shape)
    u, s, vt = exact_svd(weight)
    for rank in range(1, min(shape) + 1):
        svd = linalg.top_svd(weight, rank)
        assert_conventions(svd, weight, rank)
        assert_triplets(svd, (u[:, :rank], s[:rank], vt[:rank]))
        assert svd.backward_error < 1e-14


@pytest.mark.parametrize("shape", SHAPES)
def test_bottom_svd_gives_the_smallest_triplets(shape):
    weight = torch.randn(shape)
    u, s, vt = exact_svd(weight)
    for rank in range(1, min(shape) + 1):
        svd = linalg.bottom_svd(weight, rank)
        assert_conventions(svd, weight, rank)
        assert_triplets(svd, (u[:, -rank:], s[-rank:], vt[-rank:]))
        assert svd.backward_error < 1e-14


@pytest.mark.parametrize("decompose", [linalg.top_svd, linalg.bottom_svd])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_weights_decomposes(name, decompose):
    weight = family(name)
    s = exact_svd(weight)[1]
    for rank in range(1, min(weight.shape) + 1):
        svd = decompose(weight, rank)
        assert_conventions(svd, weight, rank)
        expected = s[:rank] if decompose is linalg.top_svd else s[-rank:]
        torch.testing.assert_close(
            svd.s.double(), expected, rtol=1e-6, atol=1e-7 * float(s[0]) + 1e-30
        )
        rest = weight.double() - (svd.u * svd.s).double() @ svd.vt.double()
        left = s[rank:] if decompose is linalg.top_svd else s[: len(s) - rank]
        assert float(torch.linalg.norm(rest)) == pytest.approx(
            float(torch.linalg.norm(left)), rel=1e-6, abs=1e-6 * float(s[0])
        )


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_size_of_a_weight_does_not_matter(factor):
    weight = torch.randn(9, 6)
    for decompose in (linalg.top_svd, linalg.bottom_svd):
        plain, scaled = decompose(weight, 3), decompose(weight * factor, 3)
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


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_qr_is_the_start_of_the_full_factorisation(shape):
    weight = torch.randn(shape)
    full_q, full_r = torch.linalg.qr(weight.double())
    for rank in range(1, min(shape) + 1):
        q, r = linalg.leading_qr(weight, rank)
        for mine, exact in ((q, full_q[:, :rank]), (r, full_r[:rank])):
            assert mine.dtype == torch.float32
            assert mine.is_contiguous()
            torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_leading_qr_is_orthonormal_for_every_family(name):
    weight = family(name)
    rank = min(weight.shape)
    q, r = linalg.leading_qr(weight, rank)
    one = torch.eye(rank)
    torch.testing.assert_close(q.T @ q, one, rtol=0, atol=1e-6)
    torch.testing.assert_close(q @ r[:, :rank], weight[:, :rank], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decompose", [linalg.top_svd, linalg.bottom_svd, linalg.leading_qr])
def test_the_same_values_give_the_same_bits_in_any_precision_and_are_not_written(decompose):
    half = torch.randn(11, 6).bfloat16()
    version, before = half._version, bits(half)
    results = [decompose(weight, 3) for weight in (half, half.float(), half.double())]
    tensors = [r if isinstance(r, tuple) else (r.u, r.s, r.vt) for r in results]
    first, *others = [[bits(t) for t in result] for result in tensors]
    assert others == [first, first]
    assert (half._version, bits(half)) == (version, before)


@pytest.mark.parametrize("decompose", [linalg.top_svd, linalg.bottom_svd])
def test_a_backward_error_above_the_tolerance_is_refused(decompose, monkeypatch):
    weight = torch.randn(12, 8)
    with pytest.raises(ConvergenceError, match=r"\(12, 8\).*exceeds tolerance 0.*Raise the"):
        decompose(weight, 2, tolerance=0.0)
    monkeypatch.setattr(linalg, "_gram_eigenvectors", lambda matrix: torch.eye(8).double())
    with pytest.raises(ConvergenceError, match=r"exceeds tolerance 1.00e-05"):
        decompose(weight, 2)
    assert decompose(weight, 2, tolerance=1e3).backward_error > 0.01


@pytest.mark.parametrize("decompose", [linalg.top_svd, linalg.bottom_svd, linalg.leading_qr])
@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_that_a_matrix_cannot_have_is_refused(decompose, rank):
    with pytest.raises(
        RankTooLargeError, match=rf"rank {rank} .* min\(shape\) 3 of matrix \(3, 5\)"
    ):
        decompose(torch.randn(3, 5), rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_finite_counts_and_places_bad_values(dtype):
    tensor = torch.randn(4, 5).to(dtype)
    linalg.check_finite(tensor, "fine")
    tensor[1, 2], tensor[3, 0] = torch.inf, torch.nan
    with pytest.raises(NonFiniteError, match=r"^here: 2 of 20 values .* first inf at \(1, 2\)"):
        linalg.check_finite(tensor, "here")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_values_pass_whose_sum_overflows_and_opposite_infinities_do_not(dtype):
    large = torch.full((2, 50), torch.finfo(dtype).max, dtype=dtype)
    linalg.check_finite(large, "w")
    large[0, 3], large[1, 4] = torch.inf, -torch.inf
    with pytest.raises(NonFiniteError, match=r"w: 2 of 100 .* the first inf at \(0, 3\)"):
        linalg.check_finite(large, "w")
