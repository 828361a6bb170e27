"""Offloading and restoring an adapter is the identity; a limit offloads what is not used."""

import copy
import errno
import io
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tether
from laws.cases import bits, factors_of
from tether import LoraConfig, fs, offload
from tether.errors import (
    ConfigError,
    DetachedError,
    DigestError,
    NonFiniteError,
    NotAnAdapterError,
    OffloadedError,
    ShardedWeightError,
    TruncatedFileError,
    WriteError,
)
from tether.formats import container
from tether.memory import memory
from tether.offload import limit
from tether.value import CHILD, Adapter

X = torch.linspace(-1, 1, 18).view(3, 6)
PLACES = ("cpu", "file")
in_every_place = pytest.mark.parametrize("place", PLACES)


class Model(nn.Module):
    """Sites, a bias beside them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embedding(torch.arange(3, device=x.device))
        return self.head(self.norm(self.down(torch.tanh(self.up(x + rows)))))


SITES = ["embedding", "up", "down"]
KINDS = {
    "anchored": LoraConfig(rank=2, target_modules=SITES),
    "plain": LoraConfig(rank=2, target_modules=SITES, init="lora"),
    "dora": LoraConfig(rank=2, target_modules=["up", "down"], use_dora=True),
    "biases": LoraConfig(rank=2, target_modules=["up"], bias="all", dropout=0.5),
    "modules": LoraConfig(rank=2, target_modules=SITES, modules_to_save=["norm", "head"]),
}


@pytest.fixture
def model() -> Model:
    return Model()


def target(folder: Path, place: str, name: str = "a") -> str | Path:
    return "cpu" if place == "cpu" else folder / f"{name}.safetensors"


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[bytes]:
    """Train, and leave the gradients of one more backward pass."""
    losses = []
    for _ in range(count):
        optimizer.step()
        optimizer.zero_grad()
        loss = model(X.to(next(model.parameters()))).square().sum()
        loss.backward()
        losses.append(bits(loss))
    return losses


def trained(model: nn.Module, config: LoraConfig, name: str = "a", **settings: object):
    handle = tether.attach(model, config, name, **settings)
    for number, parameter in enumerate(handle.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return handle


def state(model: nn.Module) -> dict[str, object]:
    """Everything about a model, and who is who in it."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {
        name: (
            id(t),
            bits(t),
            t.shape,
            t.stride(),
            t.dtype,
            t.requires_grad,
            None if t.grad is None else bits(t.grad),
        )
        for name, t in tensors.items()
    } | {f"module {n}": (id(m), m.training) for n, m in model.named_modules()}


def values(adapter: Adapter) -> dict[str, bytes]:
    wholes = {name: value.current for name, value in adapter.trained_whole}
    rows = {
        path: layer.magnitude.trainable
        for path, layer in adapter.layers.items()
        if layer.magnitude is not None
    }
    return {n: bits(t) for n, t in (factors_of(adapter) | wholes | rows).items()}


def all_empty(handle: tether.Handle) -> bool:
    return all(p.numel() == 0 and p.grad is None for p in handle.parameters())


