"""torchao: int8 weights (`Int8WeightOnlyConfig`), with one scale per row or group."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tether.errors import UnsupportedModuleError
from tether.quantized.stored import Quantized
from tether.value import Json


def read(label: str, weight: Tensor, module: nn.Module | None) -> Quantized | None:
    """Read a weight of torchao.

    Args:
        label: what to call it in the message.
        weight: any tensor with values.
        module: that holds it, if known.

    Returns:
        the quantised weight, or None if it is no int8 weight of torchao.

    Raises:
        UnsupportedModuleError: its layer rounds the activations too.
    """
    del module
    kind = type(weight)
    if kind.__name__ != "Int8Tensor" or not kind.__module__.startswith("torchao."):
        return None
    held: Any = weight
    if getattr(held, "act_quant_kwargs", None) is not None:
        raise UnsupportedModuleError(
            f"{label}: torchao rounds the activations here as well, which passes no gradients on. "
            "Use Int8WeightOnlyConfig, or exclude the module."
        )
    names = ("qdata", "scale", "zero_point")
    parts = {n: getattr(held, n) for n in names if getattr(held, n, None) is not None}
    settings: dict[str, Json] = {"block size": [int(n) for n in held.block_size]}
    expand = partial(held.detach().dequantize, torch.float32)
    return Quantized("torchao int8", tuple(weight.shape), parts, settings, expand)
