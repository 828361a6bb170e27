import dataclasses
import math

import pytest
import torch
from torch import Tensor

from laws.cases import bits, truth
from tether import algebra
from tether.errors import ConfigError
from tether.provenance import Provenance
from tether.value import Adapter, Factors, LayerAdapter, Layout


def layer(
    rank: int = 3,
    shape: tuple[int, int] = (20, 14),
    size: float = 0.1,
    anchored: bool = True,
    dtype: torch.dtype = torch.float32,
) -> LayerAdapter:
    out_features, in_features = shape

    def draw(scale: float) -> Factors:
        a, b = torch.randn(rank, in_features), torch.randn(out_features, rank)
        return Factors(scale * a, scale * b).to(dtype)

    anchor = draw(1.0) if anchored else None
    return LayerAdapter(draw(size), anchor, 0.7, Layout("linear", shape))


def still(value: LayerAdapter) -> LayerAdapter:
    return dataclasses.replace(value, trainable=value.trainable.zeros_like())


def relative(changed: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.norm(changed - exact) / torch.linalg.norm(exact))


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("shape", [(20, 14), (1, 9), (5, 40)])
def test_everything_measured_on_factors_equals_the_dense_matrix(shape, size, anchored):
    value, other = (layer(1, shape, size, anchored) for _ in range(2))
    exact = truth(value)
    assert relative(algebra.delta(value).double(), exact) < 1e-6
    assert algebra.norm(value) == pytest.approx(float(exact.norm()), rel=1e-9)
    taken = torch.zeros(1) if value.anchor is None else 0.7 * value.anchor.B @ value.anchor.A
    assert algebra.anchor_norm(value) == pytest.approx(float(taken.norm()), rel=1e-6)
    assert algebra.relative_error(value, other) == pytest.approx(
        relative(truth(other), exact), rel=1e-9
    )


def test_a_change_of_zero_has_no_error():
    value = still(layer())
    assert algebra.norm(value) == 0
    assert algebra.relative_error(value, value) == 0
    assert algebra.relative_error(value, layer()) == math.inf
    for settings in ({}, {"rank": 1}, {"tolerance": 0.1}):
        result = algebra.compress(value, **settings)
        assert result.error == 0
        assert not algebra.delta(result.layer).any()


def test_a_plain_lora_in_half_precision_keeps_what_the_usual_conversion_loses():
    for size, usual_loss in ((1e-3, 1.0), (1e-2, 0.1)):
        value = layer(8, (128, 96), size)
        exact, scaling = truth(value), value.scaling
        anchor, current = value.anchor, value.current
        usual = torch.cat([current.B, -anchor.B], 1).bfloat16().double() @ (
            torch.cat([current.A, anchor.A]).bfloat16().double()
        )
        assert relative(scaling * usual, exact) > usual_loss
        plain = algebra.compress(value).layer.trainable.to(torch.bfloat16)
        assert relative(scaling * plain.B.double() @ plain.A.double(), exact) < 4e-3


def test_concatenation_is_current_b_beside_db_and_da_over_a0():
    value = layer()
    plain = algebra.compress(value).layer
    assert torch.equal(plain.trainable.B, torch.cat([value.current.B, value.trainable.B], dim=1))
    assert torch.equal(plain.trainable.A, torch.cat([value.trainable.A, value.anchor.A]))
    assert (plain.anchor, plain.scaling, plain.layout) == (None, value.scaling, value.layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_results_are_float32_or_better(dtype):
    value = layer(dtype=dtype)
    expected = torch.promote_types(dtype, torch.float32)
    assert algebra.delta(value).dtype == expected
    for settings in ({}, {"rank": 2}):
        assert algebra.compress(value, **settings).layer.trainable.A.dtype == expected
    assert algebra.compress(value).error < 1e-6


def test_a_rank_or_tolerance_keeps_the_largest_singular_values():
    u, v = (torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64))[0] for _ in range(2))
    s = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    value = LayerAdapter(Factors((s[:, None] * v.T), u), None, 1.0, Layout("linear", (12, 12)))
    for rank, lost in ((1, 0.1), (2, 0.01), (3, 0.001)):
        result = algebra.compress(value, rank=rank)
        assert result.error == pytest.approx(lost, rel=0.02)
        assert torch.allclose(torch.linalg.svdvals(algebra.delta(result.layer))[:rank], s[:rank])
        assert algebra.compress(value, tolerance=1.1 * lost).layer.rank == rank
        assert algebra.compress(value, tolerance=0.9 * lost).layer.rank == rank + 1
    assert algebra.compress(value, rank=2, tolerance=0.5).layer.rank == 1
    a, b = result.layer.trainable.A.norm(dim=1), result.layer.trainable.B.norm(dim=0)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(20, 14), (4, 30), (30, 4)])
