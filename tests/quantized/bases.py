"""Two small networks and all the ways to quantise them."""

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # both complain of what they were built for
    import bitsandbytes
    import bitsandbytes.functional
    import torchao.quantization

    logging.disable(logging.NOTSET)

Net = nn.Module
INPUT, HIDDEN, OUTPUT = 128, 64, 32


def net(seed: int = 0) -> Net:
    """Two linear layers, one with a bias, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second = nn.Linear(INPUT, HIDDEN), nn.Linear(HIDDEN, OUTPUT, bias=False)
    return nn.Sequential(first, nn.GELU(), second)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((16, INPUT), (16, OUTPUT))
    first, second = (torch.randn(shape, generator=generator) for shape in shapes)
    return first, second


def _replaced(model: Net, make: Callable[[nn.Linear], nn.Module]) -> Net:
    quantised = copy.deepcopy(model)
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            layer = make(module)
            if module.bias is not None:
                layer.bias = nn.Parameter(module.bias.detach().clone())
            setattr(quantised, name, layer)
    return quantised.to("cpu")


def four_bit(model: Net, kind: str = "nf4", nested: bool = False) -> Net:
    def make(linear: nn.Linear) -> nn.Module:
        settings = {"quant_type": kind, "compress_statistics": nested}
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.float32,
            **settings,
        )
        weight = linear.weight.detach().clone()
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **settings)
        return layer

    return _replaced(model, make)


def eight_bit(model: Net) -> Net:
    def make(linear: nn.Linear) -> nn.Module:
        layer = bitsandbytes.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
        )
        weight = linear.weight.detach().clone()
        layer.weight = bitsandbytes.nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False
        )
        return layer

    return _replaced(model, make)


def weight_only(model: Net) -> Net:
    quantised = copy.deepcopy(model)
    torchao.quantization.quantize_(quantised, torchao.quantization.Int8WeightOnlyConfig())
    return quantised


MAKERS: dict[str, Callable[[Net], Net]] = {
    "nf4": four_bit,
    "nf4 nested": lambda model: four_bit(model, nested=True),
    "fp4": lambda model: four_bit(model, "fp4"),
    "fp4 nested": lambda model: four_bit(model, "fp4", nested=True),
    "bitsandbytes int8": eight_bit,
    "torchao int8": weight_only,
}
NAMES = {
    "nf4": "bitsandbytes nf4",
    "nf4 nested": "bitsandbytes nf4",
    "fp4": "bitsandbytes fp4",
    "fp4 nested": "bitsandbytes fp4",
    "bitsandbytes int8": "bitsandbytes int8",
    "torchao int8": "torchao int8",
}


def floats(model: Net) -> Net:
    """The quantised model's values in plain layers, by what the libraries make of them."""
    plain = net()
    for name, layer in plain.named_children():
        if isinstance(layer, nn.Linear):
            held = model.get_submodule(name)
            layer.weight = nn.Parameter(expanded(held), requires_grad=False)
            if layer.bias is not None:
                layer.bias = nn.Parameter(held.bias.detach().clone())
    return plain


def expanded(layer: nn.Module) -> Tensor:
    """A layer's weight, as its own library dequantises it."""
    weight = layer.weight
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(weight, bitsandbytes.nn.Int8Params):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales)
    return weight.dequantize().detach()


def stored(model: nn.Module) -> dict[str, bytes]:
    """Every byte of a base: parameters, buffers, and what the libraries keep beside them."""
    held: dict[str, object] = {}
    for path, module in model.named_modules():
        if ".tether" in f".{path}":
            continue
        own = {**module._parameters, **module._buffers}
        held |= {f"{path}.{name}": tensor for name, tensor in own.items()}
        weight = own.get("weight")
        for key in ("qdata", "scale", "zero_point"):
            held[f"{path}.{key}"] = getattr(weight, key, None)
        state = getattr(weight, "quant_state", None)
        for holder, name in ((state, "state"), (getattr(state, "state2", None), "inner")):
            for key in ("absmax", "code", "offset"):
                held[f"{path}.{name}.{key}"] = getattr(holder, key, None)
        if isinstance(weight, bitsandbytes.nn.Int8Params):
            # The first forward pass moves it.
            held[f"{path}.scales"] = weight.SCB if weight.SCB is not None else module.state.SCB
    return {
        name: bytes(value.detach().as_subclass(Tensor).reshape(-1).view(torch.uint8).numpy())
        for name, value in held.items()
        if isinstance(value, Tensor) and not type(value).__module__.startswith("torchao")
    }


def save_llama(folder: Path, seed: int = 0, **settings: object) -> Path:
    """A random Llama on disk, large enough for blocks of 64."""
    shape = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**{**shape, **settings})
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


SETTINGS: dict[str, dict[str, object]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def load_llama(folder: Path, kind: str | None = "nf4") -> transformers.PreTrainedModel:
    """As people load it; kind None for the model as it was saved."""
    quantisation = {}
    if kind is not None:
        config = transformers.BitsAndBytesConfig(**SETTINGS[kind])
        quantisation = {"quantization_config": config, "device_map": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **quantisation
    )
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(2))
