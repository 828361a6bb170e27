"""Which adapters take part: only, reference, disabled; and evaluating without a trace."""

import pytest
import torch
from torch import nn

import tether
from laws.cases import bits
from laws.cases import truth as change
from tether import LoraConfig
from tether.errors import ConfigError, OffloadedError, UnknownNameError
from tether.switch import activate, quiet


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


def truth(model: nn.Module, weights: dict[str, float]) -> torch.Tensor:
    """The output with the weights W + Σ w·ΔW, in float64."""
    bare = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    for path in ("0", "2"):
        site, live = bare.get_submodule(path), model.get_submodule(path)
        site.weight.data, site.bias.data = live.weight.double(), live.bias.double()
        for name, weight in weights.items():
            layer = tether.handles(model)[name].snapshot().layers[path]
            site.weight.data += weight * change(layer)
    return bare(X.double())


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        ("a", [0.25]),
        ("ab", [0.5, -2.0]),
        ("ba", [0.5, 3]),
        ("ab", (0, 1)),
        ("ab", None),
        ("b", None),
        ("", None),
    ],
)
def test_adapters_are_weighted_in_a_block_and_for_good(model, names, weights):
    before = bits(model(X))
    numbers = dict(zip(names, weights or [1.0] * len(names), strict=True))
    with tether.only(model, *names, weights=weights):
        inside = model(X)
        assert active(model) == set(names)
        assert {n: h.weight for n, h in tether.handles(model).items() if h.active} == numbers
    assert bits(model(X)) == before
    assert [handle.weight for handle in tether.handles(model).values()] == [1, 1]
    torch.testing.assert_close(inside.double(), truth(model, numbers), rtol=1e-5, atol=1e-5)
    activate(model, *names, weights=weights)
    assert active(model) == set(names)
    assert bits(model(X)) == bits(inside)
    activate(model, "a", "b")
    assert bits(model(X)) == before


def test_a_weight_of_one_and_none_active_are_exact(model):
    only_a, base = alone(model, "a"), alone(model)
    activate(model, "a", weights=[0.5])
    assert bits(model(X)) != only_a
    activate(model, "a", weights=[1])
    assert bits(model(X)) == only_a
    activate(model)
    assert bits(model(X)) == base


def test_a_weighted_adapter_gets_weighted_gradients(model):
    a, _ = tether.handles(model).values()
    gradients = []
    for weight in (1.0, -0.5):
        with tether.only(model, "a", weights=[weight]):
            output = model[2](X.new_ones(3, 8))
        output.sum().backward()
        gradients.append(dict(a.named_parameters())["2.dA"].grad.clone())
        a.model.zero_grad()
    torch.testing.assert_close(gradients[1], -0.5 * gradients[0])


@pytest.mark.parametrize("kind", ["dora", "bias", "whole"])
def test_a_weight_is_a_straight_line_between_base_and_adapter(kind):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    config = {
        "dora": LoraConfig(rank=2, target_modules="0", use_dora=True),
        "bias": LoraConfig(rank=2, target_modules="0", bias="lora_only"),
        "whole": LoraConfig(rank=2, target_modules="0", modules_to_save=["1"]),
    }[kind]
    for parameter in tether.attach(model, config, "a").parameters():
        parameter.data.normal_()
    with torch.no_grad():
        for place in (0, 1):
            x = torch.randn(3, model[place].in_features)
            outputs = []
            for weight in (0, 1, 0.5):
                with tether.only(model, "a", weights=[weight]):
                    outputs.append(model[place](x))
            torch.testing.assert_close(outputs[2], (outputs[0] + outputs[1]) / 2)


@pytest.mark.parametrize(
    ("names", "weights", "error", "message"),
    [
        ("ab", [1], ConfigError, r"1 weights \[1\] for 2 adapters \['a', 'b'\]"),
        ("a", [float("nan")], ConfigError, "weight nan of adapter 'a' must be a finite"),
        ("a", [float("inf")], ConfigError, "finite"),
        ("a", ["1"], ConfigError, "weight '1'"),
        ("a", [True], ConfigError, "weight True"),
        ("aba", None, ConfigError, "'a' is named 2 times"),
        ("ac", None, UnknownNameError, "no adapter 'c'"),
    ],
)
def test_a_wrong_switch_changes_nothing(model, names, weights, error, message):
    activate(model, "b", weights=[0.5])
    before = bits(model(X))
    with pytest.raises(error, match=message):
        activate(model, *names, weights=weights)
    with pytest.raises(error, match=message):
        tether.only(model, *names, weights=weights).__enter__()
    assert bits(model(X)) == before
    assert active(model) == {"b"}


