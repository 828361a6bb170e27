import math

import pytest
import torch
from torch import Tensor

from tether.linalg.estimate import CLUSTER, EPS, ROUNDING, Unseen, estimate, rounded

FAR = 1e8  # a norm whose square dwarfs the energy: the tail is all of it


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def alone(values: Tensor, residuals: Tensor, unseen: Unseen, norm: float = FAR):
    """Estimate where there are no guards."""
    couplings = torch.diag(residuals.square())
    return estimate(values, couplings, len(values), unseen, norm, 1000)


@pytest.mark.parametrize("hidden", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("angle", [1e-5, 1e-4, 1e-3])
def test_one_unseen_value_gives_the_error_of_a_half_step_done(hidden, angle):
    """W = diag(s), s_1 = 1 and one more: the vector errs by an angle, W and Wᵀ are applied."""
    angle *= 1 - hidden**2  # small beside the gap
    s = doubles(1, hidden)
    v = doubles(math.cos(angle), math.sin(angle))
    value = float((s * v).square().sum())
    residual = float((s.square() * v - value * v).norm())
    u = s * v / (s * v).norm()
    back = s * u
    found = torch.outer(u, back)  # u·s·vᵀ
    error = float((found - torch.diag(doubles(1, 0))).norm())
    norm = float(s.norm())
    guess = alone(doubles(value), doubles(residual), Unseen(hidden**2, 0.0), norm)
    assert guess.product - ROUNDING == pytest.approx(error, rel=2e-3)
    missed = 1 - float(back.square().sum())
    mine = guess.excess * 2 * (norm**2 - value) - ROUNDING**2 * value
    assert mine == pytest.approx(missed, rel=2e-3, abs=1e-15)


@pytest.mark.parametrize(("center", "spread"), [(0.2, 0.05), (0.5, 0.1), (0.0, 0.2), (0.6, 0.1)])
def test_the_unseen_part_is_a_semicircle(center, spread):
    """Against the chain that has this diagonal and coupling for ever."""
    chain = torch.zeros(600, 600, dtype=torch.float64)
    chain.diagonal().fill_(center)
    for offset in (-1, 1):
        chain.diagonal(offset).fill_(spread)
    x, basis = torch.linalg.eigh(chain)
    weight = basis[0].square()  # of the residual, on the first vector of the chain
    values, residuals = doubles(2.0, 1.0), doubles(1e-4, 2e-4)
    parts = []
    missed = 0.0
    for value, residual in zip(values.tolist(), residuals.tolist(), strict=True):
        angles = residual**2 * weight / (value - x).square()
        parts.append(value * float((angles * ((x / value).square() + x / value) / 2).sum()))
        missed += residual**2 * float((weight * x / (value * (value - x))).sum())
    guess = alone(values, residuals, Unseen(center, spread), 10.0)
    assert guess.product - ROUNDING == pytest.approx((2 * sum(parts) / 3) ** 0.5, rel=1e-6)
    assert guess.excess == pytest.approx((missed + 3 * ROUNDING**2) / (2 * 97), rel=1e-6)


@pytest.mark.parametrize("hidden", [0.3, 0.8])
def test_kept_vectors_are_mixed_with_guards_through_the_unseen_part(hidden):
    """Two Ritz vectors that err into the same direction, exact within what both span."""
    kept, guard = 1.0, 1 - 1e-5
    small = 1e-4
    operator = torch.zeros(3, 3, dtype=torch.float64)
    operator.diagonal().copy_(doubles(kept, guard, hidden))
    operator[0, 2] = operator[2, 0] = operator[1, 2] = operator[2, 1] = small
    exact = torch.linalg.eigh(operator)[1][:, -1]
    couplings = torch.full((2, 2), small**2, dtype=torch.float64)
    guess = estimate(doubles(kept, guard), couplings, 1, Unseen(hidden, 0.0), FAR, 10**30)
    mixed = float(exact[1] / exact[0])
    outside = small**2 / (kept - hidden) ** 2 * (hidden**2 + hidden) / 2
    expected = (2 * (mixed**2 + outside)) ** 0.5
    assert mixed**2 > outside
    assert guess.product - ROUNDING == pytest.approx(expected, rel=0.02)


def test_rounding_mixes_the_more_the_smaller_the_gap_and_the_matrix():
    none = torch.zeros(2, 2, dtype=torch.float64)

    def mixing(gap: float, size: int, precision: torch.dtype) -> float:
        values = doubles(1, 1 - gap).square()
        return estimate(values, none, 1, Unseen(0, 0), FAR, size, precision).product - ROUNDING

    one = mixing(1e-3, 100, torch.float32)
    # Measured on exact vectors: 1.5 to 3 eps·s/√n of the gap.
    assert 1.5 < one / (2**0.5 * EPS / 10 / 1e-3) < 3
    assert mixing(1e-4, 100, torch.float32) == pytest.approx(10 * one, rel=1e-9)
    assert mixing(1e-3, 10_000, torch.float32) == pytest.approx(one / 10, rel=1e-9)
    assert mixing(1e-3, 100, torch.float64) == pytest.approx(one / 2**29, abs=1e-20)


def test_one_large_value_adds_its_rounding_to_the_small_ones():
    none = torch.zeros(3, 3, dtype=torch.float64)
    values = doubles(1e6, 1, 0.98)
    alone = estimate(values[1:], none[1:, 1:], 1, Unseen(0, 0), FAR, 100)
    beside = estimate(values, none, 2, Unseen(0, 0), FAR, 100)
    absolute = (beside.product - ROUNDING) * (1e6 + 1) ** 0.5
    # Of the small triplet, 51 times as much; the large one has a gap of its own size.
    gap = 1 - 0.98**0.5
    expected = math.hypot(51 / gap, 1e3 * (1e3 + 50) / (1e3 - 0.98**0.5)) / (1.05 / gap)
    assert absolute / (alone.product - ROUNDING) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("apart", [0.0, 0.99 * CLUSTER, 1.01 * CLUSTER, 0.1])
def test_a_cut_is_unique_from_the_rounding_of_float32_on(apart):
    values = doubles(2, 1 + apart * 2, 1).square()
    none = torch.zeros(3, 3, dtype=torch.float64)
    guess = estimate(values, none, 2, Unseen(0, 0), FAR, 100)
    assert guess.unique == (apart > CLUSTER)
    if not guess.unique:
        assert guess.product < 2 * ROUNDING  # any vectors of the cluster will do
    assert estimate(values, none, 3, Unseen(0, 0), FAR, 100).unique


def test_residuals_of_the_size_of_rounding_count_but_in_the_cluster_of_the_cut():
    residual = 4 * EPS
    couplings = residual**2 * torch.eye(3, dtype=torch.float64)
    near = Unseen(1 - 1e-4, 0.0)
    cut, within = (
        estimate(values, couplings, 2, near, FAR, 10**9)
        for values in (doubles(1.3, 1, 1 - 9e-5), doubles(1.3, 1, 1))
    )
    assert not within.unique
    assert within.product < 4 * ROUNDING
    assert cut.unique
    assert cut.product > residual / 1e-4 / 2
    above = estimate(doubles(1 + 2e-4, 1, 1), couplings, 2, near, FAR, 10**9)
    assert not above.unique
    assert above.product > residual / 3e-4 / 2
    large = estimate(doubles(1.3, 1, 1), 1e4 * couplings, 2, near, FAR, 10**9)
    assert large.product > 0.1


def test_no_triplet_errs_by_more_than_itself():
    inside = Unseen(1.0, 0.3)
    guess = alone(doubles(4, 1.2), doubles(0, 0.1), inside, 10.0)
    assert guess.product - ROUNDING == pytest.approx((2 * 1.2 / 5.2) ** 0.5)
    assert guess.angle == pytest.approx(0.5**0.5)
    # A Ritz value errs by no more than its residual.
    assert guess.excess == pytest.approx(0.1 / (2 * (100 - 5.2)), rel=1e-9)
    worst = alone(doubles(1, 1), doubles(1, 1), inside)
    assert worst.product == 2**0.5
    assert worst.angle == 1


def test_the_angle_counts_small_triplets_as_much_as_large_ones_but_none_of_rounding():
    values, residuals = doubles(1e4, 1, 1e-8), doubles(0, 0.1, 1e-9)
    guess = alone(values, residuals, Unseen(0.5, 0.0))
    outside = (0.1 / 0.5) ** 2 * (0.5**2 + 0.5) / 2
    assert guess.angle == pytest.approx((outside / 2) ** 0.5, rel=1e-9)
    assert guess.product == pytest.approx((2 * outside / 1e4) ** 0.5 + ROUNDING, rel=1e-3)


def test_nothing_is_wrong_with_a_zero_matrix():
    none = torch.zeros(3, 3, dtype=torch.float64)
    guess = estimate(doubles(0, 0, 0), none, 2, Unseen(0, 0), 0.0, 100)
    assert (guess.product, guess.excess, guess.unique, guess.angle) == (0, 0, True, 0)
    assert estimate(doubles(-1e-9, -2e-9), none[:2, :2], 1, Unseen(0, 0), 0.0, 9).product == 0


def test_a_tail_of_rounding_is_not_trusted():
    none = torch.zeros(1, 1, dtype=torch.float64)
    exact = estimate(doubles(1), none, 1, Unseen(0, 0), 1 + 1e-8, 100)
    assert exact.excess == pytest.approx(ROUNDING**2 / (2 * EPS**2), rel=1e-3)
    assert estimate(doubles(1), none, 1, Unseen(0, 0), 2.0, 100).excess < 1e-12


@pytest.mark.parametrize("size", [1e-60, 1e-15, 1.0, 1e15, 1e60])
@pytest.mark.parametrize("residual", [0.0, 1e-60, 1e-8, 1.0, 1e30])
@pytest.mark.parametrize("unseen", [(0.0, 0.0), (0.5, 0.1), (1.0, 0.0), (1.0, 1e-160), (3.0, 9.0)])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_extremes_give_numbers(size, residual, unseen, precision):
    values = size * doubles(2, 1, 1, 0.9, 1e-9, 0)
    couplings = torch.full((6, 6), (residual * size) ** 2, dtype=torch.float64)
    for rank in (1, 2, 3, 5, 6):
        part = Unseen(size * unseen[0], size * unseen[1])
        guess = estimate(values, couplings, rank, part, (5 * size) ** 0.5, 100, precision)
        assert ROUNDING <= guess.product <= 2**0.5
        assert 0 <= guess.excess < math.inf
        assert 0 <= guess.angle <= 2**0.5
        assert guess.unique == (rank != 2)


def test_rounded_drops_values_and_adds_residuals_that_float32_cannot_tell():
    values = doubles(4, 1, 5 * EPS, 15 * EPS, 17 * EPS, -1e-9)
    couplings = torch.arange(36, dtype=torch.float64).view(6, 6)
    kept, noisy = rounded(values, couplings)
    assert kept.tolist() == [4, 1, 0, 0, 17 * EPS, 0]
    added = noisy - couplings
    assert torch.equal(added, torch.diag(added.diagonal()))
    torch.testing.assert_close(
        added.diagonal()[:2], 16 * EPS**2 * doubles(16, 4), atol=1e-14, rtol=0
    )
    assert rounded(values, 0 * couplings)[1].diagonal()[1] == pytest.approx(64 * EPS**2)
