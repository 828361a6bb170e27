"""Slots: adapters swapped in place, into compiled code too."""

import copy
import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tether
from laws.cases import bits, factors_of, truth
from tether import LoraConfig
from tether.errors import (
    BaseMismatchError,
    ConfigError,
    DetachedError,
    MergedError,
    NonFiniteError,
    OffloadedError,
    ShapeMismatchError,
    ShardedWeightError,
    UnknownNameError,
)
from tether.layers import SiteLayer
from tether.merge import merge, unmerge
from tether.swap import slot, swap

X = torch.linspace(-1, 1, 24).view(4, 6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


@pytest.fixture
def model() -> Model:
    return Model().eval()


def trained(model: nn.Module, seed: int = 0, std: float = 0.3, **settings: object):
    """A trained adapter for the model, which has none."""
    adapted = copy.deepcopy(model)
    for handle in tether.handles(adapted).values():
        handle.detach()
    handle = tether.attach(adapted, LoraConfig(**{"rank": 2} | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return handle.detach()


def several(model: nn.Module) -> list[tether.Adapter]:
    """Of different methods, ranks, scalings and sites."""
    return [
        trained(model, 0),
        trained(model, 1, init="lora", rank=5, alpha=40),
        trained(model, 2, init="olora", rank=1, alpha=0.25, target_modules="down"),
        trained(model, 3, init="lora", rank=3, use_rslora=True, dropout=0.5),
    ]


def eager(model: nn.Module, adapter: tether.Adapter, x: Tensor = X) -> Tensor:
    """What the model gives with the adapter attached and nothing else."""
    copied = copy.deepcopy(model)
    for handle in tether.handles(copied).values():
        handle.detach()
    tether.attach(copied, adapter)
    with torch.no_grad():
        return copied.eval()(x)


@pytest.fixture
def counted() -> Iterator[tuple[list[int], object]]:
    """A backend that counts what it compiles."""
    torch.compiler.reset()
    compiled: list[int] = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    yield compiled, backend
    torch.compiler.reset()


@pytest.mark.parametrize("when", ["before", "after"])
def test_swapping_compiles_nothing_anew(model, counted, when):
    compilations, backend = counted
    adapters = several(model)
    place = slot(model, adapters[0], rank=6) if when == "before" else None
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        if place is None:
            compiled(X)
            assert compilations.pop()
            place = slot(compiled, adapters[0], rank=6)
        first = compiled(X)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for adapter in adapters[1:] + adapters:
                swap(place, adapter)
                check_close(compiled(X), exact(model, adapter))
        check_close(first, exact(model, adapters[0]))
    assert len(compilations) == 1
    outputs = [exact(model, adapter) for adapter in adapters]
    assert all((outputs[0] - other).norm() > 0.1 for other in outputs[1:])


@torch.no_grad()
def exact(model: nn.Module, adapter: tether.Adapter) -> Tensor:
    """The output in float64 (attaching would reset the compiler and hide a compilation)."""
    changes = {path: truth(layer) for path, layer in adapter.layers.items()}
    up = model.up.weight + changes.get("up", 0.0)
    down = model.down.weight + changes.get("down", 0.0)
    hidden = (X.double() @ up.double().T + model.up.bias).relu()
    return hidden @ down.double().T + model.down.bias


def check_close(found: Tensor, wanted: Tensor) -> None:
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6


def test_a_compiled_llama_serves_several_adapters(tiny_llama):
    torch.compiler.reset()
    model = tiny_llama(tie_word_embeddings=False, num_hidden_layers=1).eval()
    targets = ["embed_tokens", "q_proj", "down_proj", "lm_head"]
    adapters = [
        trained(model, 0, std=0.1, target_modules=targets),
        trained(model, 1, std=0.1, init="lora", rank=3, alpha=9, target_modules=targets[:2]),
    ]
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        base = model(ids).logits
        wanted = []
        for adapter in adapters:
            handle = tether.attach(model, adapter)
            wanted.append(model(ids).logits)
            handle.detach()
        place = slot(model, rank=4, target_modules=targets)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert bits(compiled(ids).logits) == bits(base)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for adapter, logits in [*zip(adapters, wanted, strict=True)] * 2:
                swap(place, adapter)
                torch.testing.assert_close(compiled(ids).logits, logits, rtol=0, atol=2e-6)
                assert float((logits - base).abs().max()) > 0.01
    torch.compiler.reset()


def test_an_empty_slot_is_the_base(model):
    base = bits(model(X))
    place = slot(model, rank=3)
    assert bits(model(X)) == base
    assert place.sites == ("up", "down")
    assert not [p for p in place.parameters() if p.requires_grad]
    assert all(p.requires_grad for p in (model.up.weight, model.down.bias))
    assert {(p.shape, p.is_contiguous()) for p in place.parameters()} == {
        (shape, True) for shape in [(3, 6), (8, 3), (3, 8), (6, 3)]
    }
    assert slot(model, rank=1, target_modules="down", name="other").sites == ("down",)


def test_a_slot_keeps_its_objects_and_returns_what_was_there(model):
    first, second = several(model)[:2]
    place = slot(model, first, rank=6)
    kept = [(id(p), p.data_ptr()) for p in place.parameters()]
    assert place.snapshot().provenance == first.provenance
    previous = swap(place, second)
    assert [(id(p), p.data_ptr()) for p in place.parameters()] == kept
    assert (place.snapshot().provenance, place.snapshot().config) == (
        second.provenance,
        dict(second.config),
    )
    for adapter, found in ((first, previous), (second, place.snapshot())):
        for path, layer in adapter.layers.items():
            there = found.layers[path]
            assert (there.rank, there.scaling, there.anchor) == (6, 1.0, None)
            torch.testing.assert_close(truth(there), truth(layer), rtol=1e-5, atol=1e-7)
    swap(place, previous)
    assert {n: bits(t) for n, t in factors_of(place.snapshot()).items()} == {
        n: bits(t) for n, t in factors_of(previous).items()
    }
    assert bits(eager(model, previous)) == bits(model(X))


def test_a_site_that_the_adapter_lacks_is_zero(model):
    both, down = trained(model, 0), trained(model, 1, target_modules="down")
    place = slot(model, both, rank=4)
    swap(place, down)
    layer = place.snapshot().layers["up"]
    assert not layer.trainable.A.any()
    assert not layer.trainable.B.any()
    torch.testing.assert_close(model(X), eager(model, down), rtol=0, atol=1e-6)


def test_small_changes_survive_a_slot_in_half_precision(model):
    adapter = trained(model, std=1e-6, alpha=3)
    place = slot(model, adapter, rank=4, dtype=torch.float16)
    for path, layer in place.snapshot().layers.items():
        wanted = truth(adapter.layers[path])
        assert float((truth(layer) - wanted).norm() / wanted.norm()) < 1e-3
    # As they stand they would be lost.
    lost = adapter.layers["up"].trainable.A.half().double() - adapter.layers["up"].trainable.A
    assert float(lost.norm() / adapter.layers["up"].trainable.A.norm()) > 0.01


def other_base(model: nn.Module) -> tether.Adapter:
    other = copy.deepcopy(model)
    other.down.weight.data[0, 0] += 1
    return trained(other)


def wider(model: nn.Module) -> tether.Adapter:
    return trained(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(9, 6)}))


def more_sites(model: nn.Module) -> tether.Adapter:
    return trained(nn.ModuleDict({"up": nn.Linear(6, 8), "downs": nn.Linear(8, 6)}))


def huge(model: nn.Module) -> tether.Adapter:
    adapter = trained(model, init="lora")
    adapter.layers["down"].trainable.B.fill_(torch.inf)
    return adapter


REFUSED = [
    (
        lambda m: trained(m, rank=3),
        ConfigError,
        r"site 'up': the adapter needs rank 6 \(rank 3, anchored\), slot 'slot' has 5. Make the "
        r"slot with rank=6, or reduce the adapter with tether.to_lora\(adapter, rank=5\)",
    ),
    (lambda m: trained(m, init="lora", rank=6), ConfigError, "needs rank 6, slot 'slot' has 5"),
    (lambda m: trained(m, use_dora=True), ConfigError, "site 'up': the adapter has DoRA"),
    (lambda m: trained(m, bias="all"), ConfigError, "up.bias: the adapter trains it whole"),
    (
        lambda m: trained(m, target_modules="up", modules_to_save=["down"]),
        ConfigError,
        "down.weight: the adapter trains it whole",
    ),
    (more_sites, UnknownNameError, "site 'downs': slot 'slot' does not have it.*'down'"),
    (
        wider,
        ShapeMismatchError,
        r"site 'down': the slot's weight is linear \(6, 8\), the adapter's linear \(6, 9\)",
    ),
    (other_base, BaseMismatchError, "site 'down': the base weight here"),
    (huge, NonFiniteError, "site 'down': factor B in torch.float32"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_an_adapter_that_does_not_fit_changes_nothing(model, make, error, message):
    place = slot(model, trained(model), rank=5)
    provenance, before = place.record.provenance, bits(model(X))
    with pytest.raises(error, match=message):
        swap(place, make(model))
    assert place.record.provenance is provenance
    assert bits(model(X)) == before


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_a_slot_that_does_not_fit_is_not_attached(model, make, error, message):
    if error in (UnknownNameError, ShapeMismatchError):
        message = "up|down"
    with pytest.raises(error, match=message):
        slot(model, make(model), rank=5, target_modules="all-linear")
    assert not tether.handles(model)


def test_verification_can_be_waived(model):
    place = slot(model, rank=4)
    swap(place, other_base(model), verify=False)
    assert place.snapshot().layers["down"].trainable.B.any()


def test_a_base_that_was_hashed_before_is_hashed_again_when_it_was_written(model, monkeypatch):
    adapter, place = trained(model), slot(model, rank=4)
    hashed: list[Tensor] = []
    module = importlib.import_module("tether.swap")  # not the function of that name
    original = module.fingerprint_tensor
    monkeypatch.setattr(module, "fingerprint_tensor", lambda t: hashed.append(t) or original(t))
    for _ in range(3):
        swap(place, adapter)
    assert len(hashed) == 2
    with torch.no_grad():
        model.down.weight[0, 0] += 1
    with pytest.raises(BaseMismatchError, match="'down'"):
        swap(place, adapter)
    model.down.weight.data = model.down.weight.data.clone()
    with pytest.raises(BaseMismatchError, match="'down'"):
        swap(place, adapter)
    assert len(hashed) == 4


@pytest.mark.parametrize(
    "settings",
    [{}, {"init": "lora"}, {"init": "lora", "use_dora": True}, {"modules_to_save": ["down"]}],
)
@pytest.mark.parametrize("trainable", [True, False])
def test_what_is_no_slot_is_refused(model, settings, trainable):
    adapter = trained(model, target_modules="up", alpha=4, **settings)
    handle = tether.attach(model, adapter, "mine", trainable=trainable)
    with pytest.raises(ConfigError, match=r"adapter 'mine' is no slot: at '(up|down)'"):
        swap(handle, trained(model))


@pytest.mark.parametrize("state", ["merged", "offloaded", "detached", "left out"])
def test_a_slot_that_is_not_live_is_refused(model, state):
    first, second = trained(model, 0), trained(model, 1)
    place = slot(model, first, rank=4)
    before = bits(model(X))
    if state in ("merged", "left out"):
        merge(model, "slot")
        if state == "left out":
            with tether.reference(model), pytest.raises(MergedError, match="left out"):
                swap(place, second)
        with pytest.raises(MergedError, match="slot 'slot' is merged"):
            swap(place, second)
        unmerge(model, "slot")
    elif state == "offloaded":
        place.offload()
        with pytest.raises(OffloadedError, match="slot 'slot' is offloaded"):
            swap(place, second)
        place.restore()
    else:
        adapter = place.detach()
        with pytest.raises(DetachedError, match="'slot'"):
            swap(place, second)
        tether.attach(model, adapter, "slot", trainable=False)
    assert bits(model(X)) == before


def test_the_bases_own_weights_are_checked_where_another_adapter_is_merged(model):
    adapter = trained(model, 1)
    place = slot(model, rank=4)
    tether.attach(model, trained(model, 0), "other", trainable=False)
    merge(model, "other")
    swap(place, adapter)
    unmerge(model, "other")
    with tether.only(model, "slot"):
        torch.testing.assert_close(model(X), eager(model, adapter), rtol=0, atol=1e-6)


def test_a_sharded_slot_is_refused(model, mesh):
    adapter = trained(model)
    place = slot(model, adapter, rank=4)
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    with pytest.raises(ShardedWeightError, match="site 'up': the slot's factors are a DTensor"):
        swap(place, adapter)


def test_a_copy_that_fails_halfway_is_undone(model, monkeypatch):
    first, second = trained(model, 0), trained(model, 1)
    place = slot(model, first, rank=4)
    before = bits(model(X))
    original, calls = torch.Tensor.copy_, []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    layers = [m for m in model.modules() if isinstance(m, SiteLayer)]
    assert len(layers) == 2
    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(KeyboardInterrupt):
        swap(place, second)
    monkeypatch.undo()
    assert bits(model(X)) == before


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, None])
def test_a_rank_that_is_none_is_refused(model, rank):
    with pytest.raises(ConfigError, match=r"slot: rank .* must be a whole number, at least 1"):
        slot(model, rank=rank)


def test_a_slot_of_a_larger_rank_than_the_weight(model):
    adapter = trained(model, 0, rank=6)
    slot(model, adapter, rank=16)
    torch.testing.assert_close(model(X), eager(model, adapter), rtol=0, atol=2e-6)