def test_an_offloaded_adapter_is_not_activated(model):
    before = bits(model(X))
    activate(model, "a")
    tether.handles(model)["b"].offload()
    with pytest.raises(OffloadedError, match="'b' is offloaded"):
        activate(model, "a", "b", weights=[0.5, 0.5])
    assert active(model) == {"a"}
    tether.handles(model)["b"].restore()
    activate(model, "a", "b")
    assert bits(model(X)) == before


def whole(*names: str) -> LoraConfig:
    return LoraConfig(rank=2, target_modules=["0.0"], modules_to_save=list(names))


@pytest.mark.parametrize(
    ("one", "other", "path"),
    [
        (whole("1"), whole("1"), "1"),
        (whole("1"), LoraConfig(rank=2, target_modules="1"), "1"),
        (LoraConfig(rank=2, target_modules=["1", "2.0"]), whole("2"), "2.0"),
    ],
)
def test_adapters_that_would_replace_each_other_do_not_take_part_together(one, other, path):
    parts = [nn.Sequential(nn.Linear(6, 6)) for _ in range(2)]
    model = nn.Sequential(parts[0], nn.Linear(6, 6), parts[1])
    tether.attach(model, one, "a")
    message = f"is trained whole by adapter '[ab]', and '[ab]' changes '{path}' too"
    with pytest.raises(ConfigError, match=message):
        tether.attach(model, other, "b")
    assert list(tether.handles(model)) == ["a"]
    activate(model)
    tether.attach(model, other, "b")
    with pytest.raises(ConfigError, match=message):
        activate(model, "a", "b")
    assert active(model) == {"b"}
    with pytest.raises(ConfigError, match=message):
        tether.only(model, "b", "a").__enter__()
    with tether.only(model, "a"):
        assert active(model) == {"a"}


def test_a_module_trained_whole_twice_is_refused_at_the_latest_when_it_runs():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 6))
    tether.attach(model, whole("1"), "a")
    with tether.only(model):
        tether.attach(model, whole("1"), "b")
        assert model(X).shape == (3, 6)
    assert active(model) == {"a", "b"}
    with pytest.raises(ConfigError, match=r"module '1' is trained whole by adapter 'b', and would"):
        model(X)
    activate(model, "b")
    assert model(X).shape == (3, 6)


def test_a_module_beside_one_of_a_longer_name_is_no_part_of_it():
    model = nn.ModuleDict({"up": nn.Linear(6, 6), "upper": nn.Linear(6, 6), "x": nn.Linear(6, 6)})
    tether.attach(model, LoraConfig(rank=2, target_modules="x", modules_to_save=["up"]), "a")
    tether.attach(model, LoraConfig(rank=2, target_modules="upper"), "b")
    assert active(model) == {"a", "b"}


def test_the_reference_is_the_base_while_policies_train(tiny_llama):
    ids = torch.arange(12).view(2, 6)
    wanted = bits(tiny_llama().train()(ids).logits)
    model = tiny_llama().train()
    a = tether.attach(model, LoraConfig(rank=2), "a")
    tether.attach(model, LoraConfig("lora", rank=2, use_dora=True), "b")
    optimizer = torch.optim.SGD(a.parameters(), lr=1.0)
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        with torch.no_grad(), tether.reference(model):
            assert bits(model(ids).logits) == wanted
        loss.backward()
        optimizer.step()
    assert bits(model(ids).logits) != wanted
    activate(model, "a", "b", weights=[0.5, 2])
    with tether.reference(model), tether.only(model, "b"), tether.reference(model):
        assert bits(model(ids).logits) == wanted
    tether.handles(model)["b"].offload()
    with tether.reference(model):
        assert bits(model(ids).logits) == wanted
