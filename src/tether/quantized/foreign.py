"""Layers whose quantised weight tether cannot read: told by class or by what they hold, refused.

They need not be `nn.Linear` at all, so that a search for linear layers would pass over them.
"""

import torch
from torch import nn

from tether.errors import UnsupportedModuleError

KNOWN = "bitsandbytes nf4, fp4, int8 and torchao int8"
# Of these even a layer that looks like any other computes with a rounded weight.
_LIBRARIES = (
    *("hqq.", "optimum.quanto."),
    *("torch.ao.nn.quantized.", "transformers.integrations.bitnet."),
)
_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))
_CODES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_layer(label: str, module: nn.Module) -> None:
    """Raise for a layer whose weight is quantised in a way that is not known.

    What a `nn.Linear` holds in `weight` is judged by `read`.

    Args:
        label: what to call it in the message.
        module: any; read only.

    Raises:
        UnsupportedModuleError: naming its class and what it holds.
    """
    codes = _codes(module)
    if not codes and not _of_library(module):
        return
    kind = type(module)
    holds = f", with {' and '.join(codes)} for a weight," if codes else ""
    raise UnsupportedModuleError(
        f"{label}: {kind.__module__}.{kind.__name__}{holds} is quantised in a way that "
        f"tether does not know; {KNOWN} it does. Load the base in one of these or unquantised, or "
        "exclude the module."
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module that is no `nn.Linear` stands for one, with a weight that is not known.

    Args:
        module: any; read only.

    Returns:
        True if `check_layer` refuses it and it says how many features go in and out.
    """
    return _has_sizes(module) and (bool(_codes(module)) or _of_library(module))


def _of_library(module: nn.Module) -> bool:
    return any(f"{cls.__module__}.".startswith(_LIBRARIES) for cls in type(module).__mro__)


def _has_sizes(module: nn.Module) -> bool:
    pairs = [[getattr(module, name, None) for name in names] for names in _SIZES]
    return any(all(isinstance(size, int) for size in pair) for pair in pairs)


def _codes(module: nn.Module) -> list[str]:
    """The packed tensors of a linear layer that has them in the place of a weight."""
    own = {**module._parameters, **module._buffers}
    weight = own.get("weight")
    plain = weight is not None and (isinstance(module, nn.Linear) or weight.is_floating_point())
    if plain or not _has_sizes(module):
        return []
    return [
        f"{name} ({tensor.dtype})"
        for name, tensor in own.items()
        if tensor is not None and tensor.dtype in _CODES and tensor.ndim
    ]
