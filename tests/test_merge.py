"""merge and unmerge: the change in the weights, and the very same base afterwards."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import tether
from laws.cases import bits, factors_of, state_of, truth
from tether import LoraConfig
from tether.errors import (
    ConfigError,
    MergedError,
    MetaTensorError,
    NonFiniteError,
    OffloadedError,
    ShardedWeightError,
    TiedWeightError,
    UnknownNameError,
    UnsupportedModuleError,
)
from tether.merge import merge, unmerge
from tether.rows import rows
from tether.switch import activate

X = torch.linspace(-1, 1, 24).view(4, 6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.down = nn.Linear(8, 6, bias=False)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.norm(self.up(x)).relu()))


@pytest.fixture
def model() -> Model:
    return Model()


def moved(model: nn.Module, name: str = "a", std: float = 0.1, **settings: object) -> tether.Handle:
    settings = {"rank": 2, "alpha": 3, "target_modules": ["up", "down"]} | settings
    handle = tether.attach(model, LoraConfig(**settings), name)
    generator = torch.Generator().manual_seed(len(tether.handles(model)))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return handle


def base_state(model: nn.Module) -> dict[str, object]:
    """All that merging must bring back; without the random state and the adapters' own."""
    return {k: v for k, v in state_of(model).items() if k != "random"}


def values(adapter: tether.Adapter) -> dict[str, bytes]:
    """Every number of an adapter, exactly."""
    found = factors_of(adapter)
    for name, value in adapter.trained_whole:
        found |= {f"{name} trainable": value.trainable, f"{name} anchor": value.anchor}
    return {name: bits(tensor) for name, tensor in found.items()}


def objects(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    return {n: (id(p), p.data_ptr(), p._version) for n, p in model.named_parameters()}


MODULES = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(4, 6)),
    "conv1d-of-transformers": (lambda: Conv1D(5, 6), lambda: torch.randn(4, 6)),
    "embedding": (lambda: nn.Embedding(9, 6, padding_idx=1), lambda: torch.arange(9)),
    "embedding-scaled": (
        lambda: Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=6**0.5),
        lambda: torch.arange(9),
    ),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), lambda: torch.randn(2, 3, 9)),
    "conv2d-dilation": (lambda: nn.Conv2d(3, 4, 2, dilation=2), lambda: torch.randn(2, 3, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), lambda: torch.randn(1, 2, 4, 5, 6)),
}
KINDS = {"anchored": {}, "plain": {"init": "lora"}, "dora": {"use_dora": True}}


def exact(handle: tether.Handle, weight: Tensor, w: float = 1.0) -> Tensor:
    """W + w·(W' − W) in float64, by the definition."""
    (layer,) = handle.snapshot().layers.values()
    start = weight.detach().double()
    end = start + layer.layout.stored(truth(layer))
    if layer.magnitude is not None:
        matrix = layer.layout.matrix(end)
        lengths = layer.magnitude.current.double() / matrix.norm(dim=1)
        end = layer.layout.stored(lengths[:, None] * matrix)
    return start + w * (end - start)


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODULES)
def test_the_weight_is_w_plus_the_change_and_comes_back(name, kind, weight):
    make, batch = MODULES[name]
    model, x = nn.ModuleDict({"site": make()}), batch()
    base = model["site"](x).detach()
    handle = moved(model, target_modules="site", **KINDS[kind])
    activate(model, "a", weights=[weight])
    live, before, ids = model["site"](x).detach(), base_state(model), objects(model)
    original = model["site"].weight
    wanted = exact(handle, original, weight)

    merge(model, "a")
    assert (handle.merged, handle.active, handle.weight) == (True, True, weight)
    found = model["site"].weight
    assert not found.requires_grad  # as the base's while an adapter trains
    assert found.stride() == original.stride()
    error = (found.double() - wanted).norm() / (wanted - original.detach().double()).norm()
    assert float(error.detach()) < 1e-6
    merged = model["site"](x).detach()
    assert float((merged - base).abs().max()) > 0.01
    torch.testing.assert_close(merged, live, rtol=1e-4, atol=1e-5)

    unmerge(model, "a")
    assert model["site"].weight is original
    assert objects(model) == ids
    assert base_state(model) == before
    assert bits(model["site"](x)) == bits(live)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_computed_wide_and_rounded_once(kind, dtype):
    """Also where base and factors are both in half precision."""
    model = nn.ModuleDict({"site": nn.Linear(48, 32).to(dtype)})
    start = tether.init(model, LoraConfig(rank=4, target_modules="site", **KINDS[kind]))
    handle = tether.attach(model, start, "a", dtype=dtype)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            parameter += (0.1 if name.endswith("dm") else 0.5) * torch.randn_like(parameter)
    wanted = exact(handle, model["site"].weight)
    merge(model, "a")
    found = model["site"].weight.detach()
    assert found.dtype == dtype
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # DoRA's lengths start from float32 ones.
    rounding = 32 * (max(wide, 1e-7) if kind == "dora" else wide) * float(wanted.abs().max())
    unit = torch.finfo(dtype).eps / 2 * wanted.abs() + torch.finfo(dtype).smallest_normal
    assert ((found.double() - wanted).abs() <= unit + rounding).all()


