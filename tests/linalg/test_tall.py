import pytest
import torch

from laws.cases import bits
from tether.linalg import tall
from tether.linalg.tall import Tall, panels

SHAPES = [(53, 17), (17, 53), (20, 20), (31, 1), (1, 31)]


@pytest.fixture(params=[1, 40, 170, 10**6])
def panel(request, monkeypatch):
    """Small panels: of one row, of two, of ten and a rest, and of all."""
    monkeypatch.setattr(tall, "PANEL", request.param)
    monkeypatch.setattr(tall, "WHOLE", 2 * request.param)
    monkeypatch.setattr(tall.panels, "__defaults__", (request.param,))
    return request.param


def exact(weight: torch.Tensor) -> torch.Tensor:
    """The weight as its tall matrix, float64."""
    wide = weight.shape[0] < weight.shape[1]
    return (weight.T if wide else weight).double()


def assert_near(found: torch.Tensor, expected: torch.Tensor, precision: torch.dtype) -> None:
    """To the rounding of sums of 53 values, beside the largest."""
    assert found.dtype == precision
    bound = 64 * torch.finfo(precision).eps * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("size", [1, 6, 7, 8, 20, 21, 22, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_panels_are_all_rows_in_order_and_not_too_large(size, dtype):
    matrix = torch.randn(11, 7).to(dtype)
    found = list(panels(matrix, size))
    assert torch.equal(torch.cat(found), matrix.float())
    assert all(p.numel() <= max(size, 7) for p in found)
    assert len(found) == -(-11 // max(1, size // 7))
    assert (found[0].data_ptr() == matrix.data_ptr()) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_the_products_are_those_of_float64(shape, dtype, precision, panel):
    weight = torch.randn(shape).to(dtype)
    view, matrix = Tall.of(weight), exact(weight)
    assert view.wide == (shape[0] < shape[1])
    assert view.scale == 1
    assert view.norm == pytest.approx(float(matrix.norm()), rel=1e-6)
    short = torch.randn(3, matrix.shape[1], dtype=precision)
    long = torch.randn(3, matrix.shape[0], dtype=precision)
    assert_near(view.image(short), short.double() @ matrix.T, precision)
    assert_near(view.back(long), long.double() @ matrix, precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_operator_is_that_of_float64_and_symmetric(shape, dtype, panel):
    weight = torch.randn(shape).to(dtype)
    view, matrix = Tall.of(weight), exact(weight)
    operator = matrix.T @ matrix
    gram = view.gram()
    assert_near(gram, operator, torch.float32)
    # The strips on the diagonal are multiplied whole.
    torch.testing.assert_close(gram, gram.T, rtol=1e-5, atol=1e-5)
    rows = torch.randn(3, matrix.shape[1])
    assert_near(view.normal(rows), rows.double() @ operator, torch.float32)


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e-18, 1e18, 1e30, 1e37])
@pytest.mark.parametrize("shape", [(53, 17), (17, 53)])
def test_products_of_very_large_or_small_weights_stay_in_range(shape, factor):
    weight = torch.randn(shape) * factor
    view, matrix = Tall.of(weight), exact(weight)
    assert 0.5 < view.norm / 17**0.5 < 2
    assert view.norm * view.scale == pytest.approx(float(matrix.norm()), rel=1e-6)
    assert torch.tensor(view.scale).frexp()[0] == 0.5  # a power of two
    if factor in {1e-38, 1e37}:
        return  # such weights go another way
    matrix = matrix / view.scale
    short, long = torch.randn(3, 17), torch.randn(3, 53)
    operator = matrix.T @ matrix
    assert_near(view.image(short), short.double() @ matrix.T, torch.float32)
    assert_near(view.back(long), long.double() @ matrix, torch.float32)
    assert_near(view.normal(short), short.double() @ operator, torch.float32)
    assert_near(view.gram(), operator, torch.float32)


@pytest.mark.parametrize("value", [1e-5, 1e-3, 1.0, 1e3, 1e4])
def test_ordinary_weights_are_not_scaled(value):
    assert Tall.of(torch.randn(53, 17) * value).scale == 1


def test_a_zero_weight_and_one_beyond_float32_have_norm_zero():
    assert Tall.of(torch.zeros(5, 3)).norm == 0
    assert Tall.of(torch.full((5, 3), 1e200, dtype=torch.float64)).norm == 0


def test_half_precision_is_copied_whole_up_to_a_size_and_float32_never(monkeypatch):
    half, single = torch.randn(10, 7).bfloat16(), torch.randn(10, 7)
    monkeypatch.setattr(tall, "WHOLE", 70)
    assert Tall.of(half).matrix.dtype == torch.float32
    assert Tall.of(single).matrix.data_ptr() == single.data_ptr()
    monkeypatch.setattr(tall, "WHOLE", 69)
    assert Tall.of(half).matrix.data_ptr() == half.data_ptr()


@pytest.mark.parametrize("size", [40, 170, 10**6])
def test_equal_values_give_equal_bits_in_any_precision(size, monkeypatch):
    monkeypatch.setattr(tall, "WHOLE", 100)
    monkeypatch.setattr(tall.panels, "__defaults__", (size,))
    half = torch.randn(53, 17).bfloat16()
    rows = torch.randn(3, 17)
    first, *others = [Tall.of(weight) for weight in (half, half.float(), half.double())]
    for other in others:
        assert (other.norm, other.scale) == (first.norm, first.scale)
        assert bits(other.normal(rows)) == bits(first.normal(rows))
        assert bits(other.gram()) == bits(first.gram())
