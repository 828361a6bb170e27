"""Write a plain LoRA as the PEFT folder that every reader understands alike.

Canonical form: the scaling folded into B and `lora_alpha` = `r`, an integer; one rank for all
sites (zero rows added); no patterns; no rsLoRA; only lora_A/lora_B and lora_embedding_A/B.
"""

import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from tether import fs
from tether.errors import ConfigError, UnsupportedAdapterError
from tether.formats import peft_names as names
from tether.formats.card import model_card
from tether.linalg import check_finite
from tether.value import Adapter, Factors, Json, LayerAdapter

DTYPES = {t: str(t).removeprefix("torch.") for t in (torch.float32, torch.bfloat16, torch.float16)}
METADATA = {"format": "pt"}  # of the weights' file


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
    check_expressible(adapter, dtype)
    tensors: dict[str, Tensor] = {}
    for site, layer in canonical(adapter, dtype).items():
        tensors |= named(site, layer)
    with fs.atomic_directory(path, names.FILES) as folder:
        save_file(tensors, folder / names.WEIGHTS, METADATA)
        write_texts(adapter, folder, dtype)


def write_texts(adapter: Adapter, folder: Path, dtype: torch.dtype) -> None:
    """Write the settings and the model card; no value of a factor is looked at.

    Args:
        adapter: plain.
        folder: the temporary folder of an atomic block.
        dtype: of the tensors.
    """
    config = json.dumps(_config(adapter), indent=2)
    (folder / names.CONFIG).write_text(config + "\n", encoding="utf-8")
    (folder / names.CARD).write_text(model_card(adapter, DTYPES[dtype]), encoding="utf-8")


def check_expressible(adapter: Adapter, dtype: torch.dtype) -> None:
    """Raise unless PEFT can express an adapter; no value of a factor is looked at.

    Args:
        adapter: plain.
        dtype: of the file.

    Raises:
        ConfigError: a dtype other than float32, bfloat16 or float16, or an anchored adapter.
        UnsupportedAdapterError: a site that PEFT cannot express, by name.
    """
    _check_excluded(adapter)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype} is none of {', '.join(DTYPES.values())}.")
    for site, layer in adapter.layers.items():
        if layer.anchor is not None:
            raise ConfigError(f"site {site!r} has an anchor; make it plain with tether.to_lora.")
        if not layer.layout.common:
            raise UnsupportedAdapterError(
                f"site {site!r}: PEFT's LoRA ignores the dilation or padding mode of this "
                "convolution, so its output would differ. Save the native file instead."
            )


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
    check_expressible(adapter, dtype)
    rank = max(layer.rank for layer in adapter.layers.values())
    layers = adapter.layers.items()
    return {site: canonical_layer(site, layer, rank, dtype) for site, layer in layers}


def canonical_layer(site: str, layer: LayerAdapter, rank: int, dtype: torch.dtype) -> LayerAdapter:
    """One layer as it is written.

    Args:
        site: its path.
        layer: plain.
        rank: of the file, at least the layer's.
        dtype: of the file.

    Returns:
        the layer whose factors are the numbers in the file.

    Raises:
        NonFiniteError: a value does not fit `dtype`.
    """
    factors = padded(_balanced(layer), rank).to(dtype)
    for name, factor in (("A", factors.A), ("B", factors.B)):
        check_finite(factor, f"site {site!r}: factor {name} in {DTYPES[dtype]}")
    return LayerAdapter(factors, None, 1.0, layer.layout, layer.dropout)


def _balanced(layer: LayerAdapter) -> Factors:
    """Fold the scaling into B, then even out each pair's size by a power of two.

    Small displacements would fall into float16's subnormal numbers; powers of two are exact.
    """
    a, b = layer.trainable.A.float(), layer.scaling * layer.trainable.B.float()
    size_a, size_b = a.abs().amax(dim=1), b.abs().amax(dim=0)
    live = (size_a > 0) & (size_b > 0)
    exponent = torch.where(live, (size_b.log2() - size_a.log2()) / 2, torch.zeros(()))
    shift = exponent.round().clamp(-60, 60)
    return Factors(torch.ldexp(a, shift[:, None]), torch.ldexp(b, -shift))


def padded(factors: Factors, rank: int) -> Factors:
    """Factors with zero rows and columns added, of the same product.

    Args:
        factors: on any device.
        rank: at least theirs.

    Returns:
        factors of that rank.
    """
    more = rank - factors.rank
    return Factors(pad(factors.A, (0, 0, 0, more)), pad(factors.B, (0, more)))


def named(site: str, layer: LayerAdapter) -> dict[str, Tensor]:
    """One layer's tensors by their names in the file, in peft's shapes.

    Args:
        site: its path.
        layer: plain; on any device.

    Returns:
        tensor name -> a view of the factor.
    """
    a, b = layer.trainable.A, layer.trainable.B
    stem = names.PREFIX + site
    if layer.layout.kind == "embedding":
        return {stem + names.EMBEDDING_A: a, stem + names.EMBEDDING_B: b}
    if layer.layout.kind == "conv":
        _, channels, *kernel = layer.layout.shape
        a, b = a.reshape(-1, channels, *kernel), b.reshape(*b.shape, *(1 for _ in kernel))
    return {stem + names.A: a, stem + names.B: b}


def _auto_mapping(adapter: Adapter) -> dict[str, Json] | None:
    """Where peft's auto classes find the base's class; only ever a name inside transformers."""
    full = adapter.provenance.base_class or ""
    if not re.fullmatch(r"transformers(\.\w+)+", full, re.ASCII):
        return None
    library, _, name = full.rpartition(".")
    return {"base_model_class": name, "parent_library": library}


def _check_excluded(adapter: Adapter) -> None:
    for name in adapter.excluded:
        hit = next((site for site in adapter.layers if site.endswith("." + name)), None)
        if hit is not None:
            raise UnsupportedAdapterError(
                f"site {hit!r}: PEFT selects modules by the end of their path, and cannot tell it "
                f"from {name!r}, which the adapter leaves alone. Save the native file instead."
            )


def _config(adapter: Adapter) -> dict[str, Json]:
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
        "bias": "none",
        "fan_in_fan_out": "transposed" in kinds,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
        "revision": None,
    }