@pytest.mark.parametrize("method", ["pissa", "lora"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_change_of_zero_leaves_every_bit(method, use_dora):
    model = nn.ModuleDict({"site": nn.Linear(6, 5)})
    with torch.no_grad():
        model["site"].weight[::2, ::2] = -0.0
    tether.attach(model, LoraConfig(method, rank=2, use_dora=use_dora, target_modules="site"), "a")
    before = model["site"].weight
    merge(model, "a")
    assert model["site"].weight is not before
    assert bits(model["site"].weight) == bits(before)


def test_biases_and_modules_trained_whole_are_merged_too(model):
    handle = moved(model, bias="all", modules_to_save=["head"])
    live, adapter = model(X).detach(), handle.snapshot()
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    before, ids = base_state(model), objects(model)
    merge(model, "a")
    for name, value in adapter.trained_whole:
        wanted = start[name] + value.trainable.double()
        assert float(value.trainable.abs().max()) > 0.01
        torch.testing.assert_close(model.get_parameter(name).double(), wanted, rtol=0, atol=2e-7)
    assert {"up.bias", "norm.bias", "head.0.weight", "head.2.bias"} <= {
        name for name, _ in adapter.trained_whole
    }
    torch.testing.assert_close(model(X), live, rtol=1e-4, atol=1e-5)
    again = handle.snapshot()
    for (name, one), (other, two) in zip(adapter.trained_whole, again.trained_whole, strict=True):
        assert name == other
        assert bits(one.anchor) == bits(two.anchor)
    unmerge(model, "a")
    assert (base_state(model), objects(model)) == (before, ids)
    assert bits(model(X)) == bits(live)


def test_a_merged_adapter_costs_no_hook_work_and_keeps_the_keys(model):
    handle = moved(model)
    keys = list(model.state_dict())
    calls: list[str] = []
    layer = model.up.tether["a"]
    layer.register_forward_hook(lambda *_: calls.append("up"))
    merge(model, "a")
    model(X)
    assert calls == []
    assert list(model.state_dict()) == keys
    with handle.disabled(), tether.only(model, "a"):
        model(X)
    assert calls == ["up"]


def blocks(model: nn.Module, handle: tether.Handle) -> dict[str, Callable]:
    return {
        "reference": lambda: tether.reference(model),
        "only": lambda: tether.only(model),
        "disabled": handle.disabled,
        "rows": lambda: rows(model, [None] * 4),
    }


@pytest.mark.parametrize("kind", ["reference", "only", "disabled", "rows"])
def test_blocks_leave_a_merged_adapter_out_exactly(model, kind):
    base = bits(model(X))
    handle = moved(model, bias="all", modules_to_save=["head"])
    merge(model, "a")
    merged, inside = model(X), objects(model)
    block = blocks(model, handle)[kind]
    with block():
        assert bits(model(X)) == base
        assert not handle.merged
        with tether.reference(model):
            assert bits(model(X)) == base
    with pytest.raises(KeyError), block():
        raise KeyError
    assert handle.merged
    assert objects(model) == inside
    assert bits(model(X)) == bits(merged)
    unmerge(model, "a")
    with tether.reference(model):
        assert bits(model(X)) == base


def test_only_keeps_merged_weights_just_where_they_are_what_is_meant(model):
    a, b = moved(model, "a"), moved(model, "b")
    outputs = {}
    for names, weights in (("a", [1]), ("a", [0.5]), ("b", [1]), ("ab", [1, 1])):
        with tether.only(model, *names, weights=weights):
            outputs[names, weights[0]] = bits(model(X))
    activate(model, "a")
    merge(model, "a")
    merged = bits(model(X))
    with tether.only(model, "a"):
        assert (a.merged, bits(model(X))) == (True, merged)
    for (names, weight), wanted in outputs.items():
        if (names, weight) != ("a", 1):
            with tether.only(model, *names, weights=[weight] * len(names)):
                assert not a.merged
                assert bits(model(X)) == wanted
    with rows(model, ["a", "b", None, "a"]):
        found = model(X)
    unmerge(model, "a")
    with rows(model, ["a", "b", None, "a"]):
        assert bits(model(X)) == bits(found)
    assert (a.active, b.active) == (True, False)


@pytest.mark.parametrize("order", ["aab", "aba", "bab", "bba"])
def test_several_are_merged_and_unmerged_in_any_order(model, order):
    handles = {name: moved(model, name, use_dora=name == "c") for name in "abc"}
    live, before, ids = model(X).detach(), base_state(model), objects(model)
    activate(model, *"ab")
    only_b = copy.deepcopy(model)
    merge(only_b, "b")
    for name in order[0], "b" if order[0] == "a" else "a":
        merge(model, name)
    both = bits(model.up.weight)
    other = copy.deepcopy(model)
    for name in "ab":
        unmerge(other, name)
    for name in "ba":  # the order of merging does not matter
        merge(other, name)
    assert bits(other.up.weight) == both
    sum_of = sum(truth(handles[n].snapshot().layers["up"]) for n in "ab")
    start = dict(other.up.named_buffers(recurse=False))["_tether_base_weight"]
    torch.testing.assert_close(model.up.weight.double(), start + sum_of, rtol=1e-6, atol=1e-6)
    first, second = order[1:]
    unmerge(model, first)
    if first == "a":
        assert bits(model.up.weight) == bits(only_b.up.weight)
    unmerge(model, second)
    activate(model, *"abc")
    assert (base_state(model), objects(model)) == (before, ids)
    assert bits(model(X)) == bits(live)


def test_another_adapter_may_be_live_on_merged_weights_unless_it_has_dora(model):
    moved(model, "a"), moved(model, "b")
    wanted = model(X)
    merge(model, "a")
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)
    unmerge(model, "a")
    tether.handles(model)["b"].detach()
    c = moved(model, "c", use_dora=True)
    with pytest.raises(MergedError, match=r"site 'up': adapter 'c' has DoRA.*'a' is merged"):
        merge(model, "a")
    wanted = model(X)
    merge(model, "c")
    merge(model, "a")
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(MergedError, match="'c' has DoRA"):
        unmerge(model, "c")
    assert c.merged
    unmerge(model, "a")
    unmerge(model, "c")
    assert bits(model(X)) == bits(wanted)


def test_training_goes_on_through_reference_blocks_on_merged_weights():
    """Autograd keeps the weights that it computed with, whatever is exchanged meanwhile.

    A convolution saves its weight itself: were only the data exchanged, it would be the wrong one.
    """
    model, x = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 3, 3)), torch.randn(2, 3, 9)
    moved(model, "a", target_modules=["0", "1"])
    b = moved(model, "b", target_modules="0")
    merge(model, "a")
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in b.parameters()]
    model.zero_grad()
    loss = model(x).square().sum()
    with tether.reference(model):
        model(x)
        loss.backward()
    for parameter, gradient in zip(b.parameters(), wanted, strict=True):
        assert gradient.any()
        assert bits(parameter.grad) == bits(gradient)


