"""Write a plain LoRA as the PEFT folder that every reader understands alike.

Canonical form: the scaling folded into B and `lora_alpha` = `r`, an integer; one rank for all
sites (zero rows added); no patterns; no rsLoRA; only lora_A/lora_B and lora_embedding_A/B, and
where they were asked for DoRA's lora_magnitude_vector, trained biases and modules_to_save.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from tether import fs
from tether.algebra import balanced
from tether.errors import ConfigError, UnsupportedAdapterError
from tether.formats import peft_names as names
from tether.formats.card import model_card
from tether.linalg import check_finite
from tether.value import Adapter, Factors, Json, LayerAdapter, Trained

DTYPES = {t: str(t).removeprefix("torch.") for t in (torch.float32, torch.bfloat16, torch.float16)}


def save(
    adapter: Adapter, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> None:
    """Write the folder: built aside, renamed once.

    Args:
        adapter: plain: no site has an anchor (see `tether.to_lora`).
        path: of the folder; an older adapter there is replaced, other files are refused.
        dtype: float32, bfloat16 or float16.

    Raises:
        ConfigError: another dtype, or an anchored adapter.
        UnsupportedAdapterError: a site that PEFT cannot express, by name.
        NonFiniteError: a value does not fit `dtype`.
        WriteError: it cannot be written; what was there stays.
    """
    check_expressible(adapter)
    tensors: dict[str, Tensor] = {}
    for site, layer in canonical(adapter, dtype).items():
        tensors |= layer_tensors(site, layer)
    tensors |= {key: whole_tensor(key, value, dtype) for key, value in whole_keys(adapter)}
    with fs.atomic_directory(path, names.FILES) as folder:
        save_file(tensors, folder / names.WEIGHTS, {"format": "pt"})
        write_description(folder, adapter, dtype)


def write_description(folder: Path, adapter: Adapter, dtype: torch.dtype) -> None:
    """Write the configuration and the model card.

    Args:
        folder: not yet in its place.
        adapter: plain; its factors are not read.
        dtype: of the weights.
    """
    config = json.dumps(config_of(adapter), indent=2)
    (folder / names.CONFIG).write_text(config + "\n", encoding="utf-8")
    (folder / names.CARD).write_text(model_card(adapter, DTYPES[dtype]), encoding="utf-8")


def canonical(adapter: Adapter, dtype: torch.dtype = torch.float32) -> dict[str, LayerAdapter]:
    """The layers as they are written: scaling 1, one rank, in the written dtype.

    Args:
        adapter: plain.
        dtype: float32, bfloat16 or float16.

    Returns:
        site path -> layer whose factors are the numbers in the file.

    Raises:
        ConfigError: another dtype, or an anchored adapter.
        UnsupportedAdapterError: a site that PEFT cannot express.
        NonFiniteError: a value does not fit `dtype`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype} is none of {', '.join(DTYPES.values())}.")
    rank = max(layer.rank for layer in adapter.layers.values())
    return {
        site: canonical_layer(site, layer, rank, dtype) for site, layer in adapter.layers.items()
    }


def canonical_layer(site: str, layer: LayerAdapter, rank: int, dtype: torch.dtype) -> LayerAdapter:
    """One layer as it is written.

    Args:
        site: its path.
        layer: plain.
        rank: of the file.
        dtype: float32, bfloat16 or float16.

    Returns:
        a layer of scaling 1 whose factors are the numbers in the file.

    Raises:
        ConfigError: it is anchored.
        UnsupportedAdapterError: PEFT cannot express it.
        NonFiniteError: a value does not fit `dtype`.
    """
    if layer.anchor is not None:
        raise ConfigError(f"site {site!r} has an anchor; make it plain with tether.to_lora.")
    if not layer.layout.common:
        raise UnsupportedAdapterError(
            f"site {site!r}: PEFT's LoRA ignores the dilation or padding mode of this "
            "convolution, so its output would differ. Save the native file instead."
        )
    factors = _padded(balanced(layer), rank).to(dtype)
    for name, factor in (("A", factors.A), ("B", factors.B)):
        check_finite(factor, f"site {site!r}: factor {name} in {DTYPES[dtype]}")
    return LayerAdapter(factors, None, 1.0, layer.layout, layer.dropout, layer.magnitude)


def _padded(factors: Factors, rank: int) -> Factors:
    more = rank - factors.rank
    return Factors(pad(factors.A, (0, 0, 0, more)), pad(factors.B, (0, more)))


