"""Read a LoRA that peft wrote: rsLoRA, patterns, DoRA, biases, whole modules, half precision.

What tether cannot represent is refused by name; nothing is dropped.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tether.errors import (
    ConfigError,
    HeaderError,
    NonFiniteError,
    ShapeMismatchError,
    UnsupportedAdapterError,
)
from tether.fingerprints import fingerprint_tensor
from tether.formats import container, peft_parts
from tether.formats import peft_names as names
from tether.formats.pattern import first_match
from tether.formats.peft_config import (
    flag,
    number,
    read_config,
    refuse_unsupported,
    weights_file,
)
from tether.formats.peft_residual import refuse_residual
from tether.linalg import check_finite
from tether.provenance import Provenance
from tether.value import Adapter, Factors, Json, LayerAdapter, Layout, Trained

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load(folder: Path) -> Adapter:
    """Read a PEFT folder.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors. Only read.

    Returns:
        a plain adapter, float32, on the CPU.

    Raises:
        NotAnAdapterError: a file is missing, or it is not a LoRA.
        PickleRefusedError: the weights are a .bin.
        UnsupportedAdapterError: it holds something that would be lost, by name.
        HeaderError: a file is malformed.
    """
    config = read_config(folder)
    refuse_residual(folder, config)
    refuse_unsupported(folder, config)
    weights = weights_file(folder)
    tensors, _ = container.read(weights)
    return assemble(weights, config, tensors)


def assemble(weights: Path, config: dict[str, Json], tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter that a file's tensors and settings make.

    Args:
        weights: of the file, for messages.
        config: the settings.
        tensors: all of the file's, or those of some sites; on the meta device to learn the shapes
            alone, without reading a value.

    Returns:
        a plain adapter, float32.

    Raises:
        UnsupportedAdapterError: it holds something that would be lost, by name.
        HeaderError: tensors and settings do not fit together.
    """
    try:
        parts = _sorted(weights, config, tensors)
        base = parts.base
        layers = _with_magnitudes(_decode(weights, config, parts.factors), parts.magnitudes, config)
        targets, excluded = _targets(config, layers)
        _check_copies(base, layers)
        copies = {site: t for site, t in base.items() if t.dtype in _DTYPES and not t.is_meta}
        return Adapter(
            layers=layers,
            provenance=Provenance(
                method="unknown",
                base_model=_base_model(config),
                fingerprints={site: fingerprint_tensor(t) for site, t in copies.items()},
            ),
            targets=targets,
            excluded=excluded,
            biases=parts.biases,
            modules=parts.modules,
        )
    except (ConfigError, ShapeMismatchError, OverflowError) as error:
        raise HeaderError(f"{weights}: {error} {container.DAMAGED}") from error
    except UnsupportedAdapterError as error:
        raise UnsupportedAdapterError(f"{weights}: {error}") from error


def _sorted(
    weights: Path, config: dict[str, Json], tensors: Mapping[str, Tensor]
) -> peft_parts.Parts:
    try:
        return peft_parts.sort(config, tensors)
    except NonFiniteError as error:
        raise NonFiniteError(f"{weights}: {error}") from error


def _decode(
    where: Path, config: dict[str, Json], tensors: Mapping[str, Tensor]
) -> dict[str, LayerAdapter]:
    pairs: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for key, tensor in tensors.items():
        site, side, embedding = _parse_key(key)
        if tensor.dtype not in _DTYPES:
            raise ConfigError(f"tensor {key!r} is {tensor.dtype}, not one of {_DTYPES}.")
        pair = pairs.setdefault(site, {})
        if side in pair:
            raise ConfigError(f"site {site!r} has two factors {side}.")
        pair[side] = tensor.to(torch.float32, copy=True)
        # After the cast: float64 holds more than float32.
        if not tensor.is_meta:
            check_finite(pair[side], f"{where}: tensor {key!r} in float32")
        if embedding:
            embeddings.add(site)
    layers, transposed = {}, flag(config, "fan_in_fan_out")
    for site, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            missing = "lora_B" if "A" in pair else "lora_A"
            raise ConfigError(f"site {site!r} has no {missing}.")
        factors, layout = _view(pair["A"], pair["B"], site in embeddings, transposed)
        if not config.get("rank_pattern") and config.get("r") != factors.rank:
            raise ConfigError(
                f"site {site!r}: its rank is {factors.rank}, r is {config.get('r')!r}."
            )
        layers[site] = LayerAdapter(
            trainable=factors,
            anchor=None,
            scaling=_scaling(config, site, factors.rank),
            layout=layout,
            dropout=number(config, "lora_dropout", 0.0),
        )
    return layers


