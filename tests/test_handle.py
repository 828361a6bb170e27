import pytest
import torch
from torch import nn

import tether
from laws.cases import bits, factors_of
from tether import LoraConfig
from tether.errors import DetachedError, HookNotFiredError


class Branches(nn.Module):
    """Two linear layers; only a batch that asks for it reaches the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor, deep: bool = False) -> torch.Tensor:
        x = self.norm(self.dropout(self.first(x)))
        return self.third(self.second(x)) if deep else x


X = torch.linspace(-1, 1, 24).view(4, 6)


def test_parameters_are_the_trained_factors_in_a_fixed_order():
    model = Branches()
    anchored = tether.attach(model, LoraConfig(rank=2), "anchored")
    plain = tether.attach(model, LoraConfig(init="lora", rank=2), "plain")
    paths = ("first", "second", "third")
    assert anchored.sites == plain.sites == paths
    assert [name for name, _ in anchored.named_parameters()] == [
        f"{path}.{name}" for path in paths for name in ("dA", "dB")
    ]
    assert [name for name, _ in plain.named_parameters()] == [
        f"{path}.{name}" for path in paths for name in ("A", "B")
    ]
    for handle in (anchored, plain):
        parameters = list(handle.parameters())
        assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
        assert [id(p) for p in parameters] == [id(p) for _, p in handle.named_parameters()]
    mine = {id(p) for handle in (anchored, plain) for p in handle.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == mine


def test_a_handle_knows_its_state():
    model = Branches()
    handle = tether.attach(model, LoraConfig(rank=2), "mine")
    assert repr(handle) == "<Handle 'mine': 3 sites, attached>"
    assert (handle.attached, handle.active, handle.name) == (True, True, "mine")
    with handle.disabled():
        assert not handle.active
    handle.detach()
    assert repr(handle) == "<Handle 'mine': 3 sites, detached>"
    assert not handle.attached


def test_a_detached_handle_refuses_to_act(tmp_path):
    model = Branches()
    handle = tether.attach(model, LoraConfig(rank=2))
    adapter = handle.detach()
    again = tether.attach(model, adapter)  # another adapter of that name is not this one
    for action in (
        handle.detach,
        handle.snapshot,
        lambda: list(handle.parameters()),
        lambda: list(handle.named_parameters()),
        lambda: handle.save(tmp_path / "a.safetensors"),
        lambda: handle.verify(X),
        lambda: handle.disabled().__enter__(),
        lambda: handle.annotate(steps=1),
        lambda: tether.save_as_lora(handle, tmp_path / "plain"),
    ):
        with pytest.raises(DetachedError, match=r"adapter 'default' is no longer on the model"):
            action()
    assert not list(tmp_path.iterdir())
    assert again.attached


def test_detach_returns_the_adapter_as_it_was():
    model = Branches()
    handle = tether.attach(model, LoraConfig(rank=2))
    for parameter in handle.parameters():
        parameter.data.normal_()
    expected = factors_of(handle.snapshot())
    detached = factors_of(handle.detach())
    assert {n: bits(t) for n, t in detached.items()} == {n: bits(t) for n, t in expected.items()}


def test_save_writes_the_snapshot(tmp_path):
    handle = tether.attach(Branches(), LoraConfig(rank=2))
    handle.annotate(learning_rate=1e-3)
    handle.save(tmp_path / "a.safetensors")
    loaded = tether.load(tmp_path / "a.safetensors")
    assert loaded.provenance == handle.snapshot().provenance
    assert loaded.provenance.learning_rate == 1e-3


def test_annotating_reaches_later_snapshots_only():
    handle = tether.attach(Branches(), LoraConfig(rank=2))
    before = handle.snapshot()
    handle.annotate(learning_rate=2e-4, steps=30)
    after = handle.snapshot().provenance
    assert (after.learning_rate, after.steps) == (2e-4, 30)
    assert after.fingerprints == before.provenance.fingerprints
    assert before.provenance.steps is None


def test_handles_finds_adapters_in_the_order_of_attaching():
    model = Branches()
    assert tether.handles(model) == {}
    for name in ("z", "a", "m"):
        tether.attach(model, LoraConfig(rank=2), name)
    assert list(tether.handles(model)) == ["z", "a", "m"]
    tether.handles(model)["z"].detach()
    tether.attach(model, LoraConfig(rank=2), "z")
    assert list(tether.handles(model)) == ["a", "m", "z"]


def test_handles_work_through_a_wrapper():
    model = Branches()
    handle = tether.attach(model, LoraConfig(rank=2))
    wrapped = nn.Sequential(model)
    (found,) = tether.handles(wrapped).values()
    assert found.sites == handle.sites
    assert [id(p) for p in found.parameters()] == [id(p) for p in handle.parameters()]
    found.detach()
    assert not handle.attached
    assert not list(model.first.children())
    assert all(p.requires_grad for p in model.parameters())


def test_verify_names_the_site_whose_forward_was_not_called():
    model = Branches()
    handle = tether.attach(model, LoraConfig(rank=2))
    with pytest.raises(HookNotFiredError, match=r"'second'.* nor were 1 others, .*exclude_modules"):
        handle.verify(X)
    handle.verify({"x": X, "deep": True})
    narrow = tether.attach(model, LoraConfig(rank=2, target_modules="second"), "narrow")
    with pytest.raises(HookNotFiredError, match=r"^site 'second': its forward .* so the adapter"):
        narrow.verify(X)


class Bypassed(nn.Module):
    """Reads the weight of its layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.linear.weight)


def test_verify_finds_a_module_that_is_bypassed():
    handle = tether.attach(Bypassed(), LoraConfig(rank=2))
    with pytest.raises(HookNotFiredError, match="site 'linear'"):
        handle.verify(X)


@pytest.mark.parametrize("deep", [True, False])
def test_verify_changes_nothing(deep):
    model = Branches().train()
    model.second.eval()
    handle = tether.attach(model, LoraConfig(rank=2, dropout=0.5))
    modes = [m.training for m in model.modules()]
    buffers = [bits(b) for b in model.buffers()]
    state = torch.get_rng_state()
    with handle.disabled():
        try:
            handle.verify({"x": X, "deep": deep})
        except HookNotFiredError:
            assert not deep
        assert not handle.active
    assert [m.training for m in model.modules()] == modes
    assert [bits(b) for b in model.buffers()] == buffers
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in model.first.tether.modules())
    assert all(p.grad is None for p in model.parameters())
