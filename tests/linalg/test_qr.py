import pytest
import torch

from laws.cases import FAMILIES, bits
from tether import linalg
from tether.errors import RankTooLargeError
from tether.linalg import qr, tall

SHAPES = [(24, 7), (7, 24), (12, 12), (1, 17), (17, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_qr_is_the_start_of_the_full_factorisation(shape):
    weight = torch.randn(shape)
    full_q, full_r = torch.linalg.qr(weight.double())
    for rank in range(1, min(shape) + 1):
        q, r = linalg.leading_qr(weight, rank)
        for mine, exact in ((q, full_q[:, :rank]), (r, full_r[:rank])):
            assert mine.dtype == torch.float32
            assert mine.is_contiguous()
            # R is a product of float32: rows of 24 err by 24·6e-8 of its size of 5 at most.
            torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=1e-6)


def test_r_errs_by_the_rounding_of_float32_on_a_larger_weight():
    weight = torch.randn(700, 500)
    q, r = linalg.leading_qr(weight, 40)
    full_q, full_r = torch.linalg.qr(weight.double())
    assert float((q - full_q[:, :40]).norm() / full_q[:, :40].norm()) < 1e-7
    assert float((r - full_r[:40]).norm() / full_r[:40].norm()) < 1e-6
    weight_again = q.double() @ r.double()
    torch.testing.assert_close(weight_again[:, :40], weight[:, :40].double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_leading_qr_is_orthonormal_for_every_family(name):
    weight = FAMILIES[name](torch.Generator().manual_seed(0))
    rank = min(weight.shape)
    q, r = linalg.leading_qr(weight, rank)
    one = torch.eye(rank)
    torch.testing.assert_close(q.T @ q, one, rtol=0, atol=1e-6)
    torch.testing.assert_close(q @ r[:, :rank], weight[:, :rank], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_same_values_give_the_same_bits_in_any_precision_and_are_not_written(half):
    values = torch.randn(11, 6).to(half)
    version, before = values._version, bits(values)
    found = [linalg.leading_qr(weight, 3) for weight in (values, values.float(), values.double())]
    first, *others = [[bits(t) for t in pair] for pair in found]
    assert others == [first, first]
    assert (values._version, bits(values)) == (version, before)


@pytest.mark.parametrize("size", [1, 13, 14, 77, 1000])
def test_panels_of_any_size_give_the_same_factors(size, monkeypatch):
    weight = torch.randn(11, 7).bfloat16()
    q, r = linalg.leading_qr(weight, 3)
    monkeypatch.setattr(qr, "panels", lambda weight: tall.panels(weight, size))
    again = linalg.leading_qr(weight, 3)
    assert bits(again[0]) == bits(q)
    torch.testing.assert_close(again[1], r, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_that_a_matrix_cannot_have_is_refused(rank):
    message = rf"rank {rank} .* min\(shape\) 3 of matrix \(3, 5\)"
    with pytest.raises(RankTooLargeError, match=message):
        linalg.leading_qr(torch.randn(3, 5), rank)
