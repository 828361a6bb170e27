"""Starts of methods of others: what they say of themselves, and what follows from it."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import tether
from tether import methods
from tether.errors import ConfigError, ConvergenceError, ShapeMismatchError
from tether.linalg import Certificate
from tether.methods import Context, base
from tether.methods.pissa import PiSSA
from tether.start import Search, find
from tether.value import Factors

from .cases import CACHED, config, everything, found, stack


@pytest.fixture
def own_method(monkeypatch):
    """Register a method for one test: it draws its anchor, and may say that it does not."""
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))

    def add(says_deterministic: bool, error: float = 0.5) -> type:
        @methods.register("own")
        @dataclass(frozen=True, slots=True)
        class Own:
            name: ClassVar[str]
            lifts: ClassVar[bool] = True
            deterministic: ClassVar[bool] = says_deterministic

            def start(self, weight: Tensor, rank: int, context: Context) -> Factors:
                assert weight.dtype == torch.float32  # it is not of any dtype
                context.record(Certificate("dense", error, 0.0, True))
                drawn = torch.randn(rank, weight.shape[1], generator=context.generator)
                return Factors(drawn, weight[:, :rank].clone(memory_format=torch.contiguous_format))

        return Own

    return add


@pytest.mark.parametrize("enabled", ["0", "1"])
def test_a_method_that_draws_must_not_say_that_it_is_deterministic(
    enabled, own_method, anchors, monkeypatch
):
    monkeypatch.setenv("TETHER_NO_CACHE", enabled)
    own_method(says_deterministic=True)
    with pytest.raises(
        ConfigError, match=r"^site '\d': method 'own' says that it is deterministic, and used"
    ):
        found(config("own"))
    assert not anchors.exists()


def test_a_method_that_draws_is_cached_for_its_seed_and_site(own_method, anchors):
    own_method(says_deterministic=False)
    model = stack(((128, 128),) * 3)
    for layer in list(model)[1:]:
        layer.weight = model[0].weight  # the same values at several sites
    first = find(model, config("own", seed=3), Search())
    assert first.cached == 0
    again = find(model, config("own", seed=3), Search())
    assert (again.cached, everything(again.adapter)) == (3, everything(first.adapter))
    assert find(model, config("own", seed=4), Search()).cached == 0
    drawn = {layer.anchor.A.numpy().tobytes() for layer in first.adapter.layers.values()}
    assert len(drawn) == 3


def test_a_method_gets_half_precision_only_where_it_says_so(own_method):
    own_method(says_deterministic=False)
    find(stack().bfloat16(), config("own"), Search())
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        start = PiSSA.start

        def spy(self: PiSSA, weight: Tensor, rank: int, context: Context) -> Factors:
            seen.append(weight.dtype)
            return start(self, weight, rank, context)

        patch.setattr(PiSSA, "start", spy)
        find(stack().bfloat16(), config(), Search())
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_a_certificate_that_no_file_can_hold_is_dropped(error, own_method, anchors, tmp_path):
    own_method(says_deterministic=False, error=error)
    for cached in (0, CACHED):
        result = found(config("own"))
        assert (result.cached, dict(result.adapter.provenance.certificates)) == (cached, {})
        tether.save(result.adapter, tmp_path / "a.safetensors")


def register(monkeypatch, **members: object) -> type:
    """A method of another package, with these members beside a start of leading columns."""
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))

    def start(self, weight: Tensor, rank: int, context: Context) -> Factors:
        columns = weight[:, :rank].clone(memory_format=torch.contiguous_format)
        return Factors(torch.eye(weight.shape[1])[:rank], columns)

    body = {"__annotations__": {}, "lifts": True, "start": start, **members}
    return methods.register("other")(dataclass(frozen=True)(type("Other", (), body)))


def test_settings_that_cannot_be_named_are_not_cached_and_work_all_the_same(anchors, monkeypatch):
    other = register(monkeypatch, __annotations__={"weights": tuple}, weights=(torch.ones(2),))
    for _ in range(2):
        assert find(stack(), config(init=other()), Search()).cached == 0
    assert not list(anchors.rglob("*.safetensors"))


def test_a_cut_of_another_rank_is_refused(anchors, monkeypatch):
    def cut(self, factors: Factors, rank: int, was: float, scaling: float) -> Factors:
        return factors

    other = register(monkeypatch, cut=cut)
    tether.init(stack(), config(init=other(), rank=5))
    with pytest.raises(ShapeMismatchError, match=r"site '\d': method 'other' gave .* rank 5 .*"):
        tether.init(stack(), config(init=other(), rank=4))


def test_a_decomposition_that_breaks_off_names_its_site(monkeypatch):
    def start(self, weight: Tensor, rank: int, context: Context) -> Factors:
        raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")

    other = register(monkeypatch, start=start)
    with pytest.raises(ConvergenceError, match=r"site '\d': linalg.eigh: failed to converge"):
        tether.init(stack(), config(init=other()))
