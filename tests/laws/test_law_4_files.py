"""Law 4: what was saved is what is loaded, and training goes on as if never interrupted."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

import tether
from laws.cases import Case, bits, factors_of, law


def through_a_file(adapter: tether.Adapter) -> tether.Adapter:
    with TemporaryDirectory() as folder:
        tether.save(adapter, Path(folder, "a.safetensors"))
        return tether.load(Path(folder, "a.safetensors"))


def assert_same(one: tether.Adapter, other: tether.Adapter) -> None:
    for name in ("config", "provenance", "targets", "excluded"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("layers", "biases", "modules"):
        assert list(getattr(one, name)) == list(getattr(other, name))
    for mine, theirs in zip(one.layers.values(), other.layers.values(), strict=True):
        for name in ("scaling", "layout", "dropout"):
            assert getattr(mine, name) == getattr(theirs, name)
    mine, theirs = factors_of(one), factors_of(other)
    assert {n: (t.dtype, bits(t)) for n, t in mine.items()} == {
        n: (t.dtype, bits(t)) for n, t in theirs.items()
    }


@law(examples=1, wholes=True)
def test_save_load_attach_is_bitwise_the_same_adapter(case):
    model, batch = case.model().eval(), case.batch()
    handle = case.trained(model)
    handle.annotate(learning_rate=1e-3, steps=3)
    live, adapter = [bits(y) for y in model(*batch)], handle.detach()
    loaded = through_a_file(adapter)
    assert_same(loaded, adapter)
    again = tether.attach(model, loaded)
    assert [bits(y) for y in model(*batch)] == live
    assert_same(again.snapshot(), adapter)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_save_load_attach_is_bitwise_in_any_dtype_of_the_factors(dtype):
    case = Case("pissa", torch.float32, "tall", 3, 2, 1.0, False, 0.0, 1e-2)
    handle = case.trained(case.model(), dtype=dtype)
    adapter = through_a_file(handle.snapshot())
    assert_same(adapter, handle.snapshot())
    again = tether.attach(case.model(), adapter, dtype=dtype)
    assert [bits(p) for p in again.parameters()] == [bits(p) for p in handle.parameters()]


@law(examples=1, wholes=True, dropout=0.0)
def test_resumed_training_equals_uninterrupted_training_bitwise(case):
    def steps(model, handle, optimizer, number):
        for _ in range(number):
            optimizer.zero_grad()
            loss = sum(y.float().square().mean() for y in model(*case.batch()))
            loss.backward()
            optimizer.step()

    def optimizer_of(handle):
        return torch.optim.AdamW(handle.parameters(), lr=1e-2, weight_decay=0.1)

    straight = case.model()
    handle = tether.attach(straight, case.config())
    start = [bits(p) for p in handle.parameters()]
    optimizer = optimizer_of(handle)
    steps(straight, handle, optimizer, 3)
    saved = through_a_file(handle.snapshot())
    state = copy.deepcopy(optimizer.state_dict())
    steps(straight, handle, optimizer, 3)

    model = case.model()
    resumed = tether.attach(model, saved)
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(state)
    steps(model, resumed, optimizer, 3)
    assert_same(resumed.snapshot(), handle.snapshot())
    if case.family != "zero":  # where nothing reaches the loss, nothing trains
        assert [bits(p) for p in resumed.parameters()] != start