@in_every_place
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("base", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_offload_then_restore_is_the_identity_and_training_goes_on(
    model, tmp_path, place, kind, base, dtype
):
    model.to(base)
    handle = trained(model, KINDS[kind], dtype=dtype)
    twin = copy.deepcopy(model)
    runs = [model, twin]
    optimizers = [
        torch.optim.AdamW(tether.handles(m)["a"].parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1)
        for m in runs
    ]
    for run, optimizer in zip(runs, optimizers, strict=True):
        torch.manual_seed(0)
        steps(run, optimizer, 3)
    model.norm.eval()
    next(handle.parameters()).requires_grad_(False)
    before, snapshot = state(model), values(handle.snapshot())
    ids = [id(p) for p in handle.parameters()]

    handle.offload(target(tmp_path, place))
    assert (handle.offloaded, handle.active) == (True, False)
    assert repr(handle) == f"<Handle 'a': {len(handle.sites)} sites, offloaded>"
    assert all_empty(handle)
    assert [id(p) for p in handle.parameters()] == ids
    assert {p.dtype for p in handle.parameters()} <= {
        dtype,
        torch.promote_types(dtype, torch.float),
    }
    assert handle.memory().adapters == 0
    with tether.reference(twin):
        assert bits(model(X.to(base))) == bits(twin(X.to(base)))
    assert values(handle.snapshot()) == snapshot
    optimizers[0].step()  # skips what is empty

    handle.restore()
    assert (handle.offloaded, handle.active) == (False, True)
    assert state(model) == before
    assert values(handle.snapshot()) == snapshot
    next(handle.parameters()).requires_grad_(True)
    model.norm.train()
    after = []
    for run, optimizer in zip(runs, optimizers, strict=True):
        torch.manual_seed(1)
        after.append(steps(run, optimizer, 3))
    assert after[0] == after[1]
    assert values(handle.snapshot()) == values(tether.handles(twin)["a"].snapshot())


@in_every_place
def test_an_offloaded_adapter_is_saved_and_detached_as_it_is(model, tmp_path, place):
    handle = trained(model, KINDS["modules"])
    expected = values(handle.snapshot())
    handle.save(tmp_path / "before.safetensors")
    handle.offload(target(tmp_path, place))
    handle.save(tmp_path / "after.safetensors")
    one, other = (container.read(tmp_path / f"{n}.safetensors")[1] for n in ("before", "after"))
    assert one == other  # and so the digest of every byte
    handle.annotate(steps=7)
    assert handle.snapshot().provenance.steps == 7
    tether.save_as_lora(trained(copy.deepcopy(model), KINDS["plain"], "b"), tmp_path / "lora")
    detached = handle.detach()
    assert values(detached) == expected
    assert detached.provenance.steps == 7
    assert values(tether.attach(model, detached, "again").snapshot()) == expected
    with pytest.raises(DetachedError):
        handle.restore()


@in_every_place
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_model_has_the_parked_values_too(model, tmp_path, place, way):
    handle = trained(model, KINDS["anchored"])
    trained(model, KINDS["anchored"], "b")
    model(X).sum().backward()
    before = state(model)
    expected, output = values(handle.snapshot()), bits(model(X))
    gradients = [bits(p.grad) for p in handle.parameters()]
    for name in ("a", "b"):
        tether.handles(model)[name].offload(target(tmp_path, place, name))
    other = way(model)
    handle.restore()
    with torch.no_grad():
        next(handle.parameters()).zero_()  # what the copy has is its own
    for found in tether.handles(other).values():
        assert found.offloaded
        found.restore()
    found = tether.handles(other)["a"]
    assert values(found.snapshot()) == expected
    assert [bits(p.grad) for p in found.parameters()] == gradients
    assert bits(other(X)) == output
    a, b = (tether.handles(other)[n]._layers["up"].anchor for n in ("a", "b"))
    assert a is b
    assert len(before) == len(state(other))


@in_every_place
def test_it_comes_back_to_where_the_model_is_by_now(model, tmp_path, place):
    handle = trained(model, KINDS["dora"])
    twin = copy.deepcopy(model).to(torch.bfloat16).eval()
    handle.offload(target(tmp_path, place))
    model.to(torch.bfloat16).eval()
    handle.restore()
    assert {p.dtype for p in handle.parameters()} == {torch.bfloat16}
    assert [bits(t) for t in model.state_dict().values()] == [
        bits(t) for t in twin.state_dict().values()
    ]
    assert not any(m.training for m in model.modules())


def test_gradients_that_were_none_stay_none_and_frozen_adapters_stay_frozen(model):
    handle = trained(model, KINDS["plain"], trainable=False)
    before = state(model)
    handle.offload()
    handle.restore()
    assert state(model) == before
    assert all(p.grad is None and not p.requires_grad for p in handle.parameters())


def test_state_dict_has_the_values_or_says_that_it_cannot(model, tmp_path):
    handle = trained(model, KINDS["dora"])
    expected = {n: bits(t) for n, t in model.state_dict().items()}
    handle.offload("cpu")
    assert {n: bits(t) for n, t in model.state_dict().items()} == expected
    handle.restore()
    handle.offload(tmp_path / "a.safetensors")
    with pytest.raises(OffloadedError, match=r"in the file of an offloaded adapter.*restore\(\)"):
        model.state_dict()


@pytest.mark.slow
def test_a_compiled_model_follows(model, tmp_path):
    handle = trained(model, KINDS["anchored"])
    other = trained(model, KINDS["dora"], "b")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for change in (
        lambda: None,
        lambda: handle.offload("cpu"),
        lambda: other.offload(tmp_path / "b.safetensors"),
        handle.restore,
        other.restore,
        lambda: handle.offload(tmp_path / "a.safetensors"),
        handle.restore,
    ):
        change()
        assert bits(compiled(X)) == bits(model(X))
    assert len({bits(compiled(X)), alone(model, "a"), alone(model, "b")}) == 3


def alone(model: nn.Module, *names: str) -> bytes:
    with tether.only(model, *names):
        return bits(model(X))


def anchor(model: nn.Module, name: str) -> nn.Module:
    return getattr(model.up, CHILD)[name].anchor


@pytest.mark.parametrize(
    "places", [("cpu", "cpu"), ("cpu", "file"), ("file", "cpu"), ("file",) * 2]
)
@pytest.mark.parametrize("first_back", ["a", "b"])
def test_a_shared_anchor_goes_with_the_last_and_comes_with_the_first(
    model, tmp_path, places, first_back
):
    a, b = (trained(model, KINDS["anchored"], name) for name in ("a", "b"))
    before, outputs = state(model), [alone(model, "a"), alone(model, "b")]
    shared = anchor(model, "a")
    a.offload(target(tmp_path, places[0], "a"))
    assert shared.A0.numel() > 0
    assert alone(model, "b") == outputs[1]
    b.offload(target(tmp_path, places[1], "b"))
    assert shared.A0.numel() == shared.B0.numel() == 0
    assert memory(model).adapters == 0
    # It is parked once, and not at all where both files have it.
    assert bool(shared.parked) == (places != ("file", "file"))
    snapshots = [values(a.snapshot()), values(b.snapshot())]
    handles = {"a": a, "b": b}
    handles.pop(first_back).restore()
    assert shared.A0.numel() > 0
    assert alone(model, first_back) == outputs["ab".index(first_back)]
    handles.popitem()[1].restore()
    assert state(model) == before
    assert anchor(model, "a") is anchor(model, "b") is shared
    assert snapshots == [values(a.snapshot()), values(b.snapshot())]
    assert shared.parked == {}


@in_every_place
def test_an_anchor_that_another_adapter_brought_meanwhile_is_held_once(model, tmp_path, place):
    a, b = (trained(model, KINDS["anchored"], name) for name in ("a", "b"))
    expected = [values(a.snapshot()), values(b.snapshot())]
    for name, handle in (("a", a), ("b", b)):
        handle.offload(target(tmp_path, place, name))
    trained(model, KINDS["anchored"], "c")
    trained(model, LoraConfig(rank=2, target_modules=SITES, alpha=1), "other")
    a.restore()
    assert anchor(model, "a") is anchor(model, "b") is anchor(model, "c")
    assert anchor(model, "other") is not anchor(model, "a")
    b.restore()
    assert [values(a.snapshot()), values(b.snapshot())] == expected
    assert len({id(anchor(model, name)) for name in "abc"}) == 1


@pytest.mark.parametrize("place", PLACES)
def test_detaching_the_last_that_used_an_anchor_takes_it_off(model, tmp_path, place):
    a, b = (trained(model, KINDS["anchored"], name) for name in ("a", "b"))
    expected = values(a.snapshot())
    a.offload(target(tmp_path, place))
    b.detach()
    assert memory(model).adapters == 0
    assert values(a.snapshot()) == expected
    a.restore()
    assert values(a.snapshot()) == expected


def test_offloading_twice(model, tmp_path):
    handle = trained(model, KINDS["plain"])
    handle.restore()  # is here
    handle.offload("cpu")
    handle.offload("cpu")
    with pytest.raises(OffloadedError, match=r"'a' is offloaded to cpu already, not to .*x\."):
        handle.offload(tmp_path / "x.safetensors")
    handle.restore()
    handle.offload(tmp_path / "x.safetensors")
    handle.offload(str(tmp_path / "." / "x.safetensors"))
    with pytest.raises(OffloadedError, match=r"x\.safetensors already, not to cpu"):
        handle.offload("cpu:0")
    handle.restore()


@pytest.mark.parametrize("where", ["cuda", "cuda:1", "meta", "mps"])
def test_only_to_the_cpu_or_a_file(model, where):
    handle = trained(model, KINDS["plain"])
    with pytest.raises(ConfigError, match=rf"'{where}' is a device.*'\./{where}'"):
        handle.offload(where)
    assert not handle.offloaded


def test_a_file_is_found_again_from_another_folder(model, tmp_path, monkeypatch):
    handle = trained(model, KINDS["plain"])
    expected = values(handle.snapshot())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    handle.offload("a.safetensors")
    monkeypatch.chdir(tmp_path / "elsewhere")
    handle.restore()
    assert values(handle.snapshot()) == expected
    assert (tmp_path / "a.safetensors").exists()


def test_what_is_in_the_place_of_the_file_is_never_replaced(model, tmp_path):
    a, b = (trained(model, KINDS["plain"], name) for name in ("a", "b"))
    with torch.no_grad():
        next(b.parameters()).add_(1)
    path = tmp_path / "a.safetensors"
    a.offload(path)
    written = path.read_bytes()
    with pytest.raises(WriteError, match=r"is there already and is not this adapter.*another path"):
        b.offload(path)
    a.restore()
    a.offload(path)  # the very same: nothing to write
    a.restore()
    with torch.no_grad():
        next(a.parameters()).add_(1)
    with pytest.raises(WriteError, match="is there already"):
        a.offload(path)
    (tmp_path / "text").write_text("mine")
    with pytest.raises(WriteError, match="is there already"):
        a.offload(tmp_path / "text")
    with pytest.raises(WriteError, match="is there already"):
        a.offload(tmp_path)
    assert (tmp_path / "text").read_text() == "mine"
    assert path.read_bytes() == written
    assert not a.offloaded
    assert not b.offloaded
    assert all(p.numel() for h in (a, b) for p in h.parameters())


def damage_nothing_there(path: Path) -> None:
    path.unlink()


def damage_cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def damage_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_another_adapter(path: Path) -> None:
    found = tether.load(path)
    path.unlink()
    tether.save(found.with_provenance(steps=99), path)


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (damage_nothing_there, NotAnAdapterError, "no such file"),
        (damage_cut_off, TruncatedFileError, "cut off"),
        (damage_one_bit, DigestError, "the file is damaged"),
        (damage_another_adapter, DigestError, "where another adapter is now"),
    ],
)
def test_a_file_that_is_not_what_was_written_leaves_the_adapter_offloaded(
    model, tmp_path, damage, error, text
):
    handle = trained(model, KINDS["anchored"])
    model(X).sum().backward()
    before, path = state(model), tmp_path / "a.safetensors"
    handle.offload(path)
    written = path.read_bytes()
    damage(path)
    for action in (handle.restore, handle.snapshot, handle.detach):
        with pytest.raises(error, match=rf"^adapter 'a' was offloaded to .*{text}") as caught:
            action()
        assert "back, then call handle.restore(); until then it stays offloaded" in str(
            caught.value
        )
    assert handle.offloaded
    assert handle.attached
    assert all_empty(handle)
    path.write_bytes(written)
    handle.restore()
    assert state(model) == before


