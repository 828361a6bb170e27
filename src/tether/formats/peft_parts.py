"""Sort the tensors of a PEFT file: factors, DoRA magnitudes, biases, whole modules, base copies."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tether.errors import ConfigError
from tether.formats import peft_names as names
from tether.linalg import check_finite
from tether.value import Json, Trained

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_NAMES = 4096
_BIAS = ("none", "lora_only", "all")


@dataclass(slots=True)
class Parts:
    """The tensors of a PEFT file by what they are.

    Attributes:
        factors: key -> tensor, to be read as lora_A, lora_B and so on; whatever nothing else is.
        magnitudes: site path -> row lengths (out,).
        biases: module path -> trained bias.
        modules: module path -> parameter name -> trained value.
        base: site path -> copy of its base weight, which tells the base and is no change.
    """

    factors: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Trained] = field(default_factory=dict)
    biases: dict[str, Trained] = field(default_factory=dict)
    modules: dict[str, dict[str, Trained]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)


def sort(config: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> Parts:
    """Sort the tensors of a file.

    Args:
        config: of the folder.
        tensors: key -> tensor.

    Returns:
        the parts; magnitudes, biases and modules in float32, without anchors, which such a file
        does not hold.

    Raises:
        ConfigError: a setting that cannot be meant, or a module of which nothing is in the file.
        NonFiniteError: a value is NaN or Inf.
    """
    bias, saved = _settings(config)
    parts = Parts()
    for key, tensor in tensors.items():
        path = key.removeprefix(names.PREFIX)
        module = _saved_module(path, saved)
        if path == key:
            parts.factors[key] = tensor
        elif module is not None:
            _place_in_module(parts, path, module, bias, tensor)
        elif not _place(parts, path, bias, bool(config.get("use_dora")), tensor):
            parts.factors[key] = tensor
    for name in saved:
        if not any(_ends(module, name) for module in parts.modules):
            raise ConfigError(f"modules_to_save names {name!r}, of which the file holds nothing.")
    return parts


def _place_in_module(parts: Parts, path: str, module: str, bias: str, tensor: Tensor) -> None:
    """Put a tensor of a whole module where it belongs."""
    name = path[len(module) + 1 :]
    if bias == "all" and name.split(".", 1)[0] in ("modules_to_save", "original_module"):
        # Then peft writes the biases of whole modules again, under the names of its wrapper.
        return
    parts.modules.setdefault(module, {})[name] = _trained(path, tensor)


def _place(parts: Parts, path: str, bias: str, dora: bool, tensor: Tensor) -> bool:
    """Put a tensor where it belongs; False for factors, and for what is not known."""
    if path.endswith(names.SITE_WEIGHT):
        parts.base[path.removesuffix(names.SITE_WEIGHT)] = tensor
    elif path.endswith(names.SITE_BIAS):
        # Without trained biases it is the base's own, which peft adds to embeddings.
        if bias != "none":
            parts.biases[path.removesuffix(names.SITE_BIAS)] = _trained(path, tensor)
    elif dora and path.endswith(names.MAGNITUDE):
        parts.magnitudes[path.removesuffix(names.MAGNITUDE)] = _trained(path, tensor.flatten())
    elif bias == "all" and path.endswith(names.BIAS) and ".lora_" not in path:
        parts.biases[path.removesuffix(names.BIAS)] = _trained(path, tensor)
    else:
        return False
    return True


def _settings(config: Mapping[str, Json]) -> tuple[str, list[str]]:
    bias, saved = config.get("bias", "none"), config.get("modules_to_save") or []
    if bias not in _BIAS:
        raise ConfigError(f"bias is {bias!r}, none of {', '.join(_BIAS)}.")
    if not (isinstance(config.get("use_dora"), bool | None)):
        raise ConfigError(f"use_dora is {config['use_dora']!r}, not true or false.")
    plain = isinstance(saved, list) and all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]{1,512}", name) for name in saved
    )
    if not plain:
        raise ConfigError(f"modules_to_save is {saved!r}, not a list of module names.")
    assert isinstance(saved, list)
    if len(saved) > _MAX_NAMES:
        raise ConfigError(f"modules_to_save has {len(saved)} names; at most {_MAX_NAMES} are read.")
    return str(bias), [str(name) for name in saved]


def _saved_module(path: str, saved: list[str]) -> str | None:
    """The shortest beginning of a path that a name of modules_to_save selects.

    Time is names times length: a path may have any number of components.
    """
    # PEFT takes every module whose path ends in the text, at any character.
    places = ((path.find(f"{name}."), len(name)) for name in saved)
    ends = [place + length for place, length in places if place >= 0]
    return path[: min(ends)] if ends else None


def _ends(path: str, name: str) -> bool:
    return path.endswith(name)


def _trained(key: str, tensor: Tensor) -> Trained:
    if tensor.dtype not in _FLOATING:
        raise ConfigError(f"tensor {key!r} is {tensor.dtype}, which is not floating point.")
    value = tensor.to(torch.float32, copy=True)
    if not value.is_meta:  # where only the shapes are asked for
        check_finite(value, f"tensor {key!r} in float32")
    return Trained(value, None)
