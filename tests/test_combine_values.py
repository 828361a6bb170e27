"""What combining refuses, what it leaves alone, and what the combined value says of itself."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from combining import LAYOUTS, adapter, changes, close, exact_sum, layer
from laws.cases import bits, factors_of
from tether import combine, formats
from tether.errors import (
    BaseMismatchError,
    ConfigError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownNameError,
    UnsupportedAdapterError,
)
from tether.linalg import Certificate
from tether.provenance import Fingerprint, Provenance
from tether.value import Adapter, Layout, Trained


def print_of(sha: str, dtype: str = "float32", half: str = "h", shape=(12, 9)) -> Fingerprint:
    return Fingerprint(shape, dtype, sha * 64, half * 64, "f" + sha * 63, 1.0)


def on_base(seed: int, found: Fingerprint) -> Adapter:
    value = adapter(seed, ("linear",))
    return replace(value, provenance=replace(value.provenance, fingerprints={"linear": found}))


def test_adapters_of_different_bases_are_refused():
    same = combine.cat([on_base(1, print_of("1")), adapter(3), on_base(2, print_of("1"))])
    assert same.adapter.provenance.fingerprints == {"linear": print_of("1")}
    in_half = combine.cat([on_base(1, print_of("1")), on_base(2, print_of("2", "bfloat16"))])
    assert in_half.adapter.provenance.fingerprints["linear"].dtype == "float32"
    for other in (
        print_of("2"),
        print_of("2", "bfloat16", "x"),
        print_of("1", shape=(9, 12)),
    ):
        with pytest.raises(BaseMismatchError, match=r"'linear'.*sha256 1111.*Only adapters of"):
            combine.cat([on_base(1, print_of("1")), on_base(2, other)])


@pytest.mark.parametrize(
    "other",
    [Layout("linear", (9, 12)), Layout("embedding", (9, 12)), Layout("conv", (12, 3, 3))],
    ids=str,
)
def test_sites_of_different_shapes_are_refused(other):
    value = Adapter({"linear": layer(other, torch.Generator())}, Provenance("x"))
    with pytest.raises(ShapeMismatchError, match=r"'linear': one .* \(12, 9\), another"):
        combine.linear([adapter(1), value])


def test_a_transposed_site_that_a_file_calls_linear_fits():
    called = Adapter({"wide": layer(Layout("linear", (5, 21)), torch.Generator())}, Provenance("x"))
    value = adapter(1, ("wide",))
    result = combine.linear([value, called])
    close(changes(result), exact_sum([value, called], (1, 1)), 1e-6)
    assert result.adapter.layers["wide"].layout == LAYOUTS["wide"]
    uncommon = replace(LAYOUTS["conv"], common=False)
    odd = Adapter({"conv": layer(uncommon, torch.Generator())}, Provenance("x"))
    for values in ([adapter(1), odd], [odd, adapter(1)]):
        assert not combine.cat(values).adapter.layers["conv"].layout.common


def poisoned() -> Adapter:
    value = adapter(1)
    value.layers["conv"].anchor.A[1, 2] = math.nan
    return value


def with_dora() -> Adapter:
    value = adapter(1, ("row",))
    here = replace(value.layers["row"], magnitude=Trained(torch.zeros(1), torch.ones(1)))
    return replace(value, layers={"row": here})


def saved(path: str, anchor: Tensor | None = None, moved: Tensor | None = None) -> Adapter:
    anchor = torch.arange(6.0).reshape(2, 3) if anchor is None else anchor
    moved = torch.ones_like(anchor) if moved is None else moved
    return replace(adapter(1), modules={path: {"weight": Trained(moved, anchor)}})


HEAD = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (lambda: [], ConfigError, "no adapter to combine"),
        (adapter, ConfigError, "takes a list of adapters"),
        (lambda: [poisoned()], NonFiniteError, r"'conv': factor A0: 1 of .* at \(1, 2\)"),
        (lambda: [with_dora()], UnsupportedAdapterError, "'row': DoRA"),
        (
            lambda: [replace(adapter(1), biases={"row": Trained(torch.ones(1), None)})],
            UnsupportedAdapterError,
            "'row.bias' is trained whole, and the adapter does not say",
        ),
        (
            lambda: [saved("head"), saved("head", HEAD.T.clone())],
            ShapeMismatchError,
            r"'head.weight': it is \(2, 3\) in one adapter, \(3, 2\) in another",
        ),
        (
            lambda: [saved("head"), saved("head", HEAD + 0.5)],
            BaseMismatchError,
            "'head.weight': the adapters' starts differ by up to 0.5",
        ),
        (
            lambda: [saved("head", moved=HEAD * math.inf)],
            NonFiniteError,
            "'head.weight': 6 of 6",
        ),
        (lambda: [saved("row"), adapter(2)], UnsupportedAdapterError, "'row' is trained whole"),
        (
            lambda: [saved("head"), saved("head.dense")],
            UnsupportedAdapterError,
            "'head' is trained whole, and 'head.dense' in it is adapted",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(values, error, message):
    for method, settings in (
        (combine.cat, {}),
        (combine.ties, {"density": 0.5, "rank": 2}),
    ):
        with pytest.raises(error, match=message):
            method(values(), **settings)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (combine.cat, {"weights": [1.0]}, "1 weights for 2 adapters"),
        (combine.cat, {"weights": [1.0, math.nan]}, "weight nan is not a finite"),
        (combine.linear, {"weights": [1.0, "x"]}, "weight 'x' is not a finite"),
        (combine.linear, {"weights": [1e300, 1e300]}, "site 'linear': the weighted sum overflows"),
        (combine.svd, {}, "svd needs a rank or a tolerance"),
        (combine.svd, {"rank": 0}, "site 'linear': rank 0 must be at least 1"),
        (combine.svd, {"tolerance": 1.0}, "tolerance 1.0 must be between"),
        (combine.ties, {"density": 0.0, "rank": 2}, "density 0.0 must be above 0"),
        (combine.ties, {"density": 1.01, "rank": 2}, "density 1.01 must be above 0"),
        (combine.ties, {"density": math.nan, "rank": 2}, "density nan must be above 0"),
        (combine.ties, {"density": 0.5, "rank": 0}, "rank 0 must be a whole number"),
        (combine.ties, {"density": 0.5, "rank": 2, "majority": "totl"}, "Nearest: 'total'"),
        (combine.dare, {"density": 0.0, "rank": 2}, "density 0.0 must be above 0"),
        (combine.dare, {"density": 0.5, "rank": 2.0}, "rank 2.0 must be a whole number"),
        (combine.dare, {"density": 0.5, "rank": 2, "then": "tie"}, "Nearest: 'ties'"),
        (combine.dare, {"density": 0.5, "rank": 2, "seed": -1}, "seed -1 must be a whole"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(method, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        method([adapter(1), adapter(2)], **settings)
    assert ("Nearest" in message) == isinstance(caught.value, UnknownNameError)


def test_nothing_given_is_changed_and_nothing_is_shared():
    values = [adapter(1, anchored=False, scaling=1.0, dtype=torch.float64), saved("head")]
    before = [{name: bits(t) for name, t in factors_of(value).items()} for value in values]
    results = [
        combine.cat(values[:1]),
        combine.linear(values),
        combine.svd(values, rank=99),
        combine.ties(values, density=0.5, rank=2),
    ]
    for result in results:
        for here in result.adapter.layers.values():
            here.trainable.A.zero_()
            here.trainable.B.zero_()
        for _, trained in result.adapter.trained_whole:
            trained.trainable.zero_()
            trained.anchor.zero_()
    assert [{n: bits(t) for n, t in factors_of(value).items()} for value in values] == before
    assert torch.equal(values[1].modules["head"]["weight"].anchor, HEAD)
    assert values[1].modules["head"]["weight"].trainable.all()
    assert combine.cat(values).adapter.layers["row"].dtype == torch.float64


def whole(bias: list[float], weight: list[float] | None = None) -> Adapter:
    modules = {}
    if weight is not None:
        modules = {"head": {"weight": Trained(torch.tensor(weight), torch.tensor([7.0, 8.0]))}}
    start = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    return replace(
        adapter(1, ("row",)),
        biases={"row": Trained(torch.tensor(bias).bfloat16(), start)},
        modules=modules,
    )


def test_parameters_trained_whole_are_combined_by_the_same_rule():
    values = [whole([1.0, -2.0, 0.5], [0.5, 0.0]), whole([3.0, 1.0, -0.5]), adapter(2)]
    weights = (1.0, 0.5, 3.0)
    for result, bias in (
        (combine.cat(values, weights), [2.5, -1.5, 0.25]),
        (combine.linear(values, weights), [2.5, -1.5, 0.25]),
        (combine.svd(values, weights, rank=1), [2.5, -1.5, 0.25]),
        # The largest of each: −2 and 3, halved.
        (combine.ties(values, weights, density=0.34, rank=1), [1.5, -2.0, 0.0]),
        (combine.ties(values, weights, density=1.0, rank=1), [1.25, -2.0, 0.5]),
        (combine.dare(values, weights, density=1.0, rank=1), [2.5, -1.5, 0.25]),
    ):
        found = result.adapter.biases["row"]
        torch.testing.assert_close(found.trainable, torch.tensor(bias))
        assert found.anchor.tolist() == [1.0, 2.0, 3.0]
        head = result.adapter.modules["head"]["weight"]
        assert head.trainable.tolist() == [0.5, 0.0]
        assert head.anchor.tolist() == [7.0, 8.0]
    none = combine.linear(values, [0.0, 0.0, 1.0]).adapter
    assert none.biases["row"].current.tolist() == [1.0, 2.0, 3.0]


def test_what_is_dropped_of_a_bias_is_rescaled():
    start = torch.zeros(400)
    value = replace(adapter(1, ("row",)), biases={"row": Trained(torch.ones(400), start)})
    found = combine.dare([value], density=0.25, rank=1).adapter.biases["row"].trainable
    assert set(found.tolist()) == {0.0, 4.0}
    assert 60 < int((found != 0).sum()) < 140


def named(targets: tuple[str, ...], sites: tuple[str, ...], excluded: tuple[str, ...] = ()):
    generator = torch.Generator().manual_seed(0)
    layers = {site: layer(LAYOUTS["linear"], generator) for site in sites}
    return Adapter(layers, Provenance("x"), targets=targets, excluded=excluded)


def test_the_names_select_the_sites_of_all_and_no_more():
    q = named(("q",), ("0.q", "1.q"))
    v = named(("v", "0.k"), ("0.v", "1.v", "0.k"))
    assert combine.cat([q, v]).adapter.targets == ("0.k", "q", "v")
    # "proj" alone leaves out "block.proj", which the other adapts; "deep.proj" stays left out;
    # "other" is selected by no whole path.
    top = named(("proj",), ("proj",), ("block.proj", "deep.proj", "other"))
    block = named(("block.proj",), ("block.proj",))
    found = combine.cat([top, block]).adapter
    assert (found.targets, found.excluded) == (("block.proj", "proj"), ("deep.proj",))
    alike = combine.cat([top, top]).adapter
    assert (alike.targets, alike.excluded) == (top.targets, top.excluded)


def test_it_says_where_it_came_from_and_can_be_saved(tmp_path):
    one, two = adapter(1), adapter(2, ("row",))
    one = one.with_provenance(base_class="transformers.A", learning_rate=1e-3, steps=5, seed=3)
    result = combine.dare([one, two], [0.5, 0.25], density=0.5, rank=3, seed=8)
    origin = result.adapter.provenance
    assert (origin.method, origin.seed, origin.base_model) == ("combine:dare", 8, "base")
    assert (origin.base_class, origin.learning_rate, origin.steps) == ("transformers.A", None, None)
    assert dict(result.adapter.config) == {
        "combine": "dare",
        "weights": [0.5, 0.25],
        "density": 0.5,
        "rank": 3,
        "seed": 8,
        "then": "linear",
    }
    formats.save(result.adapter, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors")
    assert (read.provenance, read.config) == (origin, result.adapter.config)
    other = two.with_provenance(base_model="another")
    assert combine.cat([one, other]).adapter.provenance.base_model is None


def test_it_keeps_what_is_said_of_the_base_and_not_what_is_said_of_anchors():
    quantised = replace(print_of("1"), dtype="bitsandbytes nf4")
    certificate = Certificate("dense", 1e-6, 0.0, unique=True)

    def made(seed, gaps, found=quantised):
        origin = Provenance(
            "pissa",
            fingerprints={"linear": found},
            certificates={"linear": certificate},
            gaps=gaps,
            learning_rate=1e-3,
            steps=5,
        )
        return replace(adapter(seed), provenance=origin)

    one, two = made(1, {"linear": 0.09, "wide": 0.1}), made(2, {})
    origin = combine.svd([two, one], rank=2).adapter.provenance
    assert origin.quantization == ("bitsandbytes nf4",)
    # Of "wide" no fingerprint says which base it is.
    assert dict(origin.gaps) == {"linear": 0.09}
    assert dict(combine.cat([one, one]).adapter.provenance.gaps) == {"linear": 0.09}
    assert dict(combine.cat([one, made(2, {"linear": 0.2})]).adapter.provenance.gaps) == {}
    assert (origin.learning_rate, origin.steps) == (None, None)
    for result in (combine.cat([one]), combine.linear([one, two]), combine.svd([one], rank=1)):
        assert not result.adapter.anchored
        assert dict(result.adapter.provenance.certificates) == {}
    # The same values in plain layers: the gap is that of the other, quantised one.
    plain = made(3, {}, replace(quantised, dtype="float32"))
    assert dict(combine.cat([plain, one]).adapter.provenance.gaps) == {}
    assert dict(combine.cat([one, plain]).adapter.provenance.gaps) == {"linear": 0.09}
