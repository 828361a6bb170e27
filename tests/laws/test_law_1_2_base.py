"""Laws 1 and 2: the base is only read, the start is the base, detaching leaves nothing."""

import pytest
import torch

import tether
from laws.cases import DTYPES, Case, bits, law, state_of
from tether import methods


def outputs(model, batch):
    return [bits(output) for output in model(*batch)]


@law(wholes=True)
def test_init_and_attach_leave_the_base_alone_and_start_as_the_base(case):
    model, batch = case.model(), case.batch()
    before, base = state_of(model), outputs(model, batch)
    adapter = tether.init(model, case.config())
    assert state_of(model) == before
    handle = tether.attach(model, adapter, trainable=False)
    after = state_of(model)
    assert {name: after[name] for name in before if name.endswith("weight")} == {
        name: state for name, state in before.items() if name.endswith("weight")
    }
    assert after["random"] == before["random"]
    assert model.twin.weight is model.linear.weight
    for mode in (True, False):
        assert outputs(model.train(mode), batch) == base
    handle.detach()


@law(wholes=True)
def test_detach_restores_everything_and_disabled_is_always_the_base(case):
    model, batch = case.model(), case.batch()
    model.embedding.weight.requires_grad_(False)
    before, base = state_of(model), outputs(model, batch)
    handle = case.trained(model)
    trained = 4 + 2 * case.use_dora + (case.bias != "none")
    assert [p.requires_grad for p in model.parameters()].count(True) == trained
    live = outputs(model.eval(), batch)
    for block in (handle.disabled, lambda: tether.reference(model), lambda: tether.only(model)):
        with block():
            for mode in (True, False):
                assert outputs(model.train(mode), batch) == base
        assert outputs(model, batch) == live
    model.train()
    handle.detach()
    assert state_of(model) == before
    assert outputs(model, batch) == base


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", methods.names())
def test_the_start_keeps_the_sign_of_outputs_that_are_zero(method, dtype):
    for rank in (1, 2, 3):
        case = Case(method, dtype, "square", rank, rank, 1.0, False, 0.0, 1.0)
        model, batch = case.model(), case.batch()
        with torch.no_grad():
            model.embedding.weight[::2] = -0.0
        base = outputs(model, batch)
        tether.attach(model, case.config())
        assert outputs(model, batch) == base
