"""The adapter as peft saved it before training: a folder that holds A0 and B0."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tether.errors import (
    ConfigError,
    NotAnAdapterError,
    PickleRefusedError,
    ShapeMismatchError,
    UnknownNameError,
    UnsupportedAdapterError,
)
from tether.formats import container, peft_parts
from tether.formats import peft_names as names
from tether.integrations.peft.live import Live
from tether.integrations.peft.originals import Part
from tether.integrations.peft.place import Place
from tether.value import Factors, Json

_MAX_CONFIG = 4 * 2**20  # bytes of adapter_config.json
# By these peft chooses the scaling of a site.
_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def read_start(live: Live, name: str, folder: Path) -> tuple[dict[str, Part], dict[str, Tensor]]:
    """Read the start of a live adapter.

    Args:
        live: the peft model.
        name: of the adapter on it.
        folder: that peft's save_pretrained wrote before training. Only read.

    Returns:
        site path -> initial factors and scaling; module path -> initial bias. float32.

    Raises:
        NotAnAdapterError: it is no folder of a LoRA.
        PickleRefusedError: its weights are a .bin.
        ConfigError: it was made with other ranks or scalings than the live adapter.
        UnknownNameError: it has other sites.
        ShapeMismatchError: a factor has another shape.
    """
    config = _read_config(folder, name)
    _check_scaling(live, name, config, folder)
    weights = folder / names.WEIGHTS
    if not weights.is_file():
        if (folder / names.PICKLED_WEIGHTS).exists():
            raise PickleRefusedError(
                f"{folder / names.PICKLED_WEIGHTS}: is a pickle; reading it can run code, so it is "
                "refused. Where you trust it, load it with torch.load(…, weights_only=True) and "
                f"write it with safetensors.torch.save_file as {names.WEIGHTS}."
            )
        raise NotAnAdapterError(f"{weights}: there is no such file. Give the whole folder.")
    parts = peft_parts.sort(config, container.read(weights)[0])
    biases = {path: bias.current for path, bias in parts.biases.items()}
    return _pair(live.sites(name), name, parts.factors, folder), biases


def _pair(
    sites: Mapping[str, Place], name: str, tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, Part]:
    wanted = {}
    for path, place in sites.items():
        embedding = place.layout.kind == "embedding"
        ends = (names.EMBEDDING_A, names.EMBEDDING_B) if embedding else (names.A, names.B)
        wanted[path] = tuple(names.PREFIX + path + end for end in ends)
    keys = {key for pair in wanted.values() for key in pair}
    for key in sorted(keys ^ set(tensors)):
        where = "the live adapter has, but not" if key in keys else "is in"
        other = "" if key in keys else ", but not in the live adapter"
        raise UnknownNameError(
            f"{folder}: {key!r} {where} this folder{other}. Give the folder of adapter {name!r} "
            "as it was saved before training, not converted."
        )
    found = {}
    for path, pair in wanted.items():
        place = sites[path]
        for key, live in zip(pair, place.parameters(name), strict=True):
            _check(key, tensors[key], live, folder)
        a, b = (tensors[key].to(torch.float32, copy=True).flatten(1) for key in pair)
        found[path] = Part(Factors(a, b), _initial_scaling(place, name), place.layout)
    return found


def _check(key: str, saved: Tensor, live: Tensor, folder: Path) -> None:
    if saved.shape != live.shape:
        raise ShapeMismatchError(
            f"{folder}: {key!r} is {tuple(saved.shape)}, in the live adapter {tuple(live.shape)}. "
            "Give the folder of this adapter as it was saved before training, not converted."
        )
    if not saved.is_floating_point() or saved.dtype.itemsize < live.dtype.itemsize:
        raise ConfigError(
            f"{folder}: {key!r} is {saved.dtype}, in the live adapter {live.dtype}: what training "
            "changed may be smaller than the rounding. Give the folder as peft saved it."
        )


def _initial_scaling(place: Place, name: str) -> float:
    """The scaling that peft chose when it made the adapter, whatever set_scale did since."""
    alpha, rank = place.lora.lora_alpha[name], place.lora.r[name]
    return float(alpha / (math.sqrt(rank) if place.lora.use_rslora[name] else rank))


def _read_config(folder: Path, name: str) -> dict[str, Json]:
    path = folder / names.CONFIG
    if not path.is_file():
        inner = folder / name
        hint = f" peft saves this adapter in {inner}." if (inner / names.CONFIG).is_file() else ""
        raise NotAnAdapterError(
            f"{folder}: there is no {names.CONFIG} in it.{hint} Give the folder that the adapter "
            "was saved to before training."
        )
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_MAX_CONFIG + 1)
    config = container.parse_json(text, str(path), _MAX_CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise NotAnAdapterError(f"{path}: is not the configuration of a LoRA.")
    return config


def _check_scaling(live: Live, name: str, saved: Mapping[str, Json], folder: Path) -> None:
    config = live.config(name)
    for field in _SCALING:
        here, there = getattr(config, field), saved.get(field)
        if (here or None) != (there or None):
            raise ConfigError(
                f"{folder}: was made with {field}={there!r}, the live adapter with {here!r}. Give "
                "the folder of this adapter as it was saved before training."
            )
    if saved.get("bias", "none") != config.bias:
        raise UnsupportedAdapterError(
            f"{folder}: was made with bias={saved.get('bias')!r}, the live adapter with "
            f"{config.bias!r}."
        )
