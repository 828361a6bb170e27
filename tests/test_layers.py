"""What a live layer computes: the base module with the weight W + ΔW."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import tether
from laws.cases import Case, bits, truth
from tether import LoraConfig, algebra, methods
from tether.layers import SiteAdapters
from tether.provenance import Provenance
from tether.value import Adapter, Factors, LayerAdapter, Layout

LIFTING = [name for name in methods.names() if methods.get(name).lifts]


def randomized(handle: tether.Handle, std: float = 0.1) -> tether.Handle:
    """A handle after some training, which only moves its factors."""
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=std)
    return handle


def adapted(module: nn.Module, **settings: object) -> tuple[nn.Module, tether.Handle]:
    """A module inside a model, with a trained adapter on it."""
    model = nn.ModuleDict({"site": module})
    config = LoraConfig(**({"rank": 2, "alpha": 3, "target_modules": "site"} | settings))
    return model, randomized(tether.attach(model, config))


def merged(module: nn.Module, adapter: tether.Adapter) -> nn.Module:
    """The module alone with the weight W + ΔW."""
    layer = adapter.layers["site"]
    copied = copy.deepcopy(module)
    for handle in tether.handles(copied).values():
        handle.detach()
    copied.weight.data += layer.layout.stored(algebra.delta(layer)).to(copied.weight.dtype)
    return copied


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 9, shape)


MODULES = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(4, 3, 6)),
    "linear-vector": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(6)),
    "conv1d-of-transformers": (lambda: Conv1D(5, 6), lambda: torch.randn(4, 6)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: ids(4, 3)),
    "embedding-padding": (lambda: nn.Embedding(9, 6, padding_idx=1), lambda: ids(20)),
    "embedding-scaled": (
        lambda: Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=6**0.5),
        lambda: ids(4, 3).clamp(min=1),
    ),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), lambda: torch.randn(2, 3, 9)),
    "conv1d-unbatched": (lambda: nn.Conv1d(3, 4, 3), lambda: torch.randn(3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (2, 3)), lambda: torch.randn(2, 3, 7, 8)),
    "conv2d-stride": (
        lambda: nn.Conv2d(3, 4, 3, stride=(2, 1), padding=(1, 2)),
        lambda: torch.randn(2, 3, 7, 8),
    ),
    "conv2d-dilation": (lambda: nn.Conv2d(3, 4, 2, dilation=2), lambda: torch.randn(2, 3, 7, 8)),
    "conv2d-same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), lambda: torch.randn(2, 3, 7, 8)),
    "conv2d-reflect": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False),
        lambda: torch.randn(2, 3, 7, 8),
    ),
    "conv2d-circular": (
        lambda: nn.Conv2d(3, 4, 3, stride=2, padding=(1, 2), padding_mode="circular"),
        lambda: torch.randn(2, 3, 7, 8),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), lambda: torch.randn(1, 2, 4, 5, 6)),
}


@pytest.mark.parametrize("method", ["pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("name", MODULES)
def test_the_live_output_is_that_of_the_changed_weight(name, method):
    make, batch = MODULES[name]
    module, x = make(), batch()
    base = module(x)
    model, handle = adapted(module, init=method)
    live = model["site"](x)
    expected = merged(module, handle.snapshot())(x)
    assert float((expected - base).detach().abs().max()) > 0.01
    torch.testing.assert_close(live, expected, rtol=1e-5, atol=1e-5)
    assert live.dtype == base.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("name", MODULES)
def test_the_first_output_is_the_bases_bit_for_bit(name, method, dtype):
    make, batch = MODULES[name]
    module, x = make().to(dtype), batch()
    x = x.to(dtype) if x.is_floating_point() else x
    base = bits(module(x))
    tether.attach(
        nn.ModuleDict({"site": module}), LoraConfig(init=method, rank=2, target_modules="site")
    )
    assert bits(module(x)) == base


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_the_definition(name):
    make, batch = MODULES[name]
    module, x = make(), batch()
    model, handle = adapted(module)
    (layer,) = handle.snapshot().layers.values()
    a, b = layer.current.A.requires_grad_(), layer.current.B.requires_grad_()
    change = layer.scaling * (b @ a - layer.anchor.B @ layer.anchor.A)
    weight = module.weight.detach() + layer.layout.stored(change)
    bare = merged(module, handle.snapshot())
    torch.func.functional_call(bare, {"weight": weight}, (x,)).square().sum().backward()
    model["site"](x).square().sum().backward()
    da, db = (parameter.grad for parameter in handle.parameters())
    if name == "embedding-padding":  # torch's padding stops only the gradient of its own row
        torch.testing.assert_close(da[:, 2:], a.grad[:, 2:], rtol=1e-4, atol=1e-4)
        assert not da[:, 1].any()
    else:
        torch.testing.assert_close(da, a.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(db, b.grad, rtol=1e-4, atol=1e-4)
    assert module.weight.grad is None


def test_a_gpt2_of_transformers_is_adapted_through_its_conv1d():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    ).eval()
    tokens = torch.randint(0, 32, (2, 5))
    base = model(tokens).logits
    handle = tether.attach(model, LoraConfig(rank=2))
    assert {path.split(".", 3)[3] for path in handle.sites} == {
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    }
    assert bits(model(tokens).logits) == bits(base)
    live = randomized(handle)
    live = model(tokens).logits
    adapter = handle.detach()
    for path, layer in adapter.layers.items():
        weight = model.get_submodule(path).weight
        weight.data += layer.layout.stored(algebra.delta(layer))
    torch.testing.assert_close(live, model(tokens).logits, rtol=1e-4, atol=1e-5)
    assert float((live - base).detach().abs().max()) > 0.01


@pytest.mark.parametrize("call", ["args", "kwargs"])
def test_the_input_is_found_whether_named_or_not(call):
    model, handle = adapted(nn.Linear(6, 5))
    x = torch.randn(3, 6)
    live = model["site"](x) if call == "args" else model["site"](input=x)
    expected = merged(model["site"], handle.snapshot())
    with handle.disabled():
        torch.testing.assert_close(live, expected(x))


@pytest.mark.parametrize("method", ["pissa", "lora"])
@pytest.mark.parametrize(
    "module", [lambda: nn.Linear(6, 5), lambda: nn.Conv1d(6, 5, 1)], ids=["linear", "conv"]
)
def test_dropout_uses_one_mask_for_both_paths(module, method):
    module = module()
    x = torch.randn(7, 6, 1)[..., 0] if isinstance(module, nn.Linear) else torch.randn(7, 6, 4)
    base = module(x)
    model, handle = adapted(module, init=method, dropout=0.4)
    (layer,) = handle.snapshot().layers.values()
    torch.manual_seed(5)
    masked = functional.dropout(x, 0.4)
    after = torch.get_rng_state()
    bare = merged(module, handle.snapshot())
    bare.weight.data -= module.weight.data
    bare.bias = None
    torch.manual_seed(5)
    torch.testing.assert_close(model["site"](x), base + bare(masked), rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), after)  # drawn once
    model.eval()
    torch.testing.assert_close(model["site"](x), base + bare(x), rtol=1e-5, atol=1e-5)
    assert layer.dropout == 0.4


def test_without_dropout_no_random_number_is_drawn():
    model, _ = adapted(nn.Linear(6, 5))
    before = torch.get_rng_state()
    model.train()["site"](torch.randn(3, 6, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_follows_the_mode_of_its_module():
    model = nn.ModuleDict({"site": nn.Linear(6, 5).eval()}).train(True)
    model["site"].eval()
    tether.attach(model, LoraConfig(rank=2, dropout=0.5))
    assert not any(m.training for m in model["site"].modules())
    model.train()
    assert all(m.training for m in model["site"].modules())


def in_bfloat16(adapter: tether.Adapter, x: Tensor) -> tuple[Tensor, tether.LayerAdapter]:
    """What an adapter adds with its factors in bfloat16, and its layer after that rounding."""
    (layer,) = adapter.layers.values()
    site = nn.Linear(layer.layout.in_features, layer.layout.out_features, False).double()
    model = nn.ModuleDict({"site": site})
    site.weight.data.zero_()
    handle = tether.attach(model, adapter, dtype=torch.bfloat16, verify=False)
    assert {p.dtype for p in handle.parameters()} == {torch.bfloat16}
    return site(x.double()).detach(), handle.snapshot().layers["site"]


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("method", LIFTING)
def test_a_small_displacement_survives_factors_in_bfloat16(method, size):
    model = nn.ModuleDict({"site": nn.Linear(48, 64, bias=False)})
    case = Case(method, torch.float32, "square", 0, 4, 1.0, False, 0.0, size)
    x = torch.randn(200, 48).bfloat16()
    start = tether.init(model, case.config(target_modules="site"))
    live, layer = in_bfloat16(case.moved(start), x)
    exact = x.double() @ truth(layer).T
    assert float((live - exact).norm() / exact.norm()) < 1e-2
    anchor, current = (f.to(torch.bfloat16) for f in (layer.anchor, layer.current))
    usual = x @ current.A.T @ current.B.T - x @ anchor.A.T @ anchor.B.T
    assert float((layer.scaling * usual.double() - exact).norm() / exact.norm()) > 0.1


def test_the_displacement_is_not_added_to_the_anchor_in_bfloat16():
    tiny = 2.0**-10  # lost in 1 + tiny
    anchor = Factors(torch.zeros(2, 1), torch.ones(1, 2))
    moved = Factors(torch.tensor([[1.0], [-1.0]]), torch.tensor([[tiny, 0.0]]))
    layer = LayerAdapter(moved, anchor, 1.0, Layout("linear", (1, 1)))
    live, _ = in_bfloat16(Adapter({"site": layer}, Provenance("pissa")), torch.ones(1, 1))
    assert (layer.current.B.bfloat16() @ moved.A.bfloat16()).item() == 0
    assert live.item() == truth(layer).item() == tiny


def test_a_bfloat16_base_is_changed_in_float32_and_rounded_once():
    module = nn.Linear(64, 32, bias=False).bfloat16()
    model = nn.ModuleDict({"site": module})
    x = torch.randn(10, 64).bfloat16()
    base = module(x)
    handle = randomized(tether.attach(model, LoraConfig(rank=4)), std=1e-2)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    live = module(x)
    exact = base.double() + x.double() @ truth(handle.snapshot().layers["site"]).T
    assert live.dtype == torch.bfloat16
    # Half a unit in the last place: 8 bits.
    assert ((live.double() - exact).abs() <= 2**-8 * exact.abs() * 1.001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_of_an_embedding_is_the_one_its_module_uses(dtype):
    module = Gemma3TextScaledWordEmbedding(9, 640, 0, embed_scale=640**0.5).to(dtype)
    module.weight.data.zero_()
    tokens = torch.arange(9)
    model, handle = adapted(module, init="lora")
    with torch.no_grad():
        live = model["site"](tokens).double()
    layer = handle.snapshot().layers["site"]
    scale = float(module.embed_scale.to(dtype))  # rounded, as Gemma does
    expected = scale * truth(layer).T
    ratio = float((live * expected).sum() / expected.square().sum())
    assert ratio == pytest.approx(1, abs={torch.float32: 1e-6, torch.bfloat16: 5e-4}[dtype])


def test_autocast_runs_the_base_and_the_adapter():
    model, handle = adapted(nn.Linear(16, 16))
    x = torch.randn(5, 16)
    exact = merged(model["site"], handle.snapshot())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = model["site"](x)
    live.float().square().sum().backward()
    assert live.dtype == torch.bfloat16
    with handle.disabled():
        torch.testing.assert_close(live.float(), exact(x), rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 for p in handle.parameters())


def test_keys_and_classes_of_the_base_stay_as_they_were():
    module = nn.Linear(6, 5)
    model, _ = adapted(module)
    assert type(model["site"]) is nn.Linear
    assert isinstance(model["site"].tether, SiteAdapters)
    added = {f"site.tether.default.{name}" for name in ("dA", "dB", "anchor.A0", "anchor.B0")}
    assert set(model.state_dict()) == {"site.weight", "site.bias"} | added
    assert {name for name, _ in model.named_buffers()} == {
        "site.tether.default.anchor.A0",
        "site.tether.default.anchor.B0",
    }
    assert all(t.is_contiguous() for t in model.state_dict().values())