def test_a_file_that_may_not_be_read(model, tmp_path, monkeypatch):
    handle = trained(model, KINDS["plain"])
    handle.offload(tmp_path / "a.safetensors")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", refuse)
        with pytest.raises(NotAnAdapterError, match=r"Permission denied\. Check its permissions"):
            handle.restore()
    assert handle.offloaded
    handle.restore()


OF_OS = ("open", "close", "replace", "chmod", "unlink", "fsync")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failure_at_any_call_of_the_system_leaves_the_adapter_live(tmp_path, monkeypatch, error):
    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.function = name, getattr(os, name)

        def __call__(self, *args: object, **kwargs: object) -> object:
            count.append(self.name)
            if len(count) == fail_at:
                if self.name == "close":
                    self.function(*args, **kwargs)
                raise error
            return self.function(*args, **kwargs)

    failures, fail_at = 0, 0
    while True:
        fail_at += 1
        model, count = Model(), []
        handle = trained(model, KINDS["modules"])
        model(X).sum().backward()
        before, path = state(model), tmp_path / str(fail_at) / "a.safetensors"
        path.parent.mkdir()
        with monkeypatch.context() as patch:
            for name in OF_OS:
                patch.setattr(os, name, Counted(name))
            try:
                handle.offload(path)
            except (WriteError, KeyboardInterrupt, OSError):
                failures += 1
            else:
                break
        assert not handle.offloaded
        assert handle.active
        assert state(model) == before
        handle.offload(tmp_path / str(fail_at) / "again.safetensors")
        handle.restore()
        assert state(model) == before
    assert failures >= 6
    assert handle.offloaded
    handle.restore()
    assert state(model) == before


