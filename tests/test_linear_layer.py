"""The step of autograd that linear sites share: its derivatives, what it keeps, what it costs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import tether
from laws.cases import bits
from tether.layers.linear import add_change

TOKENS, IN, OUT, RANK = 7, 6, 5, 2


def numbers(anchored: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """output, x, and the factors: trained, then the anchor's."""
    torch.manual_seed(0)
    shapes = [(TOKENS, OUT), (TOKENS, IN), *[(RANK, IN), (OUT, RANK)] * (2 if anchored else 1)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def step(output: Tensor, x: Tensor, a: Tensor, b: Tensor, *anchor: Tensor) -> Tensor:
    return add_change(output, x, (a, b), anchor or None, 1.7)


def defined(output: Tensor, x: Tensor, a: Tensor, b: Tensor, *anchor: Tensor) -> Tensor:
    """output + s·x·(B·A − B0·A0)ᵀ, as the words say."""
    a0, b0 = anchor or (torch.zeros_like(a), torch.zeros_like(b))
    return output + 1.7 * x @ ((b0 + b) @ (a0 + a) - b0 @ a0).T


@pytest.fixture(params=[False, True], ids=["plain", "anchored"])
def anchored(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_the_change_is_the_one_defined(anchored):
    values = numbers(anchored)
    torch.testing.assert_close(step(*values), defined(*values), rtol=1e-13, atol=1e-13)


def test_first_and_second_derivatives_are_those_of_finite_differences(anchored):
    values = numbers(anchored)
    for value in values[:4]:
        value.requires_grad_()
    assert torch.autograd.gradcheck(step, values)
    assert torch.autograd.gradgradcheck(step, values)


@pytest.mark.parametrize("trained", [(), (0,), (1,), (2,), (3,), (1, 3), (2, 3)])
def test_whatever_is_trained_gets_its_gradient_and_nothing_else_does(anchored, trained):
    got, expected = numbers(anchored), numbers(anchored)
    for values in (got, expected):
        for place in trained:
            values[place].requires_grad_()
    if not trained:
        assert not step(*got).requires_grad
        return
    step(*got).square().sum().backward()
    defined(*expected).square().sum().backward()
    for mine, true in zip(got, expected, strict=True):
        if true.grad is None:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad, true.grad, rtol=1e-12, atol=1e-12)


def test_functional_transforms_see_through_it(anchored):
    output, x, *factors = numbers(anchored)

    def loss(a: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return step(out, x, a, *factors[1:]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    found = each(factors[0], output, x)
    for token in range(TOKENS):
        a = factors[0].clone().requires_grad_()
        defined(output[token], x[token], a, *factors[1:]).square().sum().backward()
        torch.testing.assert_close(found[token], a.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [1.7, -1.7])
def test_a_change_of_zero_keeps_every_bit_also_the_sign_of_zeros(anchored, dtype, scaling):
    output, x, a, b, *anchor = numbers(anchored, torch.float32)
    output = output.to(dtype)
    output[::2] = -0.0
    a = torch.zeros_like(a) if anchored else a
    got = add_change(output, x.to(dtype), (a, torch.zeros_like(b)), anchor or None, scaling)
    assert got.dtype == dtype
    assert bits(got) == bits(output)


@contextmanager
def kept_bytes(seen: dict[int, int]) -> Iterator[None]:
    """What autograd keeps within the block: storage -> bytes."""

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "lora"])
def test_only_the_input_as_it_came_and_r_numbers_per_token_are_kept(dtype, init):
    tokens, width, rank = 64, 32, 2
    model = nn.ModuleDict({name: nn.Linear(width, width) for name in "qkv"}).to(dtype)
    handle = tether.attach(model, tether.LoraConfig(init=init, rank=rank))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    x = torch.randn(tokens, width, dtype=dtype).requires_grad_()
    seen: dict[int, int] = {}
    with kept_bytes(seen):
        outputs = [model[name](x) for name in "qkv"]
    assert len(list(handle.parameters())) == 6
    assert all(output.requires_grad for output in outputs)
    kept = {pointer: size for pointer, size in seen.items() if pointer not in own}
    assert kept.pop(x.untyped_storage().data_ptr()) == tokens * width * dtype.itemsize
    assert sorted(kept.values()) == [tokens * rank * 4] * 3


def test_an_adapter_that_is_not_trained_keeps_no_input():
    model = nn.ModuleDict({"site": nn.Linear(8, 8)})
    tether.attach(model, tether.LoraConfig(rank=2), trainable=False)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    seen: dict[int, int] = {}
    with kept_bytes(seen):
        model["site"](x).sum().backward()
    assert not seen.keys() - own
    assert x.grad is not None


def test_anchors_are_computed_with_in_the_precision_of_what_is_trained():
    # Sharded with a policy of mixed precision the trained factors arrive in bfloat16.
    output, x, a, b, *anchor = numbers(True, torch.float32)
    low = [t.bfloat16() for t in (output, x, a, b)]
    for value in low:
        value.requires_grad_()
    got = step(*low, *anchor)
    got.sum().backward()
    assert got.dtype == torch.bfloat16
    assert [value.grad.dtype for value in low] == [torch.bfloat16] * 4
    torch.testing.assert_close(got.float(), defined(output, x, a, b, *anchor), rtol=0.1, atol=0.5)


def test_under_autocast_the_products_are_in_its_precision(anchored):
    values = numbers(anchored, torch.float32)
    zeros = [torch.zeros_like(value) for value in values[4:]]
    for value in values[:4]:
        value.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = step(*values)
        unchanged = step(*values[:3], torch.zeros_like(values[3]), *zeros)
    got.sum().backward()
    assert got.dtype == torch.float32
    assert bits(unchanged) == bits(values[0])  # the output itself is not rounded
    expected = step(*values)
    error = (got - expected).norm() / expected.norm()
    assert 1e-5 < error < 2**-6  # two products with three rounded factors
    assert all(value.grad.dtype == torch.float32 for value in values[:4])


def test_switching_between_equal_ranks_compiles_each_only_once():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for name, alpha in (("a", 2), ("b", 4)):
        config = tether.LoraConfig(rank=2, alpha=alpha, seed=alpha, target_modules="*")
        handle = tether.attach(model, config, name)
        for parameter in handle.parameters():
            parameter.data.normal_()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(3, 8)
    for name in ("a", "b", "a", "b", "a"):
        tether.activate(model, name)
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).sum().backward()
    assert counter.frame_count == 2
    torch.compiler.reset()
