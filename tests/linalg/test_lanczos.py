import pytest
import torch
from torch import Tensor

from linalg.matrices import case
from tether.linalg.lanczos import Lanczos
from tether.linalg.tall import Tall

BLOCK = 16


def process(weight: Tensor, route: str, size: int, capacity: int = 400) -> Lanczos:
    """Of a tall weight, run to `size` vectors."""
    view = Tall.of(weight)
    gram = view.gram()
    apply = view.normal if route == "lanczos" else lambda rows: rows @ gram
    start = torch.randn(BLOCK, weight.shape[1], generator=torch.Generator().manual_seed(0))
    made = Lanczos.begin(apply, start, capacity)
    while made.size < size:
        made.step()
    return made


def lost(made: Lanczos) -> float:
    """How far the basis, with the block to be multiplied next, is from orthonormal."""
    basis = made.basis[: made.size + made.block].double()
    return float((basis @ basis.T - torch.eye(len(basis))).abs().max())


@pytest.mark.parametrize("route", ["gram", "lanczos"])
@pytest.mark.parametrize("name", ["real", "random", "line", "steep", "gap 1e-5"])
def test_the_basis_is_orthonormal_and_holds_the_operator(name, route):
    weight = case(name, 420, 320).weight
    made = process(weight, route, 288)
    # One pass of reorthogonalisation leaves 1e-5 to 1.
    assert lost(made) < 2e-6
    basis, size = made.basis[:288].double(), float(weight.double().norm()) ** 2
    operator = basis @ weight.double().T @ weight.double() @ basis.T
    # Rounding of 320 products, beside the largest eigenvalue.
    largest = float(torch.linalg.matrix_norm(weight.double(), 2)) ** 2
    assert largest < size
    torch.testing.assert_close(made.small[:288, :288], operator, rtol=0, atol=2e-6 * largest)
    following = made.basis[288:304].double() @ weight.double().T @ weight.double() @ basis.T
    torch.testing.assert_close(made.small[288:304, :288], following, rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize("route", ["gram", "lanczos"])
@pytest.mark.parametrize("size", [32, 128, 304])
@pytest.mark.parametrize(
    "weight",
    [
        torch.eye(320),
        torch.zeros(330, 320).fill_diagonal_(3.0),
        torch.zeros(330, 320).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(2.0)),
        torch.ones(330, 320),
        case("low rank", 420, 320).weight,
        case("flat", 420, 320).weight,
        case("outlier", 420, 320).weight,
        torch.cat([torch.randn(330, 30, generator=torch.Generator()), torch.zeros(330, 290)], 1),
    ],
    ids=["identity", "diagonal", "spike", "ones", "low rank", "flat", "outlier", "zero columns"],
)
def test_the_basis_stays_orthonormal_where_an_invariant_subspace_is_used_up(weight, size, route):
    made = process(weight, route, size)
    assert made.basis.isfinite()[: made.size + made.block].all()
    # What is left of a direction that is 1e-5 of the largest carries rounding of 1e-2 of itself
    # in the worst case; 1e-4 was seen.
    assert lost(made) < 5e-4
    largest = float(torch.linalg.matrix_norm(weight.double(), 2)) ** 2
    values, _, _ = made.ritz(BLOCK, torch.float64)
    exact = torch.linalg.svdvals(weight.double())[: min(size, BLOCK)].square()
    assert (values <= exact * (1 + 1e-5) + 1e-5 * largest).all()
    if size > 32:
        assert float(values[0]) == pytest.approx(largest, rel=1e-4)


def test_growing_room_changes_nothing():
    weight = case("real", 420, 320).weight
    small, large = (process(weight, "gram", 160, capacity) for capacity in (16, 400))
    assert len(small.basis) < 300
    assert torch.equal(small.basis[:176], large.basis[:176])
    assert torch.equal(small.small[:176, :176], large.small[:176, :176])
    assert not small.small[176:].any()


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_ritz_values_vectors_and_residuals_are_those_of_the_weight(precision):
    of = case("real", 420, 320)
    operator = of.weight.double().T @ of.weight.double()
    made = process(of.weight, "lanczos", 112)
    values, coefficients, couplings = made.ritz(20, precision)
    assert (values.diff() <= 0).all()
    assert values.dtype == coefficients.dtype == couplings.dtype == torch.float64
    rows = made.vectors(coefficients).double()
    residual = rows @ operator - values[:, None] * rows
    expected = residual @ residual.T
    largest = float(values[0])
    # Both hold rounding of some 1e-6 of the operator.
    torch.testing.assert_close(
        couplings.diagonal().sqrt(), expected.diagonal().sqrt(), rtol=1e-3, atol=3e-6 * largest
    )
    assert float(couplings.diagonal()[-1].sqrt()) > 1e-3 * largest  # not all of it is rounding
    torch.testing.assert_close(couplings, expected, rtol=1e-2, atol=1e-8 * largest**2)
    torch.testing.assert_close(values[:3], of.s[:3].square(), rtol=1e-5, atol=0)


def test_the_unseen_part_is_read_off_the_last_block():
    made = Lanczos(lambda rows: rows, torch.zeros(6, 5), torch.zeros(6, 6).double(), 2, 4)
    made.small[2:4, 2:4] = torch.tensor([[3.0, 9.0], [9.0, 5.0]])
    made.small[4:6, 2:4] = torch.tensor([[1.0, 2.0], [0.0, 2.0]])
    unseen = made.unseen()
    assert unseen.center == 4
    assert unseen.spread == pytest.approx((9 / 2) ** 0.5)


def test_a_started_process_keeps_the_span_of_its_start():
    start = torch.randn(3, 20)
    made = Lanczos.begin(lambda rows: rows, start, 6)
    basis = made.basis[:3]
    assert made.size == 0
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(start @ basis.T @ basis, start, rtol=0, atol=1e-5)
