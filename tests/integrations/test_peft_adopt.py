"""Adopting a live peft model: the restored base, all or nothing, and training that goes on."""

import copy
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import tether
from tether.errors import (
    ConfigError,
    UnsupportedAdapterError,
    UnsupportedModuleError,
)
from tether.integrations.peft import adopt, snapshot, track

from .peft_models import (
    TARGETS,
    Make,
    Net,
    Q,
    add,
    distance,
    layers,
    logits,
    state_of,
    step,
    train,
    wrap,
)


def test_training_goes_on_where_it_was(untied: Make) -> None:
    """Beside peft going on: the same losses, with the old optimizer and its moments."""
    model = wrap(untied(), lora_dropout=0.0, modules_to_save=["lm_head"], use_dora=True)
    track(model)
    optimizer = train(model, 4)
    twin, other = copy.deepcopy((model, optimizer))
    for group in (*optimizer.param_groups, *other.param_groups):
        group["weight_decay"] = 0.0
    handle = adopt(model, optimizer=optimizer)
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert mine == {id(p) for p in handle.parameters()}
    ours = [step(handle.model, optimizer) for _ in range(8)]
    theirs = [step(twin, other) for _ in range(8)]
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert ours[-1] < 0.97 * ours[0]
    fresh = adopt(wrap(untied(), True), optimizer=None)
    assert fresh.model.training is False


def test_moments_of_convolutions_change_their_shape() -> None:
    def loss(model: nn.Module) -> Tensor:
        return model(torch.linspace(-1, 1, 80).view(2, 5, 8)).square().sum()

    class Plane(Net):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.Conv1d(8, 8, 3, padding=1)
            self.norm = nn.Identity()

    torch.manual_seed(0)
    model = wrap(Plane(), True, target_modules=["odd"], bias="all")
    track(model)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    handle = adopt(model, optimizer=optimizer)
    for who, its in ((handle.model, optimizer), (twin, other)):
        for _ in range(5):
            its.zero_grad()
            loss(who).backward()
            its.step()
    assert distance(loss(handle.model)[None], loss(twin)[None]) < 1e-5


def test_what_is_trained_stays_so(untied: Make) -> None:
    model = wrap(untied())
    add(model, "other", True)
    track(model)
    for path, layer in layers(model).items():
        layer.lora_A["default"].weight.requires_grad_(path == Q)
    model.train()
    model.base_model.model.model.layers[1].eval()
    modes = {n: m.training for n, m in model.get_base_model().named_modules() if "lora" not in n}
    handle = adopt(model)
    assert handle.name == "default"
    for name, parameter in handle.named_parameters():
        assert parameter.requires_grad is (name == f"{Q}.dA" or name.endswith(".dB"))
    other = tether.handles(handle.model)["other"]
    assert not any(p.requires_grad for p in other.parameters())
    assert (handle.active, other.active) == (True, False)
    for name, module in handle.model.named_modules():
        assert module.training is modes.get(name, module.training)
    assert not handle.model.model.layers[1].self_attn.q_proj.tether.training

    for trainable in (True, False):
        model = wrap(untied())
        track(model)
        handle = adopt(model, trainable=trainable)
        assert {p.requires_grad for p in handle.parameters()} == {trainable}


def test_adapters_that_are_off_stay_off(untied: Make) -> None:
    model = wrap(untied(), True)
    train(model)
    model.eval()
    on = logits(model)
    model.base_model.disable_adapter_layers()
    handle = adopt(model)
    assert not handle.active
    assert torch.equal(logits(handle.model), logits(untied()))
    with tether.only(handle.model, "default"):
        assert distance(logits(handle.model), on) < 1e-6


def test_two_that_train_one_module_whole(untied: Make) -> None:
    """They cannot take part together, in peft neither; both come along."""
    model = wrap(untied(), True, modules_to_save=["lm_head"])
    add(model, "b", True, modules_to_save=["lm_head"])
    track(model)
    train(model)
    wanted = logits(model)
    handle = adopt(model)
    found = tether.handles(handle.model)
    assert {name: each.active for name, each in found.items()} == {"default": True, "b": False}
    assert distance(logits(handle.model), wanted) < 1e-5