def test_snapshots_and_files_are_those_of_the_live_adapter(model, tmp_path):
    handle = moved(model, bias="all", modules_to_save=["head"])
    before = values(handle.snapshot())
    merge(model, "a")
    handle.save(tmp_path / "merged.safetensors")
    with tether.reference(model):
        inside = handle.snapshot()
    found = [handle.snapshot(), inside, tether.load(tmp_path / "merged.safetensors")]
    assert "head.2.weight anchor" in before
    assert [values(adapter) for adapter in found] == [before] * 3


def test_detaching_unmerges_first(model):
    base, fresh = base_state(model), model(X).detach()
    handle = moved(model, bias="all", modules_to_save=["head"])
    before = values(handle.snapshot())
    merge(model, "a")
    adapter = handle.detach()
    assert values(adapter) == before
    assert base_state(model) == base
    assert bits(model(X)) == bits(fresh)


def test_a_deep_copy_unmerges_by_itself(model):
    base = bits(model.up.weight)
    moved(model)
    merge(model, "a")
    copied = copy.deepcopy(model)
    unmerge(model, "a")
    assert tether.handles(copied)["a"].merged
    assert bits(copied.up.weight) != base
    with tether.reference(copied), tether.reference(model):
        assert bits(copied(X)) == bits(model(X))
    unmerge(copied, "a")
    assert bits(copied.up.weight) == bits(model.up.weight) == base
    assert copied.up.weight is not model.up.weight
    assert copied.up.weight.data_ptr() != model.up.weight.data_ptr()
    tether.handles(copied)["a"].detach()
    assert all(p.requires_grad for p in copied.parameters())