def layer_tensors(site: str, layer: LayerAdapter) -> dict[str, Tensor]:
    """The tensors of one site under PEFT's keys.

    Args:
        site: its path.
        layer: as of `canonical_layer`.

    Returns:
        key -> tensor. A DoRA magnitude stays float32: rounded, it would scale whole rows.
    """
    a, b = layer.trainable.A, layer.trainable.B
    stem = names.PREFIX + site
    found = {}
    if layer.magnitude is not None:
        spatial = len(layer.layout.shape) - 2 if layer.layout.kind == "conv" else None
        lengths = layer.magnitude.current.float()
        check_finite(lengths, f"site {site!r}: magnitude")
        shape = (-1,) if spatial is None else (1, -1, *[1] * spatial)
        found[stem + names.MAGNITUDE] = lengths.reshape(shape).contiguous()
    if layer.layout.kind == "embedding":
        return found | {stem + names.EMBEDDING_A: a, stem + names.EMBEDDING_B: b}
    if layer.layout.kind == "conv":
        _, channels, *kernel = layer.layout.shape
        a, b = a.reshape(-1, channels, *kernel), b.reshape(*b.shape, *(1 for _ in kernel))
    return found | {stem + names.A: a, stem + names.B: b}


def whole_keys(adapter: Adapter) -> Iterator[tuple[str, Trained]]:
    """Trained biases and whole modules under PEFT's keys.

    Args:
        adapter: anchored or plain.

    Yields:
        (key, parameter); the file holds the parameter's `current` value.
    """
    for path, bias in adapter.biases.items():
        yield bias_key(adapter, path), bias
    for path, state in adapter.modules.items():
        yield from ((module_key(path, name), value) for name, value in state.items())


def bias_key(adapter: Adapter, path: str) -> str:
    """PEFT's key of a trained bias.

    Args:
        adapter: its factors are not read.
        path: of the module.

    Returns:
        the key.
    """
    return names.PREFIX + path + (names.SITE_BIAS if path in adapter.layers else names.BIAS)


def module_key(path: str, name: str) -> str:
    """PEFT's key of a parameter of a whole module.

    Args:
        path: of the module.
        name: of the parameter in it.

    Returns:
        the key.
    """
    return f"{names.PREFIX}{path}.{name}"


def whole_tensor(key: str, value: Trained, dtype: torch.dtype) -> Tensor:
    """A parameter trained whole as it is written.

    Args:
        key: for the message.
        value: with or without an anchor.
        dtype: of the file.

    Returns:
        the parameter itself.

    Raises:
        NonFiniteError: it does not fit `dtype`.
    """
    tensor = value.current.to(dtype).contiguous()
    check_finite(tensor, f"{key} in {DTYPES[dtype]}")
    return tensor


def _auto_mapping(adapter: Adapter) -> dict[str, Json] | None:
    """Where peft's auto classes find the base's class; only ever a name inside transformers."""
    full = adapter.provenance.base_class or ""
    if not re.fullmatch(r"transformers(\.\w+)+", full, re.ASCII):
        return None
    library, _, name = full.rpartition(".")
    return {"base_model_class": name, "parent_library": library}


def check_expressible(adapter: Adapter) -> None:
    """Raise for what PEFT's configuration cannot say.

    Args:
        adapter: its factors are not read.

    Raises:
        UnsupportedAdapterError: naming the module.
    """
    for path in adapter.modules:
        # PEFT picks the modules whose path ends in the text, at any character.
        others = (*adapter.layers, *adapter.biases, *adapter.excluded)
        hit = next((other for other in others if other.endswith(path)), None)
        if hit is not None:
            raise UnsupportedAdapterError(
                f"module {path!r} of modules_to_save: PEFT would take {hit!r} for it, whose path "
                "ends alike. Save the native file instead."
            )
    for name in adapter.excluded:
        hit = next((site for site in adapter.layers if site.endswith("." + name)), None)
        if hit is not None:
            raise UnsupportedAdapterError(
                f"site {hit!r}: PEFT selects modules by the end of their path, and cannot tell it "
                f"from {name!r}, which the adapter leaves alone. Save the native file instead."
            )


def config_of(adapter: Adapter) -> dict[str, Json]:
    """The contents of adapter_config.json.

    Args:
        adapter: plain; its factors are not read, only their ranks.

    Returns:
        field -> value.
    """
    kinds = {layer.layout.kind for layer in adapter.layers.values()}
    rank = max(layer.rank for layer in adapter.layers.values())
    dropout = max(layer.dropout for layer in adapter.layers.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": _auto_mapping(adapter),
        "base_model_name_or_path": adapter.provenance.base_model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(adapter.targets),
        "exclude_modules": list(adapter.excluded) or None,
        "lora_dropout": 0.0 if math.isnan(dropout) else dropout,
        "bias": _bias(adapter),
        "fan_in_fan_out": "transposed" in kinds,
        "use_rslora": False,
        "use_dora": _dora(adapter),
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": list(adapter.modules) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
        "revision": None,
    }


def _bias(adapter: Adapter) -> str:
    if not adapter.biases:
        return "none"
    return "lora_only" if set(adapter.biases) <= set(adapter.layers) else "all"


def _dora(adapter: Adapter) -> bool:
    without = [site for site, layer in adapter.layers.items() if layer.magnitude is None]
    if without and len(without) < len(adapter.layers):
        raise UnsupportedAdapterError(
            f"site {without[0]!r} has no DoRA magnitude while others do; PEFT knows DoRA only for "
            "all sites. Save the native file instead."
        )
    return not without
