"""compare: against dense float64 changes, for every pair of forms."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tether import algebra
from tether.compare import ROUNDING, check_bases, compare
from tether.errors import BaseMismatchError, NonFiniteError, ShapeMismatchError
from tether.layout import Layout
from tether.provenance import Fingerprint, Provenance
from tether.value import Adapter, Factors, LayerAdapter, Trained

OUT, IN = 9, 7


def factors(rank, generator, size=1.0):
    return Factors(
        size * torch.randn(rank, IN, generator=generator),
        size * torch.randn(OUT, rank, generator=generator),
    )


def layer(seed, rank=3, anchored=True, size=1e-2, scaling=0.7, magnitude=None):
    generator = torch.Generator().manual_seed(seed)
    anchor = factors(rank, generator) if anchored else None
    trainable = factors(rank, generator, size)
    return LayerAdapter(trainable, anchor, scaling, linear(), magnitude=magnitude)


def linear():
    return Layout("linear", (OUT, IN))


def adapter(layers, **parts):
    return Adapter(layers, Provenance(method="pissa"), **parts)


def dense(layer):
    """ΔW in float64, by the definition s·(B·A − B0·A0)."""
    a, b = layer.trainable.A.double(), layer.trainable.B.double()
    if layer.anchor is None:
        return layer.scaling * b @ a
    a0, b0 = layer.anchor.A.double(), layer.anchor.B.double()
    return layer.scaling * ((b0 + b) @ (a0 + a) - b0 @ a0)


def truth(x, y):
    return float((x - y).norm() / x.norm()), float((x * y).sum() / (x.norm() * y.norm()))


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    anchored=st.tuples(st.booleans(), st.booleans()),
    sizes=st.tuples(st.sampled_from([1e-4, 1e-1, 1e2]), st.sampled_from([1e-4, 1e-1, 1e2])),
)
def test_a_site_is_measured_as_its_dense_change(seeds, ranks, anchored, sizes):
    a, b = (layer(*part) for part in zip(seeds, ranks, anchored, sizes, strict=True))
    found = compare(adapter({"w": a}), adapter({"w": b})).sites["w"]
    error, cosine = truth(dense(a), dense(b))
    assert found.norm_a == pytest.approx(float(dense(a).norm()), rel=1e-9)
    assert found.norm_b == pytest.approx(float(dense(b).norm()), rel=1e-9)
    assert found.error == pytest.approx(error, rel=1e-8, abs=1e-9)
    assert found.cosine == pytest.approx(cosine, abs=1e-9)


def test_all_sites_are_measured_as_one_vector():
    a = {"u": layer(1, size=1e-3), "v": layer(2, size=1.0), "w": layer(3)}
    b = {"u": layer(1, size=2e-3), "v": layer(5, size=0.1), "x": layer(6, size=0.5)}
    found = compare(adapter(a), adapter(b))
    zero = torch.zeros(OUT, IN, dtype=torch.float64)
    names = ("u", "v", "w", "x")
    x = torch.stack([dense(a[n]) if n in a else zero for n in names])
    y = torch.stack([dense(b[n]) if n in b else zero for n in names])
    error, cosine = truth(x, y)
    assert found.error == pytest.approx(error, rel=1e-9)
    assert found.cosine == pytest.approx(cosine, abs=1e-12)
    assert (found.norm_a, found.norm_b) == pytest.approx((float(x.norm()), float(y.norm())))
    assert (found.only_a, found.only_b) == (("w",), ("x",))
    assert (found.sites["w"].error, found.sites["w"].cosine) == (1.0, None)
    assert (found.sites["x"].error, found.sites["x"].cosine) == (math.inf, None)


def test_a_difference_far_below_the_change_is_still_seen():
    a = adapter({"w": layer(1)})
    plain = algebra.to_lora(a).layers["w"]
    turned = plain.trainable.B.double()
    turned[0, 0] *= 1 + 1e-12
    moved = replace(plain, trainable=Factors(plain.trainable.A.double(), turned))
    found = compare(algebra.to_lora(a), adapter({"w": moved})).sites["w"]
    exact = (moved.trainable.B - plain.trainable.B.double()) @ plain.trainable.A.double()
    expected = float(plain.scaling * exact.norm() / dense(plain).norm())
    assert 0 < expected < 1e-11
    assert found.error == pytest.approx(expected, rel=0.05)
    assert found.cosine == pytest.approx(1.0, abs=1e-15)


def test_an_adapter_equals_itself_and_opposes_its_negative():
    a = layer(1, anchored=False)
    b = replace(a, trainable=Factors(a.trainable.A, -a.trainable.B))
    same = compare(adapter({"w": a}), adapter({"w": a}))
    assert same.error < 1e-15
    assert same.cosine == pytest.approx(1.0, abs=1e-15)
    opposite = compare(adapter({"w": a}), adapter({"w": b}))
    assert opposite.error == pytest.approx(2.0)
    assert opposite.cosine == pytest.approx(-1.0, abs=1e-15)


def test_a_shorter_rank_leaves_the_error_that_the_reduction_reports():
    a = layer(4, rank=3)
    cut = algebra.compress(a, rank=2)
    found = compare(adapter({"w": a}), adapter({"w": cut.layer})).sites["w"]
    assert found.error == pytest.approx(cut.error, rel=1e-6)
    assert found.error > 0.01
    # The part that is left is orthogonal to the part that is cut: cos² + error² = 1.
    assert found.cosine**2 + found.error**2 == pytest.approx(1.0, abs=1e-6)


def test_a_change_of_zero_has_no_direction():
    zero = layer(1, size=0.0)
    both = compare(adapter({"w": zero}), adapter({"w": zero}))
    assert (both.error, both.cosine) == (0.0, None)
    one = compare(adapter({"w": zero}), adapter({"w": layer(2)}))
    assert (one.error, one.cosine, one.norm_a) == (math.inf, None, 0.0)


def test_magnitudes_biases_and_modules_are_compared_by_what_moved():
    base = torch.full((OUT,), 5.0)
    up, down = torch.arange(OUT) * 0.1, torch.arange(OUT) * 0.2
    a = adapter(
        {"w": layer(1, magnitude=Trained(up, base))},
        biases={"w": Trained(up, base)},
        modules={"head": {"weight": Trained(torch.eye(4), torch.ones(4, 4))}},
    )
    # As read from a file of another library: values, no anchors.
    b = adapter(
        {"w": layer(1, magnitude=Trained(base + down, None))},
        biases={"w": Trained(base + up, None), "v": Trained(up, base)},
        modules={"head": {"weight": Trained(torch.ones(4, 4), None)}},
    )
    for found in (compare(a, b), compare(a, replace(b, provenance=Provenance(method="lora")))):
        assert found.sites["w"].error < 1e-15
        magnitude, bias = found.wholes["w.magnitude"], found.wholes["w.bias"]
        assert magnitude.error == pytest.approx(1.0, abs=1e-6)
        assert magnitude.cosine == pytest.approx(1.0, abs=1e-9)
        assert magnitude.norm_a == pytest.approx(float(up.norm()), rel=1e-6)
        assert bias.error < 1e-6
        assert found.wholes["head.weight"].norm_b == 0
        assert found.wholes["head.weight"].error == 1.0
        assert found.wholes["v.bias"].norm_b == pytest.approx(float(up.norm()), rel=1e-6)
        assert found.only_b == ("v.bias",)
    back = compare(b, a)
    assert back.wholes["w.magnitude"].error == pytest.approx(0.5, abs=1e-6)


def test_the_inputs_are_only_read():
    a, b = layer(1), layer(2, anchored=False)
    before = [t.clone() for x in (a, b) for t in (x.trainable.A, x.trainable.B)]
    compare(adapter({"w": a}), adapter({"w": b}))
    after = [t for x in (a, b) for t in (x.trainable.A, x.trainable.B)]
    assert all(map(torch.equal, before, after))


def test_other_shapes_and_nan_are_refused_by_name():
    a = adapter({"deep.w": layer(1)})
    other = replace(layer(1), trainable=Factors(torch.ones(1, 3), torch.ones(4, 1)), anchor=None,
                    layout=Layout("linear", (4, 3)))  # fmt: skip
    with pytest.raises(ShapeMismatchError, match=r"'deep\.w'.*\(9, 7\).*\(4, 3\)"):
        compare(a, adapter({"deep.w": other}))
    bad = layer(1)
    bad.trainable.A[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"deep\.w"):
        compare(a, adapter({"deep.w": bad}))
    with pytest.raises(ShapeMismatchError, match=r"w\.bias.*\(9,\).*\(2,\)"):
        compare(
            adapter({"w": layer(1)}, biases={"w": Trained(torch.ones(OUT), None)}),
            adapter({"w": layer(1)}, biases={"w": Trained(torch.ones(2), None)}),
        )


def test_it_prints_and_becomes_json():
    a = adapter({"u": layer(1), "v": layer(2), "zero": layer(3, size=0.0)})
    b = adapter({"u": layer(1), "v": layer(7), "zero": layer(3)})
    found = compare(a, b)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["error"] == found.error
    assert values["verdict"] == found.verdict
    assert values["sites"]["v"]["cosine"] == found.sites["v"].cosine
    zero = values["sites"]["zero"]
    assert zero == {
        "norm_a": 0.0, "norm_b": found.sites["zero"].norm_b, "error": None, "cosine": None,
        "rounding": None, "rank_a": 3, "rank_b": 3, "directions_a": 0, "directions_b": 6,
        "overlap": None, "least": 0.0,
    }  # fmt: skip
    overlap = found.sites["v"].overlap
    assert values["sites"]["v"]["overlap"] == {
        "k": 6, "rows": overlap.rows, "columns": overlap.columns, "chance": overlap.chance
    }  # fmt: skip
    lines = str(found).splitlines()
    assert lines[0].startswith("3 sites: |ΔW| ")
    assert f"{found.error:.2e}" in lines[0]
    assert lines[1].startswith("furthest apart, site: zero: ")


def spaces(matrix, k):
    """The leading left and right singular vectors of a dense matrix."""
    u, _, vt = torch.linalg.svd(matrix)
    return u[:, :k], vt[:k].T


@settings(max_examples=40, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    anchored=st.tuples(st.booleans(), st.booleans()),
)
def test_the_overlap_is_that_of_the_dense_changes(seeds, ranks, anchored):
    a, b = (layer(*part) for part in zip(seeds, ranks, anchored, strict=True))
    found = compare(adapter({"w": a}), adapter({"w": b})).sites["w"]
    counts = [int(torch.linalg.matrix_rank(dense(x), rtol=1e-5)) for x in (a, b)]
    assert [found.directions_a, found.directions_b] == counts
    assert found.overlap.k == min(counts)
    (ua, va), (ub, vb) = (spaces(dense(x), min(counts)) for x in (a, b))
    assert found.overlap.columns == pytest.approx(float((ua.T @ ub).square().sum()) / min(counts))
    assert found.overlap.rows == pytest.approx(float((va.T @ vb).square().sum()) / min(counts))
    assert found.overlap.chance == pytest.approx(min(counts) * (1 / OUT + 1 / IN) / 2)


def one_way(row, column, rank=1):
    """ΔW with ones in the first places of some columns of the identity."""
    a, b = torch.zeros(rank, IN), torch.zeros(OUT, rank)
    for n in range(rank):
        a[n, row + n], b[column + n, n] = 1.0, 1.0 + n
    return LayerAdapter(Factors(a, b), None, 1.0, linear())


def test_rows_are_the_inputs_and_columns_the_outputs():
    shared = compare(adapter({"w": one_way(0, 0)}), adapter({"w": one_way(0, 1)})).sites["w"]
    assert (shared.overlap.rows, shared.overlap.columns, shared.overlap.mean) == (1.0, 0.0, 0.5)
    within = compare(adapter({"w": one_way(0, 0, 3)}), adapter({"w": one_way(2, 2)})).sites["w"]
    # The largest of three is the last: the only direction of the other.
    assert (within.overlap.k, within.overlap.mean) == (1, 1.0)


def test_the_overlap_of_all_sites_counts_them_by_their_change():
    a = {"u": one_way(0, 0), "v": replace(one_way(0, 0), scaling=2.0)}
    b = {"u": one_way(1, 1), "v": one_way(0, 0)}
    found = compare(adapter(a), adapter(b))
    assert found.overlap == pytest.approx(4 / 5)
    assert found.chance == pytest.approx((1 / OUT + 1 / IN) / 2)
    zero = layer(1, size=0.0)
    nothing = compare(adapter({"w": zero}), adapter({"w": layer(2)}))
    assert nothing.sites["w"].overlap is None
    assert (nothing.overlap, nothing.chance) == (None, None)


def test_padding_with_zeros_is_no_direction():
    a = layer(1, rank=2, anchored=False)
    wide = Factors(
        torch.cat([a.trainable.A, torch.zeros(2, IN)]),
        torch.cat([a.trainable.B, torch.zeros(OUT, 2)], dim=1),
    )
    found = compare(adapter({"w": a}), adapter({"w": replace(a, trainable=wide)})).sites["w"]
    assert (found.rank_a, found.rank_b, found.directions_a, found.directions_b) == (2, 4, 2, 2)
    assert found.overlap.mean == pytest.approx(1.0, abs=1e-12)


def test_sizes_are_those_of_all_tensors():
    magnitude = Trained(torch.ones(OUT), torch.ones(OUT))
    a = adapter({"w": layer(1, magnitude=magnitude)}, biases={"w": Trained(torch.ones(OUT), None)})
    b = adapter({"w": layer(1, rank=2, anchored=False), "v": layer(2)})
    found = compare(a, b)
    assert found.bytes_a == 4 * (2 * 3 * (OUT + IN) + 3 * OUT)
    assert found.bytes_b == 4 * (2 * (OUT + IN) + 2 * 3 * (OUT + IN))
    assert found.shared == ("w",)


def plain(one, dtype=torch.float32, rank=None):
    """As `save_as_lora` writes it."""
    cut = one if rank is None else algebra.compress(one, rank).layer
    return replace(cut, trainable=algebra.balanced(cut).to(dtype), anchor=None, scaling=1.0)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float32, "the same within float32 rounding: relative error "),
        (torch.float16, "the same up to float16 rounding: relative error "),
        (torch.bfloat16, "the same up to bfloat16 rounding: relative error "),
    ],
)
def test_another_precision_is_called_so(dtype, words):
    a = {"u": layer(1), "v": layer(2, size=1.0)}
    b = {path: plain(one, dtype) for path, one in a.items()}
    found = compare(adapter(a), adapter(b))
    assert found.verdict.startswith(words)
    assert f"({found.worst})" in found.verdict


def test_one_site_apart_is_seen_among_equal_ones():
    a = {"u": layer(1, size=1e3), "v": layer(2, size=1e-3)}
    b = {"u": layer(1, size=1e3), "v": layer(3, size=1e-3)}
    found = compare(adapter(a), adapter(b))
    assert found.error < ROUNDING["float32"]
    assert found.verdict.startswith("different: relative error ")
    assert "(v)" in found.verdict


def test_the_nearest_change_of_a_smaller_rank_is_called_a_reduction():
    a = {"u": layer(1), "v": layer(2, size=1.0)}
    found = compare(adapter(a), adapter({path: plain(one, rank=2) for path, one in a.items()}))
    assert found.least == pytest.approx(found.error, rel=1e-5)
    assert found.verdict.startswith("a reduction to 2 directions a site, as near as so few can")
    # Of the same rank, but not the nearest.
    other = {path: layer(7, rank=2, anchored=False, size=1e-2) for path in a}
    assert compare(adapter(a), adapter(other)).verdict.startswith("different: ")
    # And the other way round it is no reduction.
    back = compare(adapter({path: plain(one, rank=2) for path, one in a.items()}), adapter(a))
    assert back.least == 0
    assert back.verdict.startswith("different: ")


def test_what_only_one_has_makes_them_different():
    a, b = {"u": layer(1), "v": layer(2)}, {"u": layer(1)}
    assert "; 1 only in the first" in compare(adapter(a), adapter(b)).verdict
    assert "; 1 only in the second" in compare(adapter(b), adapter(a)).verdict
    # Also where that site is still at its start.
    still = {"u": layer(1), "v": layer(2, size=0.0)}
    assert "; 1 only in the first" in compare(adapter(still), adapter(b)).verdict
    bias = adapter(b, biases={"u": Trained(torch.ones(OUT), None)})
    assert "; 1 only in the second" in compare(adapter(b), bias).verdict
    none = compare(adapter({"x": layer(1)}), adapter({"y": layer(1)})).verdict
    assert none == "different: 1 only in the first; 1 only in the second"


def test_a_parameter_held_as_its_value_is_the_same_where_only_its_last_bits_differ():
    base, up = torch.full((OUT,), 5.0), 1e-4 * torch.arange(OUT)
    a = adapter({"w": layer(1)}, biases={"w": Trained(up, base)})
    b = adapter({"w": layer(1)}, biases={"w": Trained(base + up, None)})
    found = compare(a, b)
    # Of the displacement the rounding of the value is much; of the value it is nothing.
    assert found.wholes["w.bias"].error > 1e-5
    assert found.wholes["w.bias"].rounding < 1e-7
    assert found.verdict.startswith("the same within float32 rounding")
    # Two displacements are compared as such, beside the larger.
    c = adapter({"w": layer(1)}, biases={"w": Trained(2 * up, base)})
    assert compare(a, c).wholes["w.bias"].rounding == pytest.approx(0.5)
    assert compare(a, c).verdict.startswith("different: ")


def printed(digit):
    return Fingerprint((OUT, IN), "float32", digit * 64, digit * 64, digit * 64, 1.0)


def made_on(layers, **prints):
    found = {path: printed(digit) for path, digit in prints.items()}
    return Adapter(layers, Provenance(method="pissa", fingerprints=found))


def test_other_bases_are_refused_by_the_first_site_that_tells():
    layers = {path: layer(1) for path in "uvw"}
    a = made_on(layers, u="a", v="b")
    assert check_bases(a, made_on(layers, u="a", v="b", w="c")) == 2
    assert check_bases(a, adapter(layers)) == 0
    with pytest.raises(BaseMismatchError) as caught:
        check_bases(a, made_on(layers, u="a", v="c"), ("one", "other"))
    words = str(caught.value)
    assert words.startswith("site 'v': one was made on float32 (9, 7) sha256 bbbbbbbbbbbb…, other ")
    assert "sha256 cccccccccccc…" in words
    assert "--no-verify" in words


def test_progress_is_told_site_by_site():
    told = []
    a = adapter({"u": layer(1), "v": layer(2)})
    compare(a, adapter({"u": layer(1), "x": layer(2)}), lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]