def test_a_merged_model_moves_as_a_whole(model):
    moved(model)
    expected = copy.deepcopy(model).to(torch.bfloat16)
    original = model.up.weight
    merge(model, "a")
    model.to(torch.bfloat16)
    with tether.reference(model), tether.reference(expected):
        assert bits(model(X.bfloat16())) == bits(expected(X.bfloat16()))
    unmerge(model, "a")
    assert model.up.weight is original
    assert bits(model.up.weight) == bits(expected.up.weight)
    tether.handles(model)["a"].detach()
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_saved_whole_comes_back_merged(model, tmp_path):
    moved(model)
    base = bits(model.up.weight)
    merge(model, "a")
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert bits(loaded(X)) == bits(model(X))
    unmerge(loaded, "a")
    assert bits(loaded.up.weight) == base


def test_a_compiled_model_follows(model):
    torch.compiler.reset()
    moved(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    live = bits(compiled(X))
    merge(compiled, "a")
    assert bits(compiled(X)) == bits(model(X)) != live
    with tether.reference(compiled):
        assert bits(compiled(X)) == bits(model(X))
    unmerge(compiled, "a")
    assert bits(compiled(X)) == live
    torch.compiler.reset()


def test_a_merged_slice_of_one_buffer_leaves_its_neighbours(model):
    flat = torch.randn(48 + 48)
    model.up.weight.data, model.down.weight.data = flat[:48].view(8, 6), flat[48:].view(6, 8)
    before = flat.clone()
    moved(model, target_modules="up")
    merge(model, "a")
    assert torch.equal(flat, before)
    assert torch.equal(model.down.weight.flatten(), before[48:])


def test_a_module_used_twice_is_one_module():
    site = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": site, "two": site})
    moved(model, target_modules="one")
    x = torch.randn(2, 4)
    live = model["two"](model["one"](x))
    merge(model, "a")
    torch.testing.assert_close(model["two"](model["one"](x)), live)


def tie(model: Model) -> None:
    model.extra = nn.Linear(6, 8)
    model.extra.weight = model.up.weight


def tie_by_storage(model: Model) -> None:
    model.extra = nn.Linear(6, 4)
    model.extra.weight.data = model.up.weight.data[2:6]


def offload(model: Model) -> None:
    tether.handles(model)["a"].offload()


def quantise(model: Model) -> None:
    model.down.weight = nn.Parameter(model.down.weight.to(torch.int8), requires_grad=False)


def parametrize(model: Model) -> None:
    parametrizations.weight_norm(model.down)


def to_meta(model: Model) -> None:
    model.down.weight = nn.Parameter(model.down.weight.to("meta"))


def overflow(model: Model) -> None:
    with torch.no_grad():
        model.down.tether["a"].dB.fill_(3e38)
        model.down.tether["a"].anchor.A0.fill_(2)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (tie, TiedWeightError, r"site 'up': weight is also extra.weight: merging would change"),
        (tie_by_storage, TiedWeightError, r"site 'up': weight is also extra.weight"),
        (offload, OffloadedError, "'a' is offloaded to cpu"),
        (quantise, UnsupportedModuleError, r"site 'down': weight of dtype torch.int8"),
        (parametrize, UnsupportedModuleError, "site 'down': weight is no parameter of its"),
        (to_meta, MetaTensorError, r"site 'down': weight \(6, 8\) is on the meta device"),
        (overflow, NonFiniteError, r"merged weight \(6, 8\) in torch.float32"),
        (activate, ConfigError, "'a' does not take part"),
        (lambda model: merge(model, "a"), MergedError, "'a' is merged already"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_changes(model, spoil, error, message):
    moved(model)
    spoil(model)
    weight = model.up.weight
    before = objects(model)
    with pytest.raises(error, match=message):
        merge(model, "a")
    assert model.up.weight is weight
    assert objects(model) == before


def test_a_tensor_of_a_library_is_refused(model):
    class Packed(Tensor):
        pass

    moved(model)
    model.up.weight = nn.Parameter(model.up.weight.detach().as_subclass(Packed))
    with pytest.raises(UnsupportedModuleError, match=r"site 'up': weight is a Packed, not a plain"):
        merge(model, "a")


def test_a_sharded_model_is_refused_also_afterwards(model, mesh):
    moved(model, target_modules="up")
    merge(model, "a")
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    for act in (lambda: unmerge(model, "a"), lambda: tether.reference(model).__enter__()):
        with pytest.raises(ShardedWeightError, match=r"merged before fully_shard"):
            act()
    assert tether.handles(model)["a"].merged
    sharded = Model()
    moved(sharded)
    torch.distributed.fsdp.fully_shard(sharded, mesh=mesh)
    with pytest.raises(ShardedWeightError, match=r"site 'up': weight \(8, 6\) is a DTensor"):
        merge(sharded, "a")


@pytest.mark.parametrize(
    "act",
    [
        lambda model, handle: tether.init(model),
        lambda model, handle: tether.attach(model, LoraConfig(rank=2), "new"),
        lambda model, handle: activate(model, "a"),
        lambda model, handle: handle.offload(),
        lambda model, handle: unmerge(model, "b"),
    ],
    ids=["init", "attach", "activate", "offload", "unmerge another"],
)
def test_what_a_merged_model_refuses(model, act):
    handle = moved(model, "a")
    moved(model, "b")
    merge(model, "a")
    before, output = objects(model), bits(model(X))
    with pytest.raises(MergedError, match="merged"):
        act(model, handle)
    assert list(tether.handles(model)) == ["a", "b"]
    assert (objects(model), bits(model(X))) == (before, output)


@pytest.mark.parametrize(
    "act",
    [
        lambda model, handle: merge(model, "b"),
        lambda model, handle: unmerge(model, "a"),
        lambda model, handle: handle.detach(),
        lambda model, handle: activate(model, "b"),
        lambda model, handle: tether.attach(model, LoraConfig(rank=2), "new"),
    ],
    ids=["merge", "unmerge", "detach", "activate", "attach"],
)
def test_what_a_block_without_merged_weights_refuses(model, act):
    handle = moved(model, "a")
    moved(model, "b")
    merge(model, "a")
    output = bits(model(X))
    with tether.only(model, "b"), pytest.raises(MergedError, match="outside of"):
        act(model, handle)
    assert list(tether.handles(model)) == ["a", "b"]
    assert bits(model(X)) == output


def test_merging_in_a_block_lasts(model):
    moved(model, "a")
    live = model(X)
    with tether.only(model, "a"):
        merge(model, "a")
    torch.testing.assert_close(model(X), live, rtol=1e-4, atol=1e-5)
    assert bits(model(X)) != bits(live)


def test_names_are_checked(model):
    moved(model, "first")
    for act in (merge, unmerge):
        with pytest.raises(UnknownNameError, match=r"no adapter 'frist'.*'first'"):
            act(model, "frist")
