"""DoRA: W' = m·(W + ΔW)/|W + ΔW|, the row lengths constants in the gradient (arXiv:2402.09353)."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

import tether
from laws.cases import DTYPES, bits, state_of, truth
from tether import methods
from tether.layers.dora import lengths
from whole_model import SITES, changed_state, config, dora_weight, make, moved

KINDS = pytest.mark.parametrize("kind", SITES)
ALL = {"use_dora": True, "bias": "all", "modules_to_save": ("head",)}


def in_double(model: nn.Module, adapter: tether.Adapter, x: Tensor) -> Tensor:
    """What the base gives with the parameters that the adapter says, in float64."""
    bare = copy.deepcopy(model)
    for handle in tether.handles(bare).values():
        handle.detach()
    x = x.double() if x.is_floating_point() else x
    state = changed_state(model, adapter)
    return torch.func.functional_call(bare.double(), state, (x,)).detach()


@pytest.mark.parametrize("method", ["pissa", "milora", "lora", "gaussian"])
@KINDS
def test_the_output_is_that_of_the_formula(kind, method):
    net, x = make(kind)
    base = net(x)
    handle = moved(tether.attach(net, config(init=method, dropout=0.5, use_dora=True)))
    exact = in_double(net, handle.snapshot(), x)
    live = net.eval()(x).double()
    assert float((live - base).detach().abs().max()) > 0.05
    torch.testing.assert_close(live, exact, rtol=1e-5, atol=1e-5)
    # Moved by as much again without its magnitude it is another model.
    with torch.no_grad():
        net.site.tether["default"].dm.zero_()
    assert float((net(x).double() - exact).detach().abs().max()) > 1e-3


@KINDS
def test_it_is_the_formula_with_biases_and_modules_too(kind):
    net, x = make(kind)
    handle = moved(tether.attach(net, config(use_rslora=True, **ALL)))
    exact = in_double(net, handle.snapshot(), x)
    torch.testing.assert_close(net(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_it_is_as_exact_in_float64_as_the_magnitudes_are():
    net, x = make("linear", torch.float64)
    handle = moved(tether.attach(net, config(use_dora=True), dtype=torch.float64))
    assert {p.dtype for p in handle.parameters()} == {torch.float64}
    exact = in_double(net, handle.snapshot(), x)
    torch.testing.assert_close(net(x), exact, rtol=3e-7, atol=3e-7)  # m0 is kept in float32


@pytest.mark.parametrize("size", [1e-3, 1e-2, 5e-2])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-3), (torch.float16, 2e-4)])
def test_the_lengths_are_right_on_a_base_in_half_precision(dtype, limit, size):
    model = nn.ModuleDict({"site": nn.Linear(256, 128, bias=False).to(dtype)})
    handle = moved(tether.attach(model, config(use_dora=True)), size)
    (layer,) = handle.snapshot().layers.values()
    assert layer.magnitude.trainable.dtype == torch.float32
    weight = model["site"].weight
    exact = (weight.detach().double() + truth(layer)).norm(dim=1)
    assert float(((exact - layer.magnitude.anchor) / exact).abs().max()) > size / 10
    found = lengths(model["site"].tether["default"], weight)
    assert float(((found - exact) / exact).abs().max()) < limit


@KINDS
def test_gradients_take_the_lengths_for_constants(kind):
    net, x = make(kind)
    handle = moved(tether.attach(net, config(init="lora", **ALL)))
    (layer,) = handle.snapshot().layers.values()
    found = dict(handle.named_parameters())
    a, b = (found[f"site.{n}"].detach().double().requires_grad_() for n in ("A", "B"))
    m = layer.magnitude.current.double().requires_grad_()
    state = {
        name: value.requires_grad_()
        for name, value in changed_state(net, handle.snapshot()).items()
        if name != "site.weight"
    }
    changed = layer.layout.matrix(net.site.weight.detach().double()) + layer.scaling * (b @ a)
    weight = m[:, None] * changed / changed.norm(dim=1, keepdim=True).detach()
    bare = copy.deepcopy(net)
    tether.handles(bare)["default"].detach()
    inputs = (x.double() if x.is_floating_point() else x,)
    state["site.weight"] = layer.layout.stored(weight)
    torch.func.functional_call(bare.double(), state, inputs).square().sum().backward()
    net(x).square().sum().backward()
    exact = {"site.A": a.grad, "site.B": b.grad, "site.dm": m.grad}
    exact |= {n.replace(".bias", ".db"): state[n].grad for n in ("norm.bias",)}
    exact |= {name: state[name].grad for name in ("head.weight", "head.bias")}
    if "site.db" in found:
        exact["site.db"] = state["site.bias"].grad
    assert set(exact) == set(found)
    for name, gradient in exact.items():
        if name == "site.A" and kind == "embedding-scaled":
            # torch's padding stops only the gradient of its own row, which no input asks for here.
            assert not gradient[:, 0].any()
        torch.testing.assert_close(
            found[name].grad.double(), gradient, rtol=1e-4, atol=1e-4, msg=name
        )
    assert all(p.grad is None for n, p in net.named_parameters() if ".tether." not in n)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_dropout_is_of_the_adapters_own_input_alone(kind):
    """Only ΔW·x sees the mask: the base goes on seeing the whole input."""
    net, x = make(kind)
    base, weight, bias = net.site(x), net.site.weight.detach(), net.site.bias.detach()
    handle = moved(tether.attach(net, config(use_dora=True, dropout=0.4)))
    (layer,) = handle.snapshot().layers.values()
    changed = layer.layout.matrix(weight.double()) + truth(layer)
    stretch = layer.magnitude.current.double() / changed.norm(dim=1)
    shape = (-1, 1, 1) if kind == "conv2d" else (-1,)
    torch.manual_seed(5)
    masked = functional.dropout(x, 0.4)
    bare = copy.deepcopy(net.site)
    tether.handles(bare)["default"].detach()
    bare.weight.data, bare.bias = layer.layout.stored(truth(layer)).float(), None
    without = base - bias.view(shape)
    stretch = stretch.float().view(shape)
    exact = stretch * without + stretch * bare(masked) + bias.view(shape)
    torch.manual_seed(5)
    torch.testing.assert_close(net.train().site(x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", methods.names())
def test_rows_of_zeros_start_as_zeros_and_can_grow(method, dtype):
    net, x = make("linear", dtype)
    with torch.no_grad():
        net.site.weight[::2] = 0
        net.site.weight[0] = -0.0
    base = bits(net(x))
    handle = tether.attach(net, config(init=method, use_dora=True))
    assert bits(net(x)) == base
    net(x).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in handle.parameters())
    (layer,) = moved(handle).snapshot().layers.values()
    exact = x.double() @ dora_weight(layer, net.site.weight).T + net.site.bias.detach().double()
    live = net.site(x).double()
    assert float((live - net.site.bias.double()).detach()[:, ::2].abs().max()) > 0.01
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(live, exact, rtol=limit, atol=limit)


@pytest.mark.parametrize("method", ["pissa", "lora"])
@pytest.mark.parametrize("scale", [1e-20, 1e-25, 1e-38, 1e18, 3e19, 1e25])
def test_rows_whose_squares_leave_float32_start_as_the_base(scale, method):
    """|w|² of such a row is 0, subnormal or infinite in float32; |w| itself is not."""
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight[1] *= scale
    x = torch.randn(3, 6)
    base = bits(model(x))
    tether.attach(model, config(init=method, target_modules="0", use_dora=True))
    assert bits(model(x)) == base


def test_two_adapters_add_what_each_changes():
    net, x = make("linear")
    base = net.site(x)
    moved(tether.attach(net, config(use_dora=True), "one"))
    moved(tether.attach(net, config(init="lora", use_dora=True, bias="lora_only"), "two"), seed=4)
    both, changes = net.site(x), torch.zeros_like(base)
    for name in ("one", "two"):
        with tether.only(net, name):
            changes = changes + (net.site(x) - base)
    torch.testing.assert_close(both, base + changes, rtol=1e-5, atol=1e-5)


def test_a_model_in_another_precision_still_starts_as_its_base():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        net, x = make("linear")
        tether.attach(net, config(**ALL))
        net.to(dtype)
        live = bits(net(x.to(dtype)))
        with tether.reference(net):
            assert bits(net(x.to(dtype))) == live


def test_autocast_starts_as_the_base_and_trains_in_float32():
    net, x = make("linear")
    handle = tether.attach(net, config(**ALL))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = net(x)
        with handle.disabled():
            assert bits(net(x)) == bits(live)
    moved(handle)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = net(x)
    exact = in_double(net, handle.snapshot(), x)
    assert live.dtype == torch.bfloat16
    assert float((live.detach().double() - exact).norm() / exact.norm()) < 0.02
    live.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in handle.parameters())


def test_a_weight_that_is_computed_is_stretched_as_it_is():
    """weight_norm and other parametrisations: `weight` is no parameter of the module."""
    net, x = make("linear")
    weight_norm(net.site)
    base = bits(net(x))
    handle = tether.attach(net, config(use_dora=True))
    assert bits(net(x)) == base
    (layer,) = moved(handle).snapshot().layers.values()
    exact = x.double() @ dora_weight(layer, net.site.weight).T + net.site.bias.detach().double()
    torch.testing.assert_close(net.site(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_the_start_of_the_magnitude_is_the_lengths_of_the_rows():
    net, _ = make("conv2d")
    before = state_of(net)
    adapter = tether.init(net, config(use_dora=True))
    assert state_of(net) == before
    magnitude = adapter.layers["site"].magnitude
    exact = net.site.weight.detach().double().flatten(1).norm(dim=1)
    assert torch.equal(magnitude.anchor, exact.float())
    assert not magnitude.trainable.any()
    assert tether.init(net, config()).layers["site"].magnitude is None
