"""precision: what fewer bits cost, against dense changes and by definition."""

import math
from dataclasses import replace

import pytest
import torch

from tether import algebra, precision
from tether.errors import NonFiniteError, UnknownNameError
from tether.layout import Layout
from tether.provenance import Provenance
from tether.value import Adapter, Factors, LayerAdapter

OUT, IN = 9, 7


def layer(anchored=True, size=1e-2, scaling=0.7, rank=3, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def factors(size):
        return Factors(
            size * torch.randn(rank, IN, generator=generator),
            size * torch.randn(OUT, rank, generator=generator),
        )

    anchor = factors(1.0) if anchored else None
    return LayerAdapter(factors(size), anchor, scaling, Layout("linear", (OUT, IN)))


def adapter(layers):
    return Adapter(layers, Provenance(method="pissa"))


def dense(layer):
    """ΔW in float64, by the definition s·(B·A − B0·A0)."""
    a, b = layer.current.A.double(), layer.current.B.double()
    a0 = b0 = torch.zeros(())
    if layer.anchor is not None:
        a0, b0 = layer.anchor.A.double(), layer.anchor.B.double()
        a, b = a0 + layer.trainable.A.double(), b0 + layer.trainable.B.double()
        return layer.scaling * (b @ a - b0 @ a0)
    return layer.scaling * b @ a


@pytest.mark.parametrize("form", precision.FORMS)
@pytest.mark.parametrize("anchored", [True, False])
def test_the_error_is_that_of_the_dense_changes(form, anchored):
    layers = {"u": layer(anchored), "v": layer(anchored, size=3.0, seed=2)}
    found = precision.losses(adapter(layers))[form]
    apart, size = [], []
    for path, one in layers.items():
        balanced = algebra.balanced(one)
        kept, exact = precision.rounded(balanced, form), balanced.to(torch.float64)
        apart.append(float((kept.B @ kept.A - exact.B @ exact.A).norm()))
        size.append(float(dense(one).norm()))
        # The dense difference loses what it cancels: 1e-16 of ΔW beside an error above 1e-4.
        assert found.sites[path] == pytest.approx(apart[-1] / size[-1], rel=1e-9)
    assert found.error == pytest.approx(math.hypot(*apart) / math.hypot(*size), rel=1e-9)


def test_casting_is_torch_s_own():
    factors = Factors(torch.randn(3, IN), torch.randn(OUT, 3))
    for form, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        kept = precision.rounded(factors, form)
        assert torch.equal(kept.A, factors.A.to(dtype).double())
        assert torch.equal(kept.B, factors.B.to(dtype).double())


def test_eight_bits_are_whole_steps_of_each_row_s_largest_value():
    a = torch.tensor([[127.0, -63.4, 0.6, -0.4], [0.0, 0.0, 0.0, 0.0]])
    b = torch.tensor([[2.0, -1.0], [1e-3, 1e-3]])
    kept = precision.rounded(Factors(a, b), "int8")
    assert kept.A.tolist() == [[127.0, -63.0, 1.0, 0.0], [0.0] * 4]
    # Row by row: a small row of B keeps its digits beside a large one.
    assert kept.B[0].tolist() == pytest.approx([2.0, -64 * 2 / 127])
    assert kept.B[1].tolist() == pytest.approx([1e-3, 1e-3], rel=1e-6)


def test_rounding_at_real_sizes_is_what_the_formats_promise():
    generator = torch.Generator().manual_seed(5)
    big = LayerAdapter(
        Factors(
            torch.randn(16, 300, generator=generator) * 1e-4,
            torch.randn(200, 16, generator=generator) * 1e2,
        ),
        None,
        1.0,
        Layout("linear", (200, 300)),
    )
    found = {form: loss.error for form, loss in precision.losses(adapter({"w": big})).items()}
    # Uniform in half a unit either way, of each of two factors: about 0.24 %, 0.03 %.
    assert 2e-3 < found["bfloat16"] < 3e-3
    assert 2.5e-4 < found["float16"] < 3.5e-4
    assert 5e-3 < found["int8"] < 2e-2


def test_a_change_of_zero_loses_nothing():
    zero = layer(size=0.0)
    for loss in precision.losses(adapter({"w": zero})).values():
        assert (loss.error, loss.sites["w"]) == (0.0, 0.0)


def test_what_does_not_fit_is_lost_and_the_others_are_not():
    huge = layer(anchored=False)
    huge = replace(huge, trainable=Factors(huge.trainable.A * 1e12, huge.trainable.B * 1e12))
    found = precision.losses(adapter({"w": huge}))
    assert (found["float16"].error, found["float16"].sites["w"]) == (math.inf, math.inf)
    assert found["bfloat16"].error < 1e-2


def test_nan_and_unknown_forms_are_refused_by_name():
    bad = layer()
    bad.trainable.A[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"site 'deep\.w': A"):
        precision.losses(adapter({"deep.w": bad}))
    with pytest.raises(UnknownNameError, match=r"'int4'.*'int8'"):
        precision.rounded(layer().trainable, "int4")


def test_progress_is_told_site_by_site():
    told = []
    precision.losses(adapter({"u": layer(), "v": layer()}), lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2)]
