"""Biases and whole modules: which are trained, their start, what they compute, what is refused."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tether
from laws.cases import DTYPES, bits, state_of, wholes_of
from tether import LoraConfig, algebra
from tether.errors import (
    AttachError,
    BaseMismatchError,
    ConfigError,
    HookNotFiredError,
    NonFiniteError,
    ShapeMismatchError,
    TetherError,
    UnknownNameError,
    UnsupportedModuleError,
)
from tether.value import Adapter, Trained
from whole_model import (
    BIASED,
    SITES,
    changed_state,
    combinations,
    config,
    make,
    moved,
    whole_bits,
)

KINDS = pytest.mark.parametrize("kind", SITES)
ALL = {"use_dora": True, "bias": "all", "modules_to_save": ("head",)}


def on(model: nn.Module, target: str | list[str], **settings: object) -> tether.Handle:
    return tether.attach(model, LoraConfig(rank=1, target_modules=target, **settings))


# ---- the base is only read


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@KINDS
def test_every_combination_starts_as_the_base_and_leaves_it_behind(kind, dtype):
    net, x = make(kind, dtype)
    before, base = state_of(net), bits(net(x))
    every = list(combinations(kind))
    assert len(every) == (24 if kind in BIASED else 14)
    # All of them in float32, and each in one of the half precisions.
    start, step = {torch.float32: (0, 1), torch.bfloat16: (0, 2), torch.float16: (1, 2)}[dtype]
    for settings in every[start::step]:
        handle = tether.attach(net, config(**settings))
        for mode in (False, True):
            assert bits(net.train(mode)(x)) == base
        net(x).float().square().sum().backward()
        torch.optim.SGD(moved(handle).parameters(), lr=0.01).step()
        live = bits(net(x))
        assert live != base
        for block in (handle.disabled, lambda: tether.reference(net), lambda: tether.only(net)):
            with block():
                assert bits(net(x)) == base
            assert bits(net(x)) == live
        adapter = handle.detach()
        assert state_of(net) == before
        assert bits(net(x)) == base
        again = tether.attach(net, adapter)
        assert bits(net(x)) == live
        assert whole_bits(again.detach()) == whole_bits(adapter)


class Zeros(nn.Module):
    """An embedding and norms whose outputs are zeros of both signs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding, self.norm, self.last = nn.Embedding(6, 4), nn.LayerNorm(4), nn.LayerNorm(4)
        self.to(dtype)
        with torch.no_grad():
            self.embedding.weight[:4:2] = -0.0
            for norm in (self.norm, self.last):
                norm.weight[::2], norm.bias[::2] = 0.0, -0.0

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.embedding(ids)
        return y, self.norm(y), self.last(y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("use_dora", [True, False])
def test_the_start_keeps_the_sign_of_zeros(use_dora, dtype):
    model, ids = Zeros(dtype), torch.arange(6)
    base = model(ids)
    for y in base:
        assert (y.signbit() & (y == 0)).any()
        assert (~y.signbit() & (y == 0)).any() or y is base[0]
    on(model, "embedding", use_dora=use_dora, bias="all", modules_to_save=["last"])
    assert [bits(y) for y in model(ids)] == [bits(y) for y in base]


# ---- what is trained


class Mixed(nn.Module):
    """Modules with and without a bias, of every kind that adds one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.bare = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.LayerNorm(8, bias=False)
        self.turned = Conv1D(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.plane = nn.Conv2d(1, 2, 3, padding=1)
        self.volume = nn.Conv3d(1, 1, (2, 1, 1))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.turned(self.scale(self.norm(self.bare(self.first(x)))))
        x = self.conv(x.mT).mT
        x = self.volume(self.plane(x[:, None])[:, None])[:, 0, 0]
        return self.last(x)


X = torch.linspace(-1, 1, 2 * 4 * 6).view(2, 4, 6)


def mixed() -> Mixed:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Mixed()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        return model


@pytest.mark.parametrize(
    ("targets", "setting", "saved", "expected"),
    [
        (["first", "bare"], "none", (), []),
        (["first", "bare"], "lora_only", (), ["first"]),
        (["turned", "conv", "last"], "lora_only", (), ["turned", "conv", "last"]),
        (["bare"], "all", (), ["first", "norm", "turned", "conv", "plane", "volume", "last"]),
        (["first"], "all", ("norm", "last"), ["first", "turned", "conv", "plane", "volume"]),
    ],
)
def test_which_biases_are_trained(targets, setting, saved, expected):
    model = mixed()
    adapter = tether.init(
        model,
        LoraConfig(rank=1, target_modules=targets, bias=setting, modules_to_save=saved),
    )
    assert list(adapter.biases) == expected
    assert list(adapter.modules) == list(saved)
    for path, bias in adapter.biases.items():
        assert torch.equal(bias.anchor, model.get_submodule(path).bias)
        assert not bias.trainable.any()
    handle = tether.attach(model, adapter)
    names = [name for name, _ in handle.named_parameters()]
    found = [n.removesuffix(".db") for n in names if n.endswith(".db")]
    assert found == [p for p in targets if p in expected] + [
        p for p in expected if p not in targets
    ]
    assert names[len(names) - 2 * len(saved) :] == [
        f"{p}.{n}" for p in saved for n in ("weight", "bias")
    ]
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(
        map(id, handle.parameters())
    )
    assert handle.sites == tuple(targets)


SETTINGS = {
    "biases": {"bias": "all"},
    "biases of sites": {"bias": "lora_only"},
    "modules": {"modules_to_save": ("norm", "scale", "plane", "last")},
    "both": {"bias": "all", "modules_to_save": ("norm", "conv", "last")},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_output_and_gradients_are_those_of_the_changed_parameters(settings):
    model, bare = mixed(), mixed().double()
    base = model(X)
    handle = moved(on(model, ["first", "bare", "turned"], **settings))
    adapter = handle.snapshot()
    state = {
        name: value.requires_grad_(name not in {f"{p}.weight" for p in adapter.layers})
        for name, value in changed_state(model, adapter).items()
    }
    exact = torch.func.functional_call(bare, state, (X.double(),))
    live = model(X)
    assert float((live - base).detach().abs().max()) > 1e-3
    torch.testing.assert_close(live.double(), exact, rtol=1e-5, atol=1e-5)
    live.square().sum().backward()
    exact.square().sum().backward()
    found = {
        name.removesuffix(".db") + ".bias" if name.endswith(".db") else name: parameter.grad
        for name, parameter in handle.named_parameters()
    }
    for name, value in state.items():
        if value.requires_grad:
            torch.testing.assert_close(
                found[name].double(), value.grad, rtol=1e-4, atol=1e-4, msg=name
            )
    assert all(p.grad is None for n, p in model.named_parameters() if ".tether." not in n)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (2, 3, 4)])
def test_a_norm_over_more_than_one_dimension(shape):
    """Its bias has the shape of what it normalises."""
    model = nn.ModuleDict({"norm": nn.LayerNorm(shape), "site": nn.Linear(4, 4)})
    x = torch.randn(5, *shape)
    base = model["norm"](x)
    handle = moved(on(model, "site", bias="all"))
    bias = handle.snapshot().biases["norm"]
    assert bias.trainable.shape == shape
    torch.testing.assert_close(model["norm"](x), base + bias.trainable)


class Block(nn.Module):
    """A module whose own forward has a keyword, and that is no Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        return self.norm(self.inner(x) * (2 if twice else 1))


class Nested(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 6), head

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.head(h, twice=True) if isinstance(self.head, Block) else self.head(h)


HEADS = {
    "linear": lambda: nn.Linear(6, 4),
    "block": Block,
    "sequential": lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)),
    "nested": lambda: nn.Sequential(Block(), nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))),
}