def test_the_error_of_a_smaller_rank_is_that_of_the_rounded_factors(shape, dtype):
    value = layer(4, shape)
    exact = truth(value)
    for limit in ({"rank": 1}, {"rank": 4}, {"rank": 7}, {"tolerance": 0.01}):
        result = algebra.compress(value, **limit, dtype=dtype)
        assert {result.layer.trainable.A.dtype, result.layer.trainable.B.dtype} == {dtype}
        measured = relative(truth(result.layer), exact)
        assert result.error == pytest.approx(measured, rel=1e-8, abs=1e-14)


def test_factors_and_smallest_rank_are_those_of_the_change():
    for value in (layer(3), layer(3, anchored=False)):
        product = algebra.factors(value)
        assert relative(product.B @ product.A, truth(value)) < 1e-14
        spectrum = torch.linalg.svdvals(truth(value))
        for tolerance in (0.5, 0.1, 1e-3):
            rank = algebra.smallest_rank(value, tolerance)
            assert spectrum[rank:].norm() <= tolerance * spectrum.norm()
            assert rank == 1 or spectrum[rank - 1 :].norm() > 0.99 * tolerance * spectrum.norm()
    assert algebra.smallest_rank(still(layer()), 0.1) == 1


def test_a_rank_with_room_changes_nothing():
    value = layer(rank=2)
    exact = algebra.compress(value).layer
    for rank in (4, 5, 100):
        roomy = algebra.compress(value, rank=rank).layer
        assert bits(roomy.trainable.A) == bits(exact.trainable.A)
        assert bits(roomy.trainable.B) == bits(exact.trainable.B)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"tolerance": 0.0}, "tolerance 0.0 must be between 0 and 1"),
        ({"tolerance": 1.0}, "tolerance 1.0 must be"),
        ({"tolerance": float("nan")}, "tolerance nan must be"),
        ({"rank": 1, "tolerance": 1e-3}, r"rank 1 leaves .* above tolerance 0.001. Raise one"),
        ({"tolerance": 1e-12}, "leaves a relative error .* above tolerance 1e-12"),
    ],
)
def test_limits_that_cannot_be_met_are_refused_by_site(settings, message):
    value = layer(size=1.0)
    with pytest.raises(ConfigError, match=message):
        algebra.compress(value, **settings)
    with pytest.raises(ConfigError, match=f"site 'here': .*{message}"):
        algebra.to_lora(Adapter({"here": value}, Provenance("pissa")), **settings)


def test_to_lora_keeps_everything_else_and_changes_nothing():
    anchored, plain = layer(), layer(anchored=False)
    adapter = Adapter({"a": anchored, "b": plain}, Provenance("pissa", 3), {"rank": 3}, ("x",))
    before = [bits(f) for f in (anchored.trainable.A, anchored.anchor.B, plain.trainable.B)]
    result = algebra.to_lora(adapter)
    assert (result.provenance, result.config) == (adapter.provenance, adapter.config)
    assert result.targets == ("x",)
    assert {path: value.rank for path, value in result.layers.items()} == {"a": 6, "b": 3}
    assert bits(result.layers["b"].trainable.A) == bits(plain.trainable.A)
    assert bits(result.layers["b"].trainable.B) == bits(plain.trainable.B)
    assert [bits(f) for f in (anchored.trainable.A, anchored.anchor.B, plain.trainable.B)] == before
    assert {value.rank for value in algebra.to_lora(adapter, rank=2).layers.values()} == {2}
    again = algebra.to_lora(result)
    assert bits(again.layers["a"].trainable.A) == bits(result.layers["a"].trainable.A)
