"""Quantised weights: recognised, read as their libraries read them, told apart, or refused."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import tether
from tether import quantized, sites
from tether.errors import BaseMismatchError, MetaTensorError, UnsupportedModuleError

from .bases import (
    HIDDEN,
    INPUT,
    MAKERS,
    NAMES,
    OUTPUT,
    batch,
    bitsandbytes,
    eight_bit,
    expanded,
    floats,
    four_bit,
    net,
    torchao,
    weight_only,
)


def held(model: nn.Module, path: str = "0") -> quantized.Quantized:
    found = sites.stored_weight(path, model.get_submodule(path))
    assert isinstance(found, quantized.Quantized)
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_read_is_what_the_library_computes_with(name):
    model = MAKERS[name](net())
    for path, shape in (("0", (HIDDEN, INPUT)), ("2", (OUTPUT, HIDDEN))):
        found = held(model, path)
        values = found.dequantize()
        assert (found.kind, found.shape) == (NAMES[name], shape)
        assert (values.dtype, tuple(values.shape)) == (torch.float32, shape)
        theirs = expanded(model.get_submodule(path))
        # int8: we divide by 127, bitsandbytes multiplies by its reciprocal, rounded.
        torch.testing.assert_close(values, theirs, rtol=2e-7, atol=0)
        values.zero_()
        assert torch.equal(held(model, path).dequantize(), found.dequantize())
        assert found.dequantize().abs().max() > 0


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_base_has_the_same_fingerprint_before_and_after_use(name):
    model = MAKERS[name](net())
    before = held(model).fingerprint()
    model(batch()[0])
    assert held(model).fingerprint() == before == held(copy.deepcopy(model)).fingerprint()
    assert before == held(MAKERS[name](net())).fingerprint()
    assert before.dtype == NAMES[name]
    dense = tether.fingerprint(floats(model))["0.weight"]
    rounded = ("sha256_bfloat16", "sha256_float16")
    if name != "bitsandbytes int8":  # the last bit, see above
        assert all(getattr(before, field) == getattr(dense, field) for field in rounded)
    assert before.norm == pytest.approx(dense.norm, rel=1e-6)
    assert before.sha256 != dense.sha256


def parts_of(name: str) -> list[str]:
    return list(held(MAKERS[name](net())).parts)


@pytest.mark.parametrize(("name", "part"), [(name, p) for name in MAKERS for p in parts_of(name)])
def test_every_part_of_what_is_stored_is_in_the_fingerprint(name, part):
    model = MAKERS[name](net())
    found = held(model)
    before = found.digest()
    found.parts[part].reshape(-1)[:1].add_(1)  # the part itself, no copy
    assert held(model).digest() != before


def test_every_setting_is_in_the_fingerprint():
    found = held(four_bit(net(), nested=True))
    assert set(found.settings) == {"blocksize", "nested", "inner blocksize"}
    for key in found.settings:
        other = dataclasses.replace(found, settings={**found.settings, key: 7})
        assert other.digest() != found.digest()
    assert dataclasses.replace(found, kind="other").digest() != found.digest()
    assert dataclasses.replace(found, shape=found.shape[::-1]).digest() != found.digest()


def test_the_precision_a_base_is_loaded_in_changes_nothing():
    plain = net().bfloat16()
    narrow, wide = four_bit(plain), four_bit(copy.deepcopy(plain).float())
    assert narrow[0].weight.quant_state.dtype != wide[0].weight.quant_state.dtype
    assert held(narrow).fingerprint() == held(wide).fingerprint()
    assert torch.equal(held(narrow).dequantize(), held(wide).dequantize())


def test_bytes_kept_in_another_dtype_are_the_same_base():
    model, other = four_bit(net()), four_bit(net())
    codes = other[0].weight.data
    other[0].weight.data = codes.view(1, -1).view(torch.bfloat16).view(-1, 1)
    assert held(model).digest() == held(other).digest()
    assert torch.equal(held(model).dequantize(), held(other).dequantize())


def test_a_model_s_fingerprints_hold_its_quantised_weights():
    for make in MAKERS.values():
        prints = tether.fingerprint(make(net()))
        assert set(prints) == {"0.weight", "0.bias", "2.weight"}
        assert prints == tether.fingerprint(make(net()))
        assert prints["0.weight"] != tether.fingerprint(make(net(1)))["0.weight"]


class Unknown(Tensor):
    """A tensor that keeps its values in others, of a library that nobody knows."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "Unknown":
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        made.values = values
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values)
        raise AssertionError(f"{func} was called")


def whole_numbers(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.to(torch.int8), requires_grad=False)


def eighth(model: nn.Module) -> None:
    data = model[0].weight.to(torch.float8_e4m3fn)
    model[0].weight = nn.Parameter(data, requires_grad=False)


def wrapped(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(Unknown(model[0].weight.detach()), requires_grad=False)


def activations(model: nn.Module) -> None:
    config = torchao.quantization.Int8DynamicActivationInt8WeightConfig()
    torchao.quantization.quantize_(model, config)


def before_moving(model: nn.Module) -> None:
    weight = model[0].weight.detach()
    model[0] = bitsandbytes.nn.Linear4bit(INPUT, HIDDEN)
    model[0].weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False)


def before_moving_eight(model: nn.Module) -> None:
    model[0] = bitsandbytes.nn.Linear8bitLt(INPUT, HIDDEN, has_fp16_weights=False)


def without_scales(model: nn.Module) -> None:
    model[0] = eight_bit(model)[0]
    model[0].weight.SCB = None


def other_codes(model: nn.Module) -> None:
    model[0] = four_bit(model)[0]
    model[0].weight.quant_state.quant_type = "nf3"


