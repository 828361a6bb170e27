"""DoRA, biases and whole modules in a model that is compiled, checkpointed, copied or pickled."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tether
from laws.cases import bits
from whole_model import config, make, moved, whole_bits

ALL = {"use_dora": True, "bias": "all", "modules_to_save": ("norm", "head")}
SETTINGS = {
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "dora and biases": {"use_dora": True, "bias": "all"},
    "a norm": {"modules_to_save": ("norm",)},
    "a head": {"modules_to_save": ("head",)},
    "all": ALL,
}


@pytest.fixture
def compiled() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Compile without code generation, in one graph."""
    torch.compiler.reset()
    yield lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.compiler.reset()


def outcome(model: nn.Module, x: Tensor, handle: tether.Handle) -> list[bytes]:
    """The output and every gradient."""
    for parameter in handle.parameters():
        parameter.grad = None
    y = model(x)
    y.square().sum().backward()
    return [bits(y), *(bits(p.grad) for p in handle.parameters())]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_one_graph_holds_them_all(settings, compiled):
    net, x = make("linear")
    base = net(x).detach()
    handle = tether.attach(net, config(**settings))
    graph = compiled(net)
    torch.testing.assert_close(graph(x), base)
    moved(handle)
    live = graph(x)
    assert float((live - base).detach().abs().max()) > 0.05
    torch.testing.assert_close(live, net(x))
    graph(x).square().sum().backward()
    found = [p.grad for p in handle.parameters()]
    for parameter in handle.parameters():
        parameter.grad = None
    net(x).square().sum().backward()
    for gradient, parameter in zip(found, handle.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
    with handle.disabled():
        torch.testing.assert_close(graph(x), base)
    handle.detach()
    torch.testing.assert_close(graph(x), base)


@pytest.mark.parametrize("kind", ["conv1d-of-transformers", "conv2d", "embedding"])
def test_one_graph_holds_every_kind_of_site_with_dora(kind, compiled):
    net, x = make(kind)
    handle = tether.attach(net, config(use_dora=True, bias="all"))
    moved(handle)
    torch.testing.assert_close(compiled(net)(x), net(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_activations_changes_no_gradient(reentrant):
    net, x = make("linear")
    handle = moved(tether.attach(net, config(dropout=0.3, **ALL)))
    torch.manual_seed(4)
    wanted = outcome(net.train(), x, handle)

    class Recomputed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return checkpoint(net, x, use_reentrant=reentrant)

    torch.manual_seed(4)
    assert outcome(Recomputed(), x.clone(), handle) == wanted


def test_a_checkpointed_llama_trains_them_as_the_llama_does(tiny_llama):
    ids = torch.arange(16).view(2, 8)
    found = []
    for recompute in (False, True):
        model = tiny_llama(attention_bias=True)
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": True})
        settings = {"use_dora": True, "bias": "lora_only", "modules_to_save": ["model.norm"]}
        handle = moved(tether.attach(model, tether.LoraConfig(rank=2, **settings)), 0.02)
        model.train()(ids, labels=ids).loss.backward()
        found.append([bits(p.grad) for p in handle.parameters()])
        assert all(p.grad.any() for p in handle.parameters())
    assert found[0] == found[1]


def test_a_deep_copy_has_its_own_parts():
    net, x = make("linear")
    handle = moved(tether.attach(net, config(**ALL)))
    live = bits(net(x))
    other = copy.deepcopy(net)
    assert bits(other(x)) == live
    theirs = tether.handles(other)["default"]
    mine = {id(p) for p in handle.parameters()}
    assert mine.isdisjoint(map(id, theirs.parameters()))
    assert outcome(other, x, theirs) == outcome(net, x, handle)
    moved(theirs)
    assert bits(net(x)) == live
    assert bits(other(x)) != live
    with torch.no_grad():  # the copy's modules move the copy's base
        other.head.weight.zero_()
        other.norm.weight.zero_()
    assert bits(net(x)) == live
    theirs.detach()
    assert handle.attached
    assert bits(net(x)) == live


def test_a_model_saved_whole_comes_back_with_its_parts():
    net, x = make("conv2d")
    handle = moved(tether.attach(net, config(**ALL)))
    live, buffer = bits(net(x)), io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert bits(other(x)) == live
    theirs = tether.handles(other)["default"]
    assert whole_bits(theirs.snapshot()) == whole_bits(handle.snapshot())
    theirs.detach()
    assert bits(other(x)) == bits(make("conv2d")[0](x))


def test_a_state_dict_saves_and_restores_the_parts():
    net, x = make("linear")
    adapter = tether.init(net, config(**ALL))
    handle = moved(tether.attach(net, adapter))
    live, state = bits(net(x)), copy.deepcopy(net.state_dict())
    other, _ = make("linear")
    theirs = tether.attach(other, adapter)
    assert bits(other(x)) != live
    other.load_state_dict(state)
    assert bits(other(x)) == live
    assert whole_bits(theirs.snapshot()) == whole_bits(handle.snapshot())


@pytest.mark.parametrize(
    "settings", [{"bias": "all"}, {"modules_to_save": ("head",)}, {"use_dora": True}], ids=str
)
def test_a_base_in_float64_is_known_again(settings):
    net, x = make("linear", torch.float64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += torch.randn_like(parameter) * 1e-12  # lost in float32
    moved(tether.attach(net, config(**settings)))
    live = bits(net(x))
    adapter = tether.handles(net)["default"].detach()
    tether.attach(net, adapter)
    assert bits(net(x)) == live
