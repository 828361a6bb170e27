"""Layers of other quantisation libraries: refused by name, never passed over, never written.

Real ones where transformers, torch and torchao have them. Of libraries that are not installed here
there are stand-ins with the class, its module and the tensors: those of hqq and optimum-quanto were
compared with real layers of 0.2.8 and 0.2.7, those of gptqmodel, autoawq and compressed-tensors
were not.
"""

import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.bitnet import AutoBitLinear, BitLinear
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.integrations.higgs import HiggsLinear

import tether
from tether.errors import NoSiteError, UnsupportedModuleError
from tether.fingerprints import raw_bytes
from tether.quantized import is_linear

from .bases import HIDDEN, INPUT, OUTPUT, net, torchao

ADAPTER = tether.LoraConfig(rank=2)


def stand_in(
    name: str, *, parameters: dict[str, Tensor], buffers: dict[str, Tensor], base: type = nn.Module
) -> nn.Module:
    """A layer of the class and with the tensors that the library's has."""
    module, _, kind = name.rpartition(".")
    made: nn.Module = object.__new__(type(kind, (base,), {"__module__": module}))
    nn.Module.__init__(made)
    for key, value in parameters.items():
        made.register_parameter(key, nn.Parameter(value, requires_grad=False))
    for key, value in buffers.items():
        made.register_buffer(key, value)
    made.in_features, made.out_features = INPUT, HIDDEN
    return made


