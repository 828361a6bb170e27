import copy
import dataclasses
import pickle

import pytest
import torch

from laws.cases import factors_of
from tether.errors import ConfigError, ShapeMismatchError
from tether.provenance import Fingerprint, Provenance
from tether.value import Adapter, Factors, LayerAdapter, Layout

LAYOUTS = {
    "linear": (4, 6),
    "transposed": (6, 4),
    "embedding": (6, 4),
    "conv": (4, 3, 2),
}


def factors(out_features: int = 4, in_features: int = 6, rank: int = 2) -> Factors:
    return Factors(torch.randn(rank, in_features), torch.randn(out_features, rank))


def layer(**changes: object) -> LayerAdapter:
    values = {"trainable": factors(), "anchor": factors(), "scaling": 0.5}
    return LayerAdapter(**(values | {"layout": Layout("linear", (4, 6))} | changes))


def adapter() -> Adapter:
    prints = {"a": Fingerprint((4, 6), "float32", "00", "11", "22", 1.0)}
    return Adapter({"a": layer()}, Provenance("pissa", 3, fingerprints=prints), {"rank": 2}, ("a",))


@pytest.mark.parametrize(("kind", "shape"), LAYOUTS.items())
def test_a_layout_views_a_weight_as_out_by_in_and_back(kind, shape):
    layout, weight = Layout(kind, shape), torch.randn(shape)
    matrix = layout.matrix(weight)
    assert tuple(matrix.shape) == (layout.out_features, layout.in_features) == (4, 6)
    assert matrix.data_ptr() == weight.data_ptr()
    assert torch.equal(layout.stored(matrix), weight)


def test_the_matrix_view_of_a_weight_multiplies_as_its_module_does():
    conv = torch.nn.Conv2d(3, 4, 2, bias=False)
    x = torch.randn(1, 3, 2, 2)
    layout = Layout("conv", tuple(conv.weight.shape))
    torch.testing.assert_close(layout.matrix(conv.weight) @ x.flatten(), conv(x).flatten())
    embedding = torch.nn.Embedding(6, 4)
    one_hot = torch.eye(6)[2]
    layout = Layout("embedding", (6, 4))
    assert torch.equal(layout.matrix(embedding.weight) @ one_hot, embedding(torch.tensor(2)))


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("dense", (4, 6), "kind 'dense' is none of"),
        ("linear", (4, 6, 1), r"'linear' cannot have shape \(4, 6, 1\)"),
        ("conv", (4, 6), r"'conv' cannot have shape \(4, 6\)"),
        ("conv", (4, 6, 1, 1, 1, 1), "'conv' cannot have shape"),
        ("embedding", (0, 6), r"'embedding' cannot have shape \(0, 6\)"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(kind, shape, message):
    with pytest.raises(ConfigError, match=message):
        Layout(kind, shape)


def test_factors_must_multiply_and_be_floating():
    with pytest.raises(ShapeMismatchError, match=r"A \(2, 6\) and B \(4, 3\).*Give A"):
        Factors(torch.ones(2, 6), torch.ones(4, 3))
    with pytest.raises(ShapeMismatchError, match=r"A \(6,\)"):
        Factors(torch.ones(6), torch.ones(4, 6))
    with pytest.raises(ConfigError, match=r"not torch.int64, torch.float32"):
        Factors(torch.ones(2, 6).long(), torch.ones(4, 2))


def test_factors_know_their_size_and_convert():
    value = Factors(torch.randn(6, 2).T, torch.randn(4, 2))
    assert (value.rank, value.shape) == (2, (4, 6))
    half = value.to(torch.bfloat16)
    assert half.A.dtype == half.B.dtype == torch.bfloat16
    assert half.A.is_contiguous()
    zeros = value.zeros_like()
    assert zeros.shape == value.shape
    assert not zeros.A.any()
    assert not zeros.B.any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trainable": factors(6, 4)}, ShapeMismatchError, r"\(6, 4\), the layout 'linear'"),
        ({"anchor": factors(6, 4)}, ShapeMismatchError, r"anchor \(6, 4\) of rank 2"),
        ({"anchor": factors(rank=3)}, ShapeMismatchError, "rank 3 does not fit .* of rank 2"),
        ({"scaling": 0.0}, ConfigError, "scaling 0.0 must"),
        ({"scaling": -1.0}, ConfigError, "scaling -1.0 must"),
        ({"scaling": float("nan")}, ConfigError, "scaling nan must"),
        ({"scaling": float("inf")}, ConfigError, "scaling inf must"),
    ],
)
def test_a_layer_whose_parts_do_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        layer(**changes)


def test_current_factors_are_the_anchor_moved():
    value = layer()
    assert torch.equal(value.current.A, value.anchor.A + value.trainable.A)
    assert torch.equal(value.current.B, value.anchor.B + value.trainable.B)
    plain = layer(anchor=None)
    assert plain.current is plain.trainable
    assert (value.rank, plain.rank) == (2, 2)


def test_an_adapter_needs_a_site_and_knows_whether_it_is_anchored():
    with pytest.raises(ConfigError, match="at least one site"):
        Adapter({}, Provenance("pissa"))
    plain = Adapter({"a": layer(anchor=None), "b": layer(anchor=None)}, Provenance("lora"))
    assert not plain.anchored
    assert plain.targets == ("a", "b")
    assert adapter().anchored


def test_values_are_frozen():
    value = adapter()
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.targets = ()
    for mapping in (value.layers, value.config, value.provenance.fingerprints):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["b"] = None
    layers = {"a": layer()}
    value = Adapter(layers, Provenance("pissa"))
    layers.clear()
    assert list(value.layers) == ["a"]


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda value: pickle.loads(pickle.dumps(value))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_values_copy_and_pickle(copied):
    value = adapter()
    other = copied(value)
    assert (other.config, other.targets) == (value.config, value.targets)
    assert other.provenance == value.provenance
    assert other.layers["a"].scaling == 0.5
    mine, theirs = factors_of(value), factors_of(other)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(TypeError):
        other.layers["b"] = None


def test_provenance_is_replaced_on_a_new_adapter_that_shares_the_tensors():
    value = adapter()
    noted = value.with_provenance(learning_rate=2e-4, steps=7)
    assert (noted.provenance.learning_rate, noted.provenance.steps) == (2e-4, 7)
    assert noted.provenance.fingerprints == value.provenance.fingerprints
    assert value.provenance.learning_rate is None
    assert noted.layers["a"] is value.layers["a"]