def test_the_base_is_free_again(untied: Make, folder: Path) -> None:
    model = wrap(untied())
    handle = adopt(model, base=folder)
    base = handle.model
    handle.detach()
    for (name, parameter), wanted in zip(
        base.named_parameters(), untied().parameters(), strict=True
    ):
        assert torch.equal(parameter, wanted), name
    with warnings.catch_warnings():
        # peft warns of a peft_config that is left over.
        warnings.filterwarnings("error", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        again = peft.get_peft_model(base, peft.LoraConfig(target_modules=TARGETS))
    assert len(layers(again)) == 6


def test_all_or_nothing(untied: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error at any step leaves the peft model as it was."""
    from tether.integrations.peft import adopt as function

    module = sys.modules[function.__module__]
    model = wrap(untied(), modules_to_save=["lm_head"], bias="all")
    add(model, "other", True)
    track(model)
    optimizer = train(model)
    groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    before, outputs = state_of(model), logits(model)

    def check() -> None:
        with pytest.raises(RuntimeError, match="stop"):
            adopt(model, "default", base=folder, optimizer=optimizer)
        assert state_of(model) == before
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == groups
        assert not tether.handles(model)
        assert torch.equal(logits(model), outputs)

    for name in ("_unwrap", "_restore", "_attach", "_write"):
        real, calls = getattr(module, name), []

        def stop_after(*args: object, real=real, calls=calls) -> object:
            result = real(*args)
            calls.append(1)
            if len(calls) == 2 or real.__name__ in ("_unwrap", "_restore"):
                raise RuntimeError("stop")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop_after)
            check()
    assert adopt(model, "default", base=folder).attached


def test_names_that_tether_cannot_give(untied: Make) -> None:
    model = wrap(untied(), True, name="my own")
    before = state_of(model)
    with pytest.raises(ConfigError, match="name 'my own' must be letters"):
        adopt(model)
    assert state_of(model) == before


def test_biases_that_a_hook_cannot_move() -> None:
    model = wrap(Net(), True, target_modules=["first"], bias="all")
    track(model)
    before = state_of(model)
    with pytest.raises(UnsupportedModuleError, match="'norm': BatchNorm1d uses its bias"):
        adopt(model)
    assert state_of(model) == before
    assert set(snapshot(model).biases) == {"inner.first", "inner.second", "odd", "norm", "head.0"}


def test_a_module_with_two_paths() -> None:
    net = Net()
    net.inner["second"] = net.inner["first"]
    model = wrap(net, True, target_modules=["first"])
    with pytest.raises(UnsupportedAdapterError, match=r"'inner.first' is also 'inner.second'"):
        adopt(model)
    assert set(snapshot(model).layers) == {"inner.first"}


def test_tied_weights_stay_tied(tiny_llama: Make, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = wrap(tiny_llama().eval(), True, target_modules=["lm_head", "embed_tokens", "q_proj"])
    train(model)
    before = logits(model)
    handle = adopt(model, base=tmp_path / "base")
    assert handle.model.lm_head.weight is handle.model.model.embed_tokens.weight
    assert distance(logits(handle.model), before) < 1e-6
    assert handle.restored == {}


def test_half_precision_is_restored_within_the_bound(untied: Make, tmp_path: Path) -> None:
    base = untied().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    for init in ("pissa", "olora"):
        model = wrap(copy.deepcopy(base), init)
        track(model)
        twin = copy.deepcopy(model)
        computed, exact = adopt(model), adopt(twin, base=tmp_path / "base")
        for path, report in computed.restored.items():
            wanted = base.get_submodule(path).weight
            error = distance(computed.model.get_submodule(path).weight, wanted)
            assert 1e-4 < error < report.error < 0.05
            assert torch.equal(exact.model.get_submodule(path).weight, wanted)
        with exact.disabled():
            assert torch.equal(logits(exact.model), logits(base))


def test_an_optimizer_whose_state_cannot_go_on() -> None:
    net = Net()
    net.odd = nn.Conv1d(8, 8, 3, padding=1)
    model = wrap(net, True, target_modules=["odd"])
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(2, 5, 8)).sum().backward()
    optimizer.step()
    before, states = state_of(model), dict(optimizer.state)
    with pytest.raises(ConfigError, match=r"'row_var' of shape .* does not go with a factor"):
        adopt(model, optimizer=optimizer)
    assert state_of(model) == before
    assert dict(optimizer.state) == states