@pytest.mark.parametrize("action", ["offload", "restore"])
def test_memory_that_runs_out_leaves_everything_as_it_was(model, monkeypatch, action):
    handle = trained(model, KINDS["anchored"])
    model(X).sum().backward()
    if action == "restore":
        handle.offload("cpu")
    before, done, to = state(model), [], Tensor.to

    def failing(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        done.append(1)
        if len(done) == 4:
            raise torch.OutOfMemoryError("out of memory")
        return to(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", failing)
        with pytest.raises(torch.OutOfMemoryError):
            getattr(handle, action)()
    assert handle.offloaded == (action == "restore")
    assert state(model) == before
    handle.restore()
    assert all(p.numel() and p.grad is not None for p in handle.parameters())


def test_what_a_file_does_not_take_stays_and_cpu_memory_takes_it(model, tmp_path):
    handle = trained(model, KINDS["plain"])
    with torch.no_grad():
        next(handle.parameters()).fill_(float("nan"))
    before = state(model)
    with pytest.raises(NonFiniteError):
        handle.offload(tmp_path / "a.safetensors")
    assert not handle.offloaded
    assert not list(tmp_path.iterdir())
    handle.offload("cpu")
    handle.restore()
    assert state(model) == before


def test_a_sharded_adapter_is_refused(model, mesh):
    handle = trained(model, KINDS["plain"])
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    with pytest.raises(
        ShardedWeightError, match=r"'embedding': A is a DTensor.*before fully_shard"
    ):
        handle.offload()
    assert not handle.offloaded


def test_switching_to_an_adapter_that_the_user_offloaded_is_refused(model, tmp_path):
    a, b = (trained(model, KINDS["plain"], name) for name in ("a", "b"))
    a.offload("cpu")
    with pytest.raises(
        OffloadedError, match=r"'a' is offloaded to cpu.*\['a'\]\.restore\(\) first"
    ):
        tether.only(model, "a", "b").__enter__()
    with pytest.raises(OffloadedError, match="'a' is offloaded"):
        a.verify(X)
    assert (a.active, b.active) == (False, True)
    with tether.only(model, "b"), a.disabled(), tether.reference(model):
        assert not b.active
    assert (a.active, b.active) == (False, True)
    a.restore()
    assert a.active


@in_every_place
def test_what_a_block_restores_reaches_an_adapter_offloaded_or_restored_in_it(
    model, tmp_path, place
):
    a = trained(model, KINDS["plain"])
    trained(model, KINDS["plain"], "b")
    with tether.only(model, "b"):
        a.offload(target(tmp_path, place))
    assert not a.active
    model(X)
    with tether.only(model, "b"):
        a.restore()
        assert not a.active
    assert a.active
    with tether.only(model, "a"):
        a.offload(target(tmp_path, place))
    a.restore()
    assert a.active
    with a.disabled():
        a.offload(target(tmp_path, place))
        a.restore()
        assert not a.active
    assert a.active


# Limits.

SIZE = 4 * 2 * (12 + 14 + 14)  # of one adapter's factors of rank 2


@pytest.fixture
def many(model) -> Model:
    """Four plain adapters; only "d" takes part."""
    for name in "abcd":
        trained(model, KINDS["plain"], name)
    for name in "abc":
        tether.handles(model)[name].record.active = False
    return model


def live(model: nn.Module) -> set[str]:
    return {name for name, handle in tether.handles(model).items() if not handle.offloaded}


def use(model: nn.Module, name: str) -> bytes:
    """Use one adapter for a while."""
    return alone(model, name)


def test_the_least_recently_used_go_first_until_the_budget_is_kept(many, tmp_path, caplog):
    expected = {name: use(many, name) for name in "badbc"}
    assert memory(many).adapters == 4 * SIZE
    assert limit(many, 4 * SIZE, tmp_path) == []
    assert caplog.messages == []
    assert limit(many, 3 * SIZE, tmp_path) == ["a"]
    assert limit(many, 3 * SIZE - 1, tmp_path) == ["b"]
    assert live(many) == {"c", "d"}
    assert memory(many).adapters == 2 * SIZE
    assert caplog.messages[0].startswith(
        "limit: adapter 'a' (up to 320 B, inactive) is offloaded to "
    )
    assert len(caplog.messages) == 2
    assert {name: use(many, name) for name in expected} == expected


def test_a_limit_stays_in_force_and_brings_back_what_is_used(many, tmp_path):
    expected = {name: use(many, name) for name in "abcd"}
    limit(many, 2 * SIZE, tmp_path)
    assert live(many) == {"c", "d"}
    for name, left in (("a", {"a", "d"}), ("b", {"b", "d"}), ("b", {"b", "d"}), ("d", {"b", "d"})):
        assert use(many, name) == expected[name]
        assert live(many) == left
        assert [h.active for h in tether.handles(many).values()] == [False, False, False, True]
    trained(many, KINDS["plain"], "e")
    assert live(many) == {"d", "e"}
    # Not only the factors: gradients count.
    handle = tether.handles(many)["e"]
    with tether.only(many, "e"):
        many(X).sum().backward()
    assert live(many) == {"d", "e"}
    limit(many, None)
    assert live(many) == {"d", "e"}
    gradients = [bits(p.grad) for p in handle.parameters()]
    for name in "abc":
        assert use(many, name) is not None
    assert live(many) == set("abcde")
    assert [bits(p.grad) for p in handle.parameters()] == gradients


def test_the_gradients_of_an_idle_adapter_count_and_come_back(many, tmp_path):
    limit(many, 4 * SIZE, tmp_path)
    with tether.only(many, "a"):
        many(X).sum().backward()
        gradients = [bits(p.grad) for p in tether.handles(many)["a"].parameters()]
        assert memory(many).adapters == 5 * SIZE
    assert live(many) == {"a", "c", "d"}
    limit(many, SIZE, tmp_path)
    assert live(many) == {"d"}
    with tether.only(many, "a"):
        assert [bits(p.grad) for p in tether.handles(many)["a"].parameters()] == gradients


def test_active_and_interrupted_adapters_are_never_offloaded(many, tmp_path, caplog):
    limit(many, 0, tmp_path)
    assert live(many) == {"d"}
    assert caplog.messages[-1] == (
        "limit: the adapters in use hold 320 B, more than the limit of 0 B; none is left to "
        "offload."
    )
    said = len(caplog.messages)
    with tether.reference(many):
        assert live(many) == {"d"}
        with tether.only(many, "b"):
            assert live(many) == {"b", "d"}
        assert live(many) == {"d"}
    with tether.handles(many)["d"].disabled():
        assert live(many) == {"d"}
    # Once more than one was in use, and "b" went again.
    assert [m for m in caplog.messages[said:] if "640 B" in m] == [caplog.messages[said]]
    assert tether.handles(many)["d"].record.pins == 0


def test_what_the_user_offloaded_a_limit_does_not_bring_back(many, tmp_path):
    a = tether.handles(many)["a"]
    limit(many, 0, tmp_path)
    path = a.record.parked.path
    a.offload(path)
    with pytest.raises(OffloadedError, match="'a' is offloaded"):
        use(many, "a")
    a.restore()
    with pytest.raises(OffloadedError, match="'b' is offloaded"), tether.only(many.up, "b"):
        pass  # the limit is on the whole model, not on its part


def test_each_state_of_an_adapter_has_a_file_of_its_own(many, tmp_path):
    other = copy.deepcopy(many)
    handles = [tether.handles(m)["a"] for m in (many, other)]
    with torch.no_grad():
        next(handles[1].parameters()).add_(1)
    expected = [values(handle.snapshot()) for handle in handles]
    for run in (many, other):
        limit(run, 0, tmp_path)
    # "a" differs between the two, "b" and "c" do not.
    assert sorted(p.name.partition("-")[0] for p in tmp_path.iterdir()) == ["a", "a", "b", "c"]
    for handle in handles:
        handle.restore()
    assert [values(handle.snapshot()) for handle in handles] == expected


def test_a_copy_has_its_own_limit(many, tmp_path):
    limit(many, 0, tmp_path)
    other = pickle.loads(pickle.dumps(copy.deepcopy(many)))
    limit(many, None)
    assert use(other, "a") == use(many, "a")
    assert live(other) == {"d"}
    assert live(many) == {"a", "d"}


def test_an_adapter_that_cannot_be_written_stays_and_the_log_says_why(
    many, tmp_path, monkeypatch, caplog
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with torch.no_grad():
        next(tether.handles(many)["b"].parameters()).fill_(float("inf"))
    with monkeypatch.context() as patch:
        patch.setattr(fs, "_sync", full)
        assert limit(many, 0, tmp_path) == []
    assert live(many) == set("abcd")
    assert "limit: adapter 'a' stays on the model: " in caplog.messages[0]
    assert "No space left" in caplog.messages[0]
    assert limit(many, 0, tmp_path) == ["a", "c"]


def test_a_limit_in_a_wrapper_and_two_models_in_one(many, tmp_path):
    limit(many, 0, tmp_path)
    other = Model()
    trained(other, KINDS["plain"], "z")
    tether.handles(other)["z"].record.active = False
    limit(other, 0, tmp_path)
    both = nn.ModuleList([many, other])
    with tether.only(both, "a", "z"):
        assert (live(many), live(other)) == ({"a", "d"}, {"z"})
    assert (live(many), live(other)) == ({"d"}, set())
    compiled = torch.compile(many, backend="eager")
    limit(compiled, 3 * SIZE, tmp_path)
    use(compiled, "b")
    assert live(many) == {"b", "d"}
    assert len([m for m in many.modules() if "_tether_budget" in vars(m)]) == 1


def test_cpu_memory_frees_nothing_on_the_cpu(many, monkeypatch, caplog):
    with pytest.raises(ConfigError, match=r"model is on the CPU.*Give a folder: to="):
        limit(many, 0)
    monkeypatch.setattr(offload, "_on_cpu", lambda *_: False)  # as on an accelerator
    expected = use(many, "a")
    assert limit(many, 0) == ["b", "c", "a"]
    assert memory(many).offloaded == 3 * SIZE
    assert "is offloaded to cpu; switching to it brings it back" in caplog.text
    with tether.only(many, "a"):
        assert live(many) == {"a", "d"}
        assert bits(many(X)) == expected
    assert live(many) == {"d"}
    monkeypatch.undo()  # the model was moved to the CPU
    assert use(many, "a") == expected
    assert live(many) == {"a", "d"}


@pytest.mark.parametrize("value", [-1, 1.5, "1 GB", True])
def test_a_limit_is_a_number_of_bytes(many, tmp_path, value):
    with pytest.raises(ConfigError, match="whole number of bytes"):
        limit(many, value, tmp_path)
    assert live(many) == set("abcd")


def test_a_limit_before_any_adapter(model, tmp_path):
    assert limit(model, 0, tmp_path / "new") == []
    for name in "ab":
        trained(model, KINDS["plain"], name)
    assert live(model) == {"a", "b"}
    tether.handles(model)["a"].record.active = False
    use(model, "b")
    assert live(model) == {"b"}
    assert [p.name[:2] for p in (tmp_path / "new").iterdir()] == ["a-"]


def test_bringing_back_is_logged_too(many, tmp_path, caplog):
    caplog.set_level(logging.INFO, "tether")
    limit(many, 0, tmp_path)
    use(many, "a")
    assert "limit: adapter 'a' is back on the model." in caplog.messages


def test_the_file_is_an_ordinary_native_file(model, tmp_path):
    handle = trained(model, KINDS["dora"])
    handle.offload(tmp_path / "a.safetensors")
    assert values(tether.load(tmp_path / "a.safetensors")) == values(handle.snapshot())


def test_a_number_that_a_file_gives_back_as_another_type_is_no_change(model, tmp_path):
    handle = trained(model, KINDS["plain"])
    handle.annotate(learning_rate=3)
    expected = values(handle.snapshot())
    for _ in range(2):
        handle.offload(tmp_path / "a.safetensors")
        assert handle.snapshot().provenance.learning_rate == 3
        handle.restore()
    assert values(handle.snapshot()) == expected
