"""bitsandbytes: 4-bit codes of blocks (nf4, fp4), and 8-bit rows.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 (nf4, double quantisation); 2022,
arXiv:2208.07339, section 2.1 (row-wise int8).
"""

import copy
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tether.errors import UnsupportedModuleError
from tether.quantized.stored import Quantized

_LOST = (
    "%s: bitsandbytes has packed this weight anew for evaluation on this CPU, with coarser scales, "
    "so that whose it is cannot be told. Load the model again and attach before it is first "
    "evaluated, or insist with verify=False."
)
_LARGEST = 127  # of an int8 code: the row's scale is what it stands for


def read(label: str, weight: Tensor, module: nn.Module | None) -> Quantized | None:
    """Read a weight of bitsandbytes.

    Args:
        label: what to call it in the message.
        weight: any tensor with values.
        module: that holds it, if known.

    Returns:
        the quantised weight, or None if it is not one of bitsandbytes.

    Raises:
        UnsupportedModuleError: it is, but not (or no longer) in a form that can be read.
    """
    name = type(weight).__name__
    if not type(weight).__module__.startswith("bitsandbytes."):
        return None
    if name == "Params4bit":
        return _four_bit(label, weight, module)
    if name == "Int8Params":
        return _eight_bit(label, weight, module)
    return None


def _four_bit(label: str, weight: Tensor, module: nn.Module | None) -> Quantized:
    # Sharding loses the attribute of the weight, not that of the module.
    state: Any = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise _not_yet(label)
    if state.quant_type not in ("nf4", "fp4"):
        raise UnsupportedModuleError(
            f"{label}: bitsandbytes {state.quant_type!r} is none of nf4, fp4. Load the base "
            "unquantised, or exclude the module."
        )
    kind, shape = f"bitsandbytes {state.quant_type}", tuple(state.shape)
    if getattr(state, "packing_format_for_cpu", False):
        return Quantized(
            kind, shape, {}, {}, partial(_unpack, weight.detach(), state), _LOST % label
        )
    # As bytes: the dtype that they are kept in is FSDP's concern.
    parts = {"codes": weight.detach().view(torch.uint8).reshape(-1)}
    parts |= {"absmax": state.absmax, "table": state.code}
    settings = {"blocksize": state.blocksize, "nested": bool(state.nested)}
    if state.nested:
        inner = state.state2
        parts |= {"offset": state.offset, "inner absmax": inner.absmax, "inner table": inner.code}
        settings["inner blocksize"] = inner.blocksize
    return Quantized(kind, shape, parts, settings, partial(_expand, weight.detach(), state))


def _expand(codes: Tensor, state: Any) -> Tensor:
    wide = copy.copy(state)
    wide.dtype = torch.float32  # not the dtype that the base was loaded in: exact
    # By name: the library is not needed until someone has such a weight.
    found: Tensor = import_module("bitsandbytes.functional").dequantize_4bit(codes.data, wide)
    return found.reshape(tuple(state.shape))


def _unpack(codes: Tensor, state: Any) -> Tensor:
    """The values that a weight packed for evaluation computes with: scales in bfloat16."""
    functional = import_module("bitsandbytes.functional")
    wide = copy.copy(state)
    wide.original_nested = False  # packing has dissolved it
    codes, wide = functional._convert_weight_packed_for_cpu_inverse(codes.data, wide)
    wide.absmax = state.absmax.T.reshape(-1).float()
    return _expand(codes, wide)


def _eight_bit(label: str, weight: Tensor, module: nn.Module | None) -> Quantized | None:
    if weight.is_floating_point():
        if getattr(weight, "has_fp16_weights", False):
            return None  # quantised anew in every forward pass; the weight is what it says
        raise _not_yet(label)
    # The first forward pass moves the scales from the weight to the module.
    held = (weight, getattr(module, "state", None))
    scales = next((s for s in (getattr(h, "SCB", None) for h in held) if s is not None), None)
    if scales is None:
        raise UnsupportedModuleError(
            f"{label}: an int8 weight of bitsandbytes without its scales (SCB). Load the base "
            "again, or exclude the module."
        )
    codes = weight.detach().as_subclass(Tensor)
    parts = {"codes": codes, "scales": scales.detach()}
    return Quantized(
        "bitsandbytes int8", tuple(weight.shape), parts, {}, lambda: _rows(codes, scales)
    )


def _rows(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * (scales.float() / _LARGEST).to(codes.device)[:, None]


def _not_yet(label: str) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"{label}: bitsandbytes quantises it when the model is moved to a device, which has not "
        "happened. Call model.to(device) first, also for the CPU."
    )