def words(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def hqq() -> nn.Module:
    codes = words(HIDDEN, INPUT // 2, dtype=torch.uint8)
    return stand_in("hqq.core.quantize.HQQLinear", parameters={"W_q": codes}, buffers={})


def quanto() -> nn.Module:
    """Not frozen: the weight is a plain one, and rounded in each forward pass."""
    plain = {"weight": torch.randn(HIDDEN, INPUT), "bias": torch.zeros(HIDDEN)}
    return stand_in(
        "optimum.quanto.nn.qlinear.QLinear", parameters=plain, buffers={}, base=nn.Linear
    )


def gptq() -> nn.Module:
    buffers = {
        "qweight": words(INPUT // 8, HIDDEN),
        "qzeros": words(INPUT // 64, HIDDEN // 8),
        "scales": torch.ones(INPUT // 64, HIDDEN, dtype=torch.float16),
        "g_idx": words(INPUT),
    }
    name = "gptqmodel.nn_modules.qlinear.torch.TorchQuantLinear"
    return stand_in(name, parameters={}, buffers=buffers)


def awq() -> nn.Module:
    buffers = {
        "qweight": words(INPUT, HIDDEN // 8),
        "qzeros": words(INPUT // 64, HIDDEN // 8),
        "scales": torch.ones(INPUT // 64, HIDDEN, dtype=torch.float16),
    }
    return stand_in("awq.modules.linear.gemm.WQLinear_GEMM", parameters={}, buffers=buffers)


def compressed() -> nn.Module:
    """Of a `nn.Linear`, the weight is taken away."""
    parameters = {
        "weight_packed": words(HIDDEN, INPUT // 8),
        "weight_scale": torch.ones(HIDDEN, 1),
        "weight_shape": words(2, dtype=torch.int64),
    }
    return stand_in(
        "torch.nn.modules.linear.Linear", parameters=parameters, buffers={}, base=nn.Linear
    )


def higgs() -> nn.Module:
    return HiggsLinear(INPUT, HIDDEN, num_bits=4, group_size=64)


def dynamic() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have torchao used
        return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})[0]


def eighth() -> nn.Module:
    return FP8Linear(INPUT, HIDDEN)


def of_torchao(config: object) -> nn.Module:
    model = net()
    torchao.quantization.quantize_(model, config)
    return model[0]


LAYERS = {
    "hqq": (hqq, r"hqq\.core\.quantize\.HQQLinear, with W_q \(torch\.uint8\) for a weight"),
    "quanto": (quanto, r"optimum\.quanto\.nn\.qlinear\.QLinear is quantised"),
    "gptq": (gptq, r"TorchQuantLinear, with qweight \(torch\.int32\) and qzeros"),
    "awq": (awq, r"WQLinear_GEMM, with qweight \(torch\.int32\) and qzeros"),
    "compressed-tensors": (compressed, r"Linear, with weight_packed \(torch\.int32\)"),
    "bitnet": (lambda: BitLinear(INPUT, HIDDEN, False), r"BitLinear, with weight \(torch\.uint8\)"),
    "bitnet online": (lambda: AutoBitLinear(INPUT, HIDDEN), r"AutoBitLinear is quantised"),
    "higgs": (higgs, r"HiggsLinear, with weight \(torch\.int16\)"),
    "fp8": (eighth, r"weight of dtype torch\.float8_e4m3fn .*in FP8Linear is quantised"),
    "torch": (dynamic, r"torch\.ao\.nn\.quantized\.dynamic.*Linear is quantised"),
    "torchao float8": (
        lambda: of_torchao(torchao.quantization.Float8WeightOnlyConfig()),
        r"Float8Tensor\) in Linear is quantised",
    ),
    "torchao intx": (
        lambda: of_torchao(torchao.quantization.IntxWeightOnlyConfig()),
        r"IntxUnpackedToInt8Tensor\) in Linear is quantised",
    ),
}


def base(make) -> nn.Module:
    model = net()
    model[0] = make()
    return model


def held(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """What the model holds: which tensors, and their bytes where torch shows them."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = type(tensor) in (nn.Parameter, Tensor)
        content = raw_bytes(tensor.detach()).tobytes() if plain else b""
        found[name] = (id(tensor), tensor._version, content)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_refused_by_name_and_nothing_is_written(name):
    make, message = LAYERS[name]
    model, plain = base(make), tether.init(net(), ADAPTER)
    before = held(model)
    named = tether.LoraConfig(rank=2, target_modules=["0"])
    for attempt in (
        lambda: tether.init(model, ADAPTER),  # all-linear: not passed over
        lambda: tether.init(model, named),
        lambda: tether.attach(model, named),
        lambda: tether.attach(model, plain),
        lambda: tether.attach(model, plain, verify=False),
    ):
        with pytest.raises(UnsupportedModuleError, match=message) as caught:
            attempt()
        assert "site '0'" in str(caught.value)
        assert "bitsandbytes nf4" in str(caught.value)
        assert "exclude the module" in str(caught.value)
    assert not tether.handles(model)
    assert held(model) == before
    assert not hasattr(model[0], "tether")


@pytest.mark.parametrize("name", LAYERS)
def test_left_out_the_others_are_adapted(name):
    model = base(LAYERS[name][0])
    config = tether.LoraConfig(rank=2, exclude_modules=["0"])
    assert tether.attach(model, config).snapshot().layers.keys() == {"2"}


@pytest.mark.parametrize("name", ["hqq", "gptq", "bitnet", "compressed-tensors", "torchao intx"])
def test_it_is_not_trained_whole(name):
    config = tether.LoraConfig(rank=2, target_modules=["2"], modules_to_save=["0"])
    model = base(LAYERS[name][0])
    before = held(model)
    with pytest.raises(UnsupportedModuleError, match=r"'?0[.']"):
        tether.attach(model, config)
    assert held(model) == before


def test_fingerprints_of_whole_numbers_are_refused_not_left_out():
    """Two models with equal fingerprints are the same: codes must not be passed over."""
    with pytest.raises(UnsupportedModuleError, match=r"0\.W_q: hqq.*HQQLinear, with W_q"):
        tether.fingerprint(base(hqq))


def test_what_is_no_quantised_layer_is_not_taken_for_one():
    class Counted(nn.Module):
        """Sizes and whole numbers, and a weight all the same."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = OUTPUT
            self.weight = nn.Parameter(torch.eye(OUTPUT))
            self.register_buffer("index", torch.arange(OUTPUT))

    class Sizes(nn.Module):
        in_features = out_features = OUTPUT

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("position_ids", torch.arange(4))

    for other in (Counted(), Sizes(), Table(), nn.Linear(2, 2), nn.Embedding(2, 2)):
        assert not is_linear(other)
        model = net().append(other)
        config = tether.LoraConfig(rank=1, target_modules="all-linear", exclude_modules=["3"])
        assert tether.init(model, config).layers.keys() == {"0", "2"}
    with pytest.raises(UnsupportedModuleError, match="Counted cannot carry an adapter"):
        tether.init(net().append(Counted()), tether.LoraConfig(rank=1, target_modules=["3"]))
    with pytest.raises(NoSiteError):
        tether.init(nn.Sequential(Table()))
