"""Which adapters take part: only, reference, disabled; and evaluating without a trace."""

import pytest
import torch
from torch import nn

import tether
from laws.cases import bits
from tether import LoraConfig
from tether.errors import UnknownNameError
from tether.switch import quiet


@pytest.fixture
def model() -> nn.Module:
    """Two layers with two adapters, "a" and "b"."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    for name in ("a", "b"):
        for parameter in tether.attach(model, LoraConfig(rank=2), name).parameters():
            parameter.data.normal_()
    return model


X = torch.linspace(-1, 1, 18).view(3, 6)


def active(model: nn.Module) -> set[str]:
    return {name for name, handle in tether.handles(model).items() if handle.active}


def alone(model: nn.Module, *names: str) -> bytes:
    """The output with the other adapters really gone."""
    gone = {n: h for n, h in tether.handles(model).items() if n not in names}
    adapters = {name: handle.detach() for name, handle in gone.items()}
    output = bits(model(X))
    for name, adapter in adapters.items():
        tether.attach(model, adapter, name)
    return output


@pytest.mark.parametrize("names", [(), ("a",), ("b",), ("a", "b"), ("b", "a")])
def test_only_the_named_adapters_take_part(model, names):
    with tether.only(model, *names):
        assert active(model) == set(names)
        live = bits(model(X))
    assert active(model) == {"a", "b"}
    assert live == alone(model, *names)


def test_blocks_nest_and_restore_also_after_an_error(model):
    a, b = tether.handles(model).values()
    with tether.only(model, "b"):
        with tether.reference(model):
            assert active(model) == set()
        with a.disabled(), b.disabled():
            assert active(model) == set()
        with tether.only(model, "a"), pytest.raises(KeyError), tether.only(model):
            raise KeyError
        assert active(model) == {"b"}
    assert active(model) == {"a", "b"}


def test_disabled_leaves_out_one_adapter_and_leaves_the_others(model):
    a, _ = tether.handles(model).values()
    with a.disabled():
        live = bits(model(X))
    assert live == alone(model, "b")


def test_an_unknown_name_is_refused_and_changes_nothing(model):
    with pytest.raises(UnknownNameError, match=r"no adapter 'c' on the model.*'a', 'b'"):
        tether.only(model, "a", "c").__enter__()
    assert active(model) == {"a", "b"}
    with pytest.raises(UnknownNameError, match=r"no adapter 'a'.*The model has no adapters"):
        tether.only(nn.Linear(2, 2), "a").__enter__()


def test_the_reference_of_a_model_without_adapters_is_itself():
    model = nn.Linear(6, 4)
    with tether.reference(model):
        assert model(X).shape == (3, 4)


def test_no_gradient_reaches_an_adapter_that_does_not_take_part(model):
    a, b = tether.handles(model).values()
    with tether.only(model, "a"):
        model(X).sum().backward()
    assert all(p.grad is not None for p in a.parameters())
    assert all(p.grad is None for p in b.parameters())


def test_quiet_restores_every_module_and_the_random_state():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Linear(2, 2)))
    model.train()[2].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    with quiet(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(KeyError), quiet(model):
        raise KeyError
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