def _parse_key(key: str) -> tuple[str, str, bool]:
    """Split a key into site, side and whether it is an embedding's."""
    endings = {
        names.A: ("A", False),
        names.B: ("B", False),
        names.EMBEDDING_A: ("A", True),
        names.EMBEDDING_B: ("B", True),
    }
    for ending, (side, embedding) in endings.items():
        if key.startswith(names.PREFIX) and key.endswith(ending):
            return key[len(names.PREFIX) : -len(ending)], side, embedding
    raise UnsupportedAdapterError(f"tensor {key!r} is not part of a plain LoRA, and would be lost.")


def _view(a: Tensor, b: Tensor, embedding: bool, transposed: bool) -> tuple[Factors, Layout]:
    if a.dim() > 2 and a.dim() == b.dim() and b[0, 0].numel() == 1:
        layout = Layout("conv", (b.shape[0], *a.shape[1:]))
        return Factors(a.flatten(1), b.flatten(1)), layout
    factors = Factors(a, b)
    out_features, in_features = factors.shape
    if embedding:
        return factors, Layout("embedding", (in_features, out_features))
    if transposed:
        return factors, Layout("transposed", (in_features, out_features))
    return factors, Layout("linear", (out_features, in_features))


def _scaling(config: dict[str, Json], site: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ConfigError("alpha_pattern is not a table.")
    alpha = first_match(patterns, site)
    alpha = number(config, "lora_alpha", 8.0) if alpha is None else alpha
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0:
        raise ConfigError(f"site {site!r}: alpha {alpha!r} is not a positive number.")
    return float(alpha) / (math.sqrt(rank) if flag(config, "use_rslora") else rank)


def _with_magnitudes(
    layers: dict[str, LayerAdapter], magnitudes: Mapping[str, Trained], config: dict[str, Json]
) -> dict[str, LayerAdapter]:
    """The layers with their DoRA magnitudes: one for every site, or for none."""
    wanted = set(layers) if config.get("use_dora") else set()
    odd = sorted(wanted ^ set(magnitudes))
    if odd:
        raise ConfigError(f"site {odd[0]!r} has a DoRA magnitude or factors, not both.")
    return {site: replace(layer, magnitude=magnitudes.get(site)) for site, layer in layers.items()}


def _check_copies(base: Mapping[str, Tensor], layers: Mapping[str, LayerAdapter]) -> None:
    """A weight beside no factors is no copy that peft adds: it may be the change itself."""
    for site in base:
        if site not in layers:
            raise UnsupportedAdapterError(
                f"the file holds the weight of {site!r} and no LoRA for it: it would be lost."
            )


def _targets(
    config: dict[str, Json], layers: Mapping[str, LayerAdapter]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The file's own module names where they are plain names that reach every site."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if not (_plain_names(targets) and _plain_names(excluded)) or config.get("layers_to_transform"):
        return (), ()
    assert isinstance(targets, list)
    assert isinstance(excluded, list)
    chosen = tuple(sorted(map(str, targets)))
    if not all(any(s == t or s.endswith("." + t) for t in chosen) for s in layers):
        return (), ()
    return chosen, tuple(sorted(map(str, excluded)))


def _plain_names(value: Json) -> bool:
    return isinstance(value, list) and all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]{1,512}", name) for name in value
    )


def _base_model(config: dict[str, Json]) -> str | None:
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None