def packed(model: nn.Module) -> None:
    """As bitsandbytes does in the first evaluation on processors that have bfloat16 products."""
    if not isinstance(model[0], bitsandbytes.nn.Linear4bit):
        model[0] = four_bit(model)[0]
    weight = model[0].weight
    pack = bitsandbytes.functional._convert_weight_packed_for_cpu
    weight.data, weight.quant_state = pack(weight.data, weight.quant_state)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_packed_for_evaluation_keeps_its_values_but_not_its_name(kind, nested):
    model = four_bit(net(), kind, nested)
    adapter = tether.init(model, tether.LoraConfig(rank=2, target_modules=["0"]))
    wanted = held(model).dequantize()
    packed(model)
    before = model[0].weight.data.clone(), copy.copy(model[0].weight.quant_state)
    # Its scales were rounded to bfloat16.
    torch.testing.assert_close(held(model).dequantize(), wanted, rtol=2**-8, atol=0)
    with pytest.raises(UnsupportedModuleError, match="packed this weight anew"):
        tether.attach(model, adapter)
    tether.attach(model, adapter, verify=False).detach()
    assert torch.equal(model[0].weight.data, before[0])
    assert vars(model[0].weight.quant_state).keys() == vars(before[1]).keys()
    assert model[0].weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (whole_numbers, r"site '0': weight of dtype torch.int8 in Linear is quantised in a way"),
        (eighth, r"dtype torch.float8_e4m3fn in Linear is quantised in a way that tether does"),
        (wrapped, r"float32 \(tests\.quantized\.test_read\.Unknown|\(.*test_read\.Unknown\)"),
        (activations, "torchao rounds the activations here as well"),
        (before_moving, r"site '0': weight: bitsandbytes quantises it when the model is moved"),
        (before_moving_eight, r"bitsandbytes quantises it when the model is moved"),
        (without_scales, r"an int8 weight of bitsandbytes without its scales \(SCB\)"),
        (other_codes, r"bitsandbytes 'nf3' is none of nf4, fp4"),
        (packed, "bitsandbytes has packed this weight anew"),
    ],
)
def test_what_is_not_known_is_refused_by_name(spoil, message):
    model = net()
    adapter = tether.init(model, tether.LoraConfig(rank=2))
    spoil(model)
    for attempt in (lambda: tether.init(model), lambda: tether.attach(model, adapter)):
        with pytest.raises(UnsupportedModuleError, match=message):
            attempt()
    assert not tether.handles(model)


def test_a_subclass_that_is_a_plain_tensor_is_read_as_before():
    class Named(Tensor):
        pass

    model, plain = net(), net()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Named))
    found = tether.init(model, tether.LoraConfig(rank=2))
    wanted = tether.init(plain, tether.LoraConfig(rank=2))
    assert torch.equal(found.layers["0"].anchor.A, wanted.layers["0"].anchor.A)


def test_a_quantised_weight_without_values_is_refused(tmp_path):
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(INPUT, HIDDEN, device="meta"))
    with pytest.raises(MetaTensorError, match="site '0': weight"):
        tether.init(model)
    weight, layer = model[0].weight, model[0]
    packed_ = torch.empty(weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
    layer.weight = bitsandbytes.nn.Params4bit(packed_, requires_grad=False)
    with pytest.raises(MetaTensorError, match="Load the quantised model first"):
        quantized.read("a weight", layer.weight, layer)


def test_weights_that_bitsandbytes_keeps_in_floating_point_are_plain():
    model = net()
    layer = bitsandbytes.nn.Linear8bitLt(INPUT, HIDDEN, has_fp16_weights=True)
    layer.weight = bitsandbytes.nn.Int8Params(model[0].weight.detach(), has_fp16_weights=True)
    assert sites.stored_weight("0", layer) is layer.weight


@pytest.mark.parametrize("name", MAKERS)
def test_other_bases_are_refused(name):
    adapter = tether.init(MAKERS[name](net()), tether.LoraConfig(rank=2))
    tether.attach(MAKERS[name](net()), adapter).detach()
    others = {other: make(net()) for other, make in MAKERS.items() if other != name}
    others |= {"other weights": MAKERS[name](net(1)), "full precision": net()}
    for other, model in others.items():
        with pytest.raises(BaseMismatchError, match="the adapter was made on") as caught:
            tether.attach(model, adapter)
        assert NAMES[name] in str(caught.value), other
        assert NAMES.get(other, "") in str(caught.value)
        assert not tether.handles(model)
    full = tether.init(net(), tether.LoraConfig(rank=2))
    with pytest.raises(BaseMismatchError, match=f"here is {NAMES[name]}"):
        tether.attach(MAKERS[name](net()), full)
    # The same values in plain layers are the same base in another precision.
    if name != "bitsandbytes int8":
        tether.attach(floats(MAKERS[name](net())), adapter)


def test_a_slot_remembers_quantised_weights_and_sees_them_change(monkeypatch):
    for make in (four_bit, eight_bit, weight_only):
        model = make(net())
        adapter = tether.init(model, tether.LoraConfig(rank=2))
        handle = tether.slot(model, rank=4)
        tether.swap(handle, adapter)
        with monkeypatch.context() as patch:
            patch.setattr(quantized.Quantized, "fingerprint", None)
            tether.swap(handle, adapter)
        held(model).parts[next(iter(held(model).parts))].reshape(-1)[:1].add_(1)
        with pytest.raises(BaseMismatchError):
            tether.swap(handle, adapter)


def test_importing_tether_imports_neither_library():
    code = "import sys, tether; print([n for n in ('bitsandbytes', 'torchao') if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