@pytest.mark.parametrize("settings", [{}, {"bias": "all", "use_dora": True}], ids=["", "all"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_head_of_several_modules_is_trained_whole(head, settings):
    model = Nested(head())
    before, base = state_of(model), bits(model(X))
    handle = on(model, "up", modules_to_save=["head"], **settings)
    assert bits(model(X)) == base
    handle.verify(X)
    adapter = moved(handle).snapshot()
    assert set(adapter.modules["head"]) == {n for n, _ in model.head.named_parameters()} - {
        n for n, _ in model.head.named_parameters() if "tether" in n
    }
    bare = copy.deepcopy(model)
    tether.handles(bare)["default"].detach()
    exact = torch.func.functional_call(bare.double(), changed_state(model, adapter), (X.double(),))
    torch.testing.assert_close(model(X).double(), exact, rtol=1e-5, atol=1e-5)
    model(X).square().sum().backward()
    assert all(p.grad.any() for p in handle.parameters())
    model.zero_grad()
    handle.detach()
    assert state_of(model) == before
    assert bits(model(X)) == base


def test_a_tied_head_is_trained_and_the_embedding_stays(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True).eval()
    weight, ids = model.lm_head.weight, torch.arange(10).view(2, 5)
    version, hidden = weight._version, bits(model.model.embed_tokens(ids))
    base = bits(model(ids).logits)
    handle = tether.attach(model, LoraConfig(rank=2, modules_to_save=["lm_head"]))
    assert "lm_head" not in handle.sites
    assert bits(model(ids).logits) == base
    moved(handle)
    assert bits(model.model.embed_tokens(ids)) == hidden
    last = model.model(ids).last_hidden_state
    (head,) = handle.snapshot().modules["lm_head"].values()
    torch.testing.assert_close(model(ids).logits, last @ head.current.T, rtol=1e-5, atol=1e-5)
    handle.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    assert weight._version == version
    assert bits(model(ids).logits) == base


def test_weights_tied_inside_a_whole_module_move_together():
    head = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    head[1].weight = head[0].weight
    model = nn.ModuleDict({"up": nn.Linear(6, 6), "head": Wrapped(head)})
    handle = moved(on(model, "up", modules_to_save=["head"]))
    (value,) = handle.snapshot().modules["head"].values()
    x = torch.randn(3, 6)
    torch.testing.assert_close(model["head"](x), x @ value.current.T @ value.current.T)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_all_linear_leaves_out_what_is_trained_whole():
    model = Nested(nn.Linear(6, 4))
    adapter = tether.init(model, LoraConfig(rank=2, modules_to_save=["head"]))
    assert (list(adapter.layers), list(adapter.modules)) == (["up"], ["head"])


def test_all_linear_leaves_out_what_lies_in_a_module_trained_whole():
    adapter = tether.init(Nested(Block()), LoraConfig(rank=2, modules_to_save=["head"]))
    assert list(adapter.layers) == ["up"]
    assert list(adapter.modules["head"]) == [
        *("inner.weight", "inner.bias", "norm.weight", "norm.bias")
    ]


def test_all_linear_keeps_what_only_ends_like_a_module_trained_whole():
    block = nn.ModuleDict({"head": nn.Linear(6, 6)})
    model = nn.ModuleDict({"head": nn.Linear(6, 6), "block": block})
    adapter = tether.init(model, LoraConfig(rank=2, modules_to_save=["h?ad"]))
    assert (list(adapter.layers), list(adapter.modules)) == (["block.head"], ["head"])


def test_a_frozen_adapter_is_frozen_in_all_its_parts_and_trains_no_base():
    net, x = make("linear")
    adapter = tether.init(net, config(**ALL))
    handle = tether.attach(net, adapter, trainable=False)
    assert len(list(handle.parameters())) == 7
    assert not any(p.requires_grad for p in handle.parameters())
    assert all(p.requires_grad for n, p in net.named_parameters() if ".tether." not in n)
    net(x).sum().backward()
    assert all(p.grad is None for p in handle.parameters())


def test_a_base_trains_on_under_a_frozen_adapter_of_any_kind():
    """Its gradients are those of the changed parameters: none is lost on the way."""
    net, x = make("linear")
    adapter = moved(tether.attach(net, config(bias="all", modules_to_save=("head",)))).detach()
    state = {
        name: value.float().requires_grad_() for name, value in changed_state(net, adapter).items()
    }
    bare, _ = make("linear")
    torch.func.functional_call(bare, state, (x,)).square().sum().backward()
    tether.attach(net, adapter, trainable=False)
    net(x).square().sum().backward()
    for name, value in state.items():
        found = net.get_parameter(name).grad
        torch.testing.assert_close(found, value.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_snapshot_of_biases_and_modules_shares_nothing_with_the_model():
    net, _ = make("linear")
    handle = moved(tether.attach(net, config(**ALL)))
    adapter = handle.snapshot()
    before = whole_bits(adapter)
    moved(handle)
    for parameter in net.parameters():
        parameter.data.add_(1)
    assert whole_bits(adapter) == before
    assert whole_bits(handle.snapshot()) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_they_are_never_kept_in_less_than_float32(dtype):
    net, _ = make("linear", dtype)
    half = {p.dtype for p in tether.attach(net, config(), "a", dtype=dtype).parameters()}
    handle = tether.attach(net, config(**ALL), dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert half == {dtype}
    for name, parameter in handle.named_parameters():
        assert parameter.dtype == (dtype if name[-2:] in ("dA", "dB") else wide), name
    for value in wholes_of(handle.snapshot()).values():
        assert value.trainable.dtype == wide


def test_verify_names_a_module_that_is_never_called():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.never = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x)

    for settings in ({"modules_to_save": ["never"]}, {"bias": "all"}):
        handle = on(Skips(), "up", **settings)
        with pytest.raises(HookNotFiredError, match="'never'"):
            handle.verify(X)


# ---- refused by name


class Odd(nn.Module):
    """Uses its bias in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.bias


@pytest.mark.parametrize(
    ("make_odd", "name"),
    [
        (lambda: nn.MultiheadAttention(6, 2), "MultiheadAttention"),
        (Odd, "Odd"),
        (lambda: nn.BatchNorm1d(6), "BatchNorm1d"),
        (lambda: nn.GroupNorm(2, 6), "GroupNorm"),
        (lambda: nn.ConvTranspose1d(6, 6, 2), "ConvTranspose1d"),
        (lambda: nn.Bilinear(6, 6, 6), "Bilinear"),
    ],
    ids=["attention", "custom", "batch norm", "group norm", "transposed", "bilinear"],
)
def test_a_bias_that_a_hook_cannot_move_is_refused_by_name(make_odd, name):
    model = nn.ModuleDict({"up": nn.Linear(6, 6), "odd": make_odd()})
    before = state_of(model)
    with pytest.raises(UnsupportedModuleError, match=rf"module 'odd': {name} .*bias='lora_only'"):
        on(model, "up", bias="all")
    assert state_of(model) == before
    assert list(on(model, "up", bias="lora_only").snapshot().biases) == ["up"]


@pytest.mark.parametrize("setting", ["lora_only", "all"])
def test_a_setting_that_trains_no_bias_is_refused(setting):
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    with pytest.raises(ConfigError, match=f"bias='{setting}'"):
        on(model, "0", bias=setting)


class Buffered(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.register_buffer("mask", torch.ones(6))


PARTS = {
    "up": lambda: nn.Linear(6, 6),
    "batch": lambda: nn.BatchNorm1d(6),
    "buffered": Buffered,
    "listed": lambda: nn.ModuleList([nn.Linear(6, 6)]),
    "table": lambda: nn.ModuleDict({"a": nn.Linear(6, 6)}),
    "empty": nn.ReLU,
    "block": Block,
    "integers": lambda: nn.Embedding.from_pretrained(torch.ones(2, 2).int()),
    "nan": lambda: nn.Linear(6, 6),
    "meta": lambda: nn.Linear(6, 6, device="meta"),
}


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        (["batch"], UnsupportedModuleError, r"'batch'.*buffer 'running_mean'"),
        (["buffered"], UnsupportedModuleError, r"'buffered'.*buffer 'mask'"),
        (["listed"], UnsupportedModuleError, r"'listed' \(ModuleList\)"),
        (["table"], UnsupportedModuleError, r"'table' \(ModuleDict\)"),
        (["empty"], UnsupportedModuleError, r"'empty' \(ReLU\)"),
        (["up"], ConfigError, r"'up' holds the site 'up'"),
        (["block", "block.norm"], ConfigError, r"'block\.norm' lies in 'block'"),
        (["block*"], ConfigError, r"'block\.inner' lies in 'block'"),
        (["blok"], UnknownNameError, r"'blok' matches no module.*Nearest: 'block'"),
        (["block.inner", "nrom"], UnknownNameError, r"'nrom'.*'norm'"),
        (["integers"], UnsupportedModuleError, r"integers\.weight: torch\.int32"),
        (["nan"], NonFiniteError, r"nan\.bias"),
        (["meta"], UnsupportedModuleError, r"meta\.weight.*meta"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_a_module_that_cannot_be_trained_whole_is_refused_by_name(names, error, match):
    model = nn.ModuleDict({name: part() for name, part in PARTS.items()})
    with torch.no_grad():
        model["nan"].bias[3] = torch.nan
    keys = list(model.state_dict())
    with pytest.raises(error, match=match):
        on(model, "up", modules_to_save=names)
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for n, p in model.named_parameters() if "integers" not in n)


def test_a_site_inside_a_module_trained_whole_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'head' holds the site 'head\.inner'.*exclude_modules"):
        on(Nested(Block()), ["up", "inner"], modules_to_save=["head"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bias_that_is_not_finite_is_refused_by_name(value):
    model = mixed()
    with torch.no_grad():
        model.norm.bias[2] = value
    with pytest.raises(NonFiniteError, match=r"norm\.bias"):
        on(model, "first", bias="all")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": 1}, "use_dora must be True or False, not 1"),
        ({"use_dora": None}, "use_dora"),
        ({"bias": "some"}, "bias must be one of none, lora_only, all, not 'some'"),
        ({"bias": True}, "bias"),
        ({"bias": None}, "bias"),
        ({"modules_to_save": 3}, "modules_to_save must be a list of names, not 3"),
        ({"modules_to_save": [""]}, "modules_to_save"),
        ({"modules_to_save": [3]}, "modules_to_save must hold names, not 3"),
        ({"after_save": "delete"}, "after_save must be one of keep, offload, detach"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_meant_is_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        LoraConfig(**settings)


def test_settings_come_back_from_a_dictionary_and_a_copy():
    one = LoraConfig(use_dora=True, bias="all", modules_to_save="head", after_save="detach")
    assert one.modules_to_save == ("head",)
    for other in (LoraConfig.from_dict(one.to_dict()), copy.deepcopy(one)):
        assert other.to_dict() == one.to_dict()


# ---- two that change the same


def of(model: nn.Module, path: str, kind: str) -> Adapter:
    """An adapter, moved, with a part at one module: factors, a bias, or the whole module."""
    settings = {
        "site": {"target_modules": path},
        "bias": {"target_modules": ["last", path], "bias": "lora_only"},
        "whole": {"target_modules": "last", "modules_to_save": [path]},
    }
    handle = tether.attach(model, LoraConfig(rank=1, **settings[kind]), "scratch")
    return moved(handle, seed=len(kind)).detach()


@pytest.mark.parametrize(
    ("one", "two"),
    [p for p in itertools.product(("site", "bias", "whole"), repeat=2) if "whole" in p],
)
@pytest.mark.parametrize("path", ["first", "turned"])
def test_two_adapters_on_one_module_both_count_or_the_second_is_refused(path, one, two):
    model = mixed()
    module, x = model.get_submodule(path), torch.randn(3, 6 if path == "first" else 8)
    adapters = [of(model, path, kind) for kind in (one, two)]
    base = module(x).detach().double()
    tether.attach(model, adapters[0], "one")
    refusal = ""
    try:
        tether.attach(model, adapters[1], "two")
    except TetherError as error:
        refusal = str(error)
    assert list(tether.handles(model)) == ["one"] + ["two"] * (not refusal)
    if refusal:
        assert path in refusal
        return
    exact = base
    for adapter in adapters:
        weight = bias = 0
        if path in adapter.layers:
            layer = adapter.layers[path]
            weight = layer.layout.stored(algebra.delta(layer)).double()
        if path in adapter.modules:
            weight = adapter.modules[path]["weight"].trainable.double()
            bias = adapter.modules[path]["bias"].trainable.double()
        if path in adapter.biases:
            bias = adapter.biases[path].trainable.double()
        exact = exact + x.double() @ (weight.T if path == "first" else weight) + bias
    torch.testing.assert_close(module(x).detach().double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", ["head", "head.inner"])
def test_a_value_that_changes_a_weight_twice_is_refused_by_name(inner):
    """No configuration makes one; a file can."""
    model = Nested(nn.Linear(6, 6) if inner == "head" else Block())
    site = tether.init(model, LoraConfig(rank=1, target_modules=inner))
    whole = tether.init(model, LoraConfig(rank=1, target_modules="up", modules_to_save=["head"]))
    both = dataclasses.replace(site, modules=whole.modules)
    before = state_of(model)
    with pytest.raises((AttachError, ConfigError), match="head"):
        tether.attach(model, both)
    assert state_of(model) == before


def test_a_value_that_changes_a_bias_twice_is_refused_by_name():
    model = Nested(Block())
    biased = tether.init(model, LoraConfig(rank=1, target_modules="up", bias="all"))
    whole = tether.init(model, LoraConfig(rank=1, target_modules="up", modules_to_save=["head"]))
    both = dataclasses.replace(biased, modules=whole.modules)
    with pytest.raises((AttachError, ConfigError), match="head"):
        tether.attach(model, both)


@pytest.mark.parametrize("where", ["biases", "modules"])
def test_a_value_that_names_what_the_model_lacks_is_refused_by_name(where):
    net, _ = make("linear")
    adapter = tether.init(net, config(**ALL))
    before = state_of(net)
    one = Trained(torch.zeros(6), torch.zeros(6))
    for values in (
        {"nrom": one if where == "biases" else {"weight": one}},
        {"site": one} if where == "biases" else {"head": {"wieght": one}},
    ):
        if values == {"site": one}:
            other, _ = make("linear-no-bias")
        else:
            other = net
        odd = dataclasses.replace(adapter, **{"biases": {}, "modules": {}} | {where: values})
        with pytest.raises(UnknownNameError, match=next(iter(values))):
            tether.attach(other, odd, verify=False)
    assert state_of(net) == before


# ---- on another base


def parts_of(net: nn.Module) -> dict[str, Tensor]:
    return {"site.bias": net.site.bias, "norm.bias": net.norm.bias, "head.weight": net.head.weight}


@pytest.mark.parametrize("name", ["site.bias", "norm.bias", "head.weight"])
def test_a_base_with_another_bias_or_module_is_refused_by_name(name):
    net, x = make("linear")
    adapter = moved(tether.attach(net, config(**ALL))).detach()
    with torch.no_grad():
        parts_of(net)[name].view(-1)[1] += 0.25
    before, base = state_of(net), bits(net(x))
    with pytest.raises(BaseMismatchError, match=rf"{name}: .* differ by up to 0\.25"):
        tether.attach(net, adapter)
    assert state_of(net) == before
    tether.attach(net, adapter, verify=False)
    assert bits(net(x)) != base


@pytest.mark.parametrize("name", ["site.bias", "norm.bias", "head.weight"])
def test_a_base_of_another_shape_is_refused_by_name(name):
    net, _ = make("linear")
    adapter = tether.init(net, config(**ALL))
    path, _, attribute = name.rpartition(".")
    setattr(net.get_submodule(path), attribute, nn.Parameter(torch.zeros(3)))
    with pytest.raises(ShapeMismatchError, match=rf"{name}: the base's is \(3,\)"):
        tether.attach(net, adapter, verify=False)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_checkpoint_in_another_precision_is_accepted(half):
    wide, _ = make("linear")
    narrow = copy.deepcopy(wide).to(half)
    with torch.no_grad():
        changed = copy.deepcopy(narrow)
        changed.norm.bias[0] *= 1.02
    for made_on, used_on in ((wide, narrow), (narrow, wide)):
        adapter = moved(tether.attach(made_on, config(**ALL))).detach()
        x = torch.randn(4, 5)
        base = used_on(x.to(used_on.site.weight.dtype))
        handle = tether.attach(used_on, adapter)
        live = used_on(x.to(used_on.site.weight.dtype))
        assert float((live - base).detach().abs().max()) > 0.05
        found = handle.detach()
        for name, value in wholes_of(found).items():
            assert torch.equal(value.trainable, wholes_of(adapter)[name].trainable), name
        with pytest.raises(BaseMismatchError, match=r"norm\.bias"):
            tether.attach(changed, adapter)


def other_base() -> nn.Module:
    net, _ = make("linear")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return net


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "all"}, ALL], ids=str)
def test_on_another_base_the_snapshot_says_what_the_model_computes(settings):
    """With verify=False: whatever moves, live model and saved file must be the same model."""
    net, x = make("linear")
    adapter = moved(tether.attach(net, config(**settings))).detach()
    other = other_base()
    handle = tether.attach(other, adapter, verify=False)
    live, found = other(x).detach(), handle.snapshot()
    state = changed_state(other, found)
    for name, value in found.trained_whole:
        state[name] = value.current.double()  # what a PEFT folder says
    bare = other_base().double()
    exact = torch.func.functional_call(bare, state, (x.double(),)).detach()
    torch.testing.assert_close(live.double(), exact, rtol=1e-4, atol=1e-4)


def test_values_without_an_anchor_become_displacements_from_this_base():
    """As files of other libraries hold them."""
    net, x = make("linear")
    handle = moved(tether.attach(net, config(init="lora", **ALL)))
    live, adapter = net(x).detach(), handle.detach()

    def plain(value: Trained) -> Trained:
        return Trained(value.current, None)

    layers = {
        path: dataclasses.replace(layer, magnitude=plain(layer.magnitude))
        for path, layer in adapter.layers.items()
    }
    modules = {p: {n: plain(v) for n, v in s.items()} for p, s in adapter.modules.items()}
    biases = {path: plain(bias) for path, bias in adapter.biases.items()}
    found = dataclasses.replace(adapter, layers=layers, modules=modules, biases=biases)
    again = tether.attach(net, found)
    torch.testing.assert_close(net(x), live, rtol=1e-6, atol=1e-6)
    for name, value in wholes_of(again.detach()).items():
        assert torch.equal(value.anchor, wholes_of(adapter)[name].anchor), name
        torch.testing.assert_close(value.trainable, wholes_of(adapter)[name].trainable)
    other = other_base()
    again = tether.attach(other, found, verify=False)
    for path, bias in again.snapshot().biases.items():
        assert torch.equal(bias.anchor, other.get_submodule(path).bias)
        torch.testing.assert_close(bias.current, adapter.biases[path].current)
