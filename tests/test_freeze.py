"""What attaching does to the rest of the model: gradients, checkpointing, compiled graphs."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import tether
from laws.cases import bits
from tether import LoraConfig

CONFIG = LoraConfig(rank=2)
IDS = torch.arange(12).view(2, 6)


def trains(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters() if ".tether." not in n}


@pytest.fixture
def model() -> nn.Module:
    """Of three layers the second does not train."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6))
    model[1].requires_grad_(False)
    return model


def test_the_base_stops_training_and_trains_again(model):
    before = trains(model)
    handle = tether.attach(model, CONFIG)
    assert not any(trains(model).values())
    assert all(p.requires_grad for p in handle.parameters())
    handle.detach()
    assert trains(model) == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("middle", [None, True, False])
def test_the_last_of_two_adapters_lets_the_base_train_again(model, order, middle):
    before = trains(model)
    handles = [tether.attach(model, CONFIG, "a")]
    if middle is not None:
        tether.attach(model, CONFIG, "m", trainable=middle).detach()
    handles.append(tether.attach(model, CONFIG, "b"))
    handles[order[0]].detach()
    assert not any(trains(model).values())
    assert all(p.requires_grad for p in handles[order[1]].parameters())
    handles[order[1]].detach()
    assert trains(model) == before


def test_an_adapter_that_does_not_train_leaves_the_base_and_others_alone(model):
    before = trains(model)
    still = tether.attach(model, CONFIG, "still", trainable=False)
    assert trains(model) == before
    assert not any(p.requires_grad for p in still.parameters())
    moving = tether.attach(model, CONFIG, "moving")
    assert all(p.requires_grad for p in moving.parameters())
    moving.detach()
    assert trains(model) == before
    still.detach()
    assert trains(model) == before


def test_a_tied_weight_is_frozen_and_released_once(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    handle = tether.attach(model, LoraConfig(rank=2, target_modules="embed_tokens"))
    assert not model.lm_head.weight.requires_grad
    handle.detach()
    assert all(trains(model).values())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def gradients(model: nn.Module) -> dict[str, bytes]:
    """Of one step with dropout in the adapter, from a fixed random state."""
    for handle in tether.handles(model).values():
        for i, parameter in enumerate(handle.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    torch.manual_seed(3)
    model.train()(IDS, labels=IDS).loss.backward()
    (handle,) = tether.handles(model).values()
    result = {n: bits(p.grad) for n, p in handle.named_parameters()}
    assert all(p.grad.any() for p in handle.parameters())
    return result


def input_hooks(model: nn.Module) -> int:
    return len(model.get_input_embeddings()._forward_hooks)


@pytest.mark.parametrize("when", ["before", "before, without input gradients", "after"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(tiny_llama, reentrant, when):
    config = LoraConfig(rank=2, dropout=0.3)
    plain, model = tiny_llama(), tiny_llama()
    tether.attach(plain, config)
    expected = gradients(plain)

    if when == "after":
        tether.attach(model, config)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        assert gradients(model) == expected
        return
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if when != "before":
        # As older transformers, and its vision models, leave it.
        model.disable_input_require_grads()
    hooks = input_hooks(model)
    for _ in range(2):
        handle = tether.attach(model, config)
        assert input_hooks(model) == 1
        assert gradients(model) == expected
        handle.detach()
        assert input_hooks(model) == hooks


def test_two_adapters_share_the_input_gradients(tiny_llama):
    model = tiny_llama()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    first, second = (tether.attach(model, CONFIG, name) for name in "ab")
    assert input_hooks(model) == 1
    first.detach()
    assert input_hooks(model) == 1
    second.detach()
    assert input_hooks(model) == 0


@pytest.fixture(params=["wrapper", "in place"])
def compiled(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Compile whole graphs, and forget them after the test."""
    torch.compiler.reset()

    def compile_(model: nn.Module) -> nn.Module:
        if request.param == "wrapper":
            return torch.compile(model, backend="aot_eager", fullgraph=True)
        model.compile(backend="aot_eager", fullgraph=True)
        return model

    yield compile_
    torch.compiler.reset()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model_does_what_the_model_does(compiled, when):
    # Frozen, in eval mode: nothing but the hooks tells the compiler that something has changed.
    model, x = Layers().requires_grad_(False).eval(), torch.randn(3, 6)
    eager, moved, outputs = copy.deepcopy(model), {}, {"": bits(model(x))}
    for name in ("a", "b", "ab"):
        if name in ("a", "b"):
            handle = tether.attach(eager, LoraConfig(rank=2), name)
            for parameter in handle.parameters():
                parameter.data.normal_(std=0.1)
            moved[name] = handle.snapshot()
        with tether.only(eager, *name):
            outputs[name] = bits(eager(x))
    assert len(set(outputs.values())) == 4

    if when == "after":
        model = compiled(model)
        assert bits(model(x)) == outputs[""]
    a, b = (tether.attach(model, moved[name], name) for name in "ab")
    if when == "before":
        model = compiled(model)
    assert bits(model(x)) == outputs["ab"]
    with tether.reference(model):
        assert bits(model(x)) == outputs[""]
    with tether.only(model, "b"):
        assert bits(model(x)) == outputs["b"]
    with b.disabled():
        assert bits(model(x)) == outputs["a"]
    assert bits(model(x)) == outputs["ab"]
    with torch.no_grad():
        model(x)
        a.verify(x)
    a.detach()
    assert bits(model(x)) == outputs["b"]
    tether.handles(model)["b"].detach()
    assert bits(model(x)) == outputs[""]


def test_a_compiled_llama_trains_as_the_llama_does(tiny_llama, compiled):
    eager, model = tiny_llama(), compiled(tiny_llama())
    trained = []
    for either in (eager, model):
        handle = tether.attach(either, CONFIG)
        optimizer = torch.optim.SGD(handle.parameters(), lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            either(IDS, labels=IDS).loss.backward()
            optimizer.step()
        trained.append(dict(handle.named_parameters()))
    for name, expected in trained[0].items():
        assert expected.any()
        torch.testing.assert_close(trained[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)
