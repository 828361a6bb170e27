"""Read the native file, strictly: what `tether.formats.native` demands, and nothing else."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tether.errors import (
    ConfigError,
    DigestError,
    HeaderError,
    NonFiniteError,
    NotAnAdapterError,
    ShapeMismatchError,
)
from tether.formats import container
from tether.formats.native import FORMAT, VERSION, digest, digest_texts
from tether.linalg import Certificate, check_finite
from tether.provenance import Fingerprint, Provenance
from tether.value import Adapter, Factors, Json, LayerAdapter, Layout, Trained

_FIELDS = ("config", "provenance", "targets", "excluded", "layers", "biases", "modules")
_LAYER_FIELDS = (
    *("path", "kind", "shape", "common", "scaling", "dropout", "anchored", "magnitude"),
)


def load(path: Path) -> Adapter:
    """Read an adapter and check every byte.

    Args:
        path: of the file.

    Returns:
        the adapter that was saved, bit for bit.

    Raises:
        FormatError: and its kinds.
        NonFiniteError: a factor holds NaN or Inf.
    """
    tensors, metadata = container.read(path)
    if metadata.get("format") != FORMAT:
        raise NotAnAdapterError(
            f"{path}: a safetensors file, but not an adapter of tether's. Give a file that "
            "tether saved, or the whole folder of a PEFT adapter."
        )
    if metadata.get("version") not in ("1", VERSION):
        raise HeaderError(
            f"{path}: format version {metadata.get('version')!r}; this tether reads '1' and "
            f"{VERSION!r}. "
            "Read it with the tether that wrote it, or a newer one."
        )
    try:
        _check_digests(path, tensors, metadata)
        header = container.parse_json(metadata["adapter"], f"{path}: metadata 'adapter'")
        if metadata["version"] == "1":
            header = _upgraded(header)
        return _decode(header, dict(tensors))
    except (ConfigError, ShapeMismatchError, OverflowError) as error:
        raise HeaderError(f"{path}: {error} {container.DAMAGED}") from error
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}: {error}") from error


def _check_digests(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    for key in ("adapter", "digests", "digest"):
        if key not in metadata:
            raise ConfigError(f"metadata {key!r} is missing.")
    found = digest_texts(metadata["version"], metadata["adapter"], metadata["digests"])
    if found != metadata["digest"]:
        raise DigestError(
            f"{path}: the header's sha256 is {found[:12]}…, written was "
            f"{metadata['digest'][:12]}…: the file is damaged. Copy or download it again."
        )
    digests = _typed(container.parse_json(metadata["digests"], f"{path}: digests"), dict, "digests")
    if set(digests) != set(tensors):
        odd = sorted(set(digests) ^ set(tensors))[0]
        raise ConfigError(f"tensor {odd!r} is in the file or in its digests, not in both.")
    for name, tensor in tensors.items():
        found = digest(tensor)
        if found != digests[name]:
            raise DigestError(
                f"{path}: tensor {name!r}: sha256 is {found[:12]}…, written was "
                f"{str(digests[name])[:12]}…: the file is damaged. Copy or download it again."
            )


def _decode(header: Json, tensors: dict[str, Tensor]) -> Adapter:
    fields = _exactly(header, *_FIELDS)
    layers = {}
    for item in _get(fields, "layers", list):
        entry = _exactly(item, *_LAYER_FIELDS)
        site = _get(entry, "path", str)
        if site in layers:
            raise ConfigError(f"site {site!r} is listed twice.")
        try:
            layers[site] = _decode_layer(site, entry, tensors)
        except (ConfigError, ShapeMismatchError) as error:
            raise ConfigError(f"site {site!r}: {error}") from error
    biases = {
        module: _decode_whole(f"{module}:bias", form, tensors)
        for module, form in _get(fields, "biases", dict).items()
    }
    modules = {
        module: {
            name: _decode_whole(f"{module}:{name}:module", form, tensors)
            for name, form in _typed(state, dict, "modules").items()
        }
        for module, state in _get(fields, "modules", dict).items()
    }
    if tensors:
        raise ConfigError(f"tensor {sorted(tensors)[0]!r} belongs to no layer.")
    return Adapter(
        layers=layers,
        provenance=_decode_provenance(_get(fields, "provenance", dict)),
        config=_get(fields, "config", dict),
        targets=_texts(fields, "targets"),
        excluded=_texts(fields, "excluded"),
        biases=biases,
        modules=modules,
    )


def _upgraded(header: Json) -> Json:
    """A header of version 1 as one of version 2."""
    fields = _typed(header, dict, "header")
    new: dict[str, Json] = {"biases": {}, "modules": {}}
    for name in new:
        if name in fields:
            raise ConfigError(f"field {name!r} does not belong there.")
    layers: list[Json] = []
    for entry in _get(fields, "layers", list):
        old = _exactly(entry, *_LAYER_FIELDS[:-1])
        layers.append(old | {"magnitude": None})
    return fields | new | {"layers": layers}


def _decode_whole(stem: str, form: Json, tensors: dict[str, Tensor]) -> Trained:
    if form == "whole":
        return Trained(_take(f"{stem}:whole", tensors), None)
    if form != "anchored":
        raise ConfigError(f"{stem}: its form is {form!r}, not 'anchored' or 'whole'.")
    return Trained(_take(f"{stem}:moved", tensors), _take(f"{stem}:anchor", tensors))


def _take(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """A tensor of the file, taken out of `tensors`, checked."""
    if name not in tensors:
        raise ConfigError(f"tensor {name!r} is missing.")
    tensor = tensors.pop(name)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"tensor {name!r} is {tensor.dtype}, not float32.")
    check_finite(tensor, f"tensor {name!r}")
    return tensor.clone()  # not mapped: the file may change


def _decode_layer(site: str, entry: dict[str, Json], tensors: dict[str, Tensor]) -> LayerAdapter:
    def factors(a: str, b: str) -> Factors:
        return Factors(_take(f"{site}.{a}", tensors), _take(f"{site}.{b}", tensors))

    anchored = _get(entry, "anchored", bool)
    shape = tuple(_typed(n, int, "shape") for n in _get(entry, "shape", list))
    layout = Layout(_get(entry, "kind", str), shape, _get(entry, "common", bool))  # type: ignore[arg-type]
    trainable = factors("dA", "dB") if anchored else factors("A", "B")
    anchor = factors("A0", "B0") if anchored else None
    pairs = [trainable] if anchor is None else [trainable, anchor]
    if len({tensor.dtype for pair in pairs for tensor in (pair.A, pair.B)}) > 1:
        raise ConfigError("its tensors mix float32 and float64.")
    magnitude = None
    if entry["magnitude"] is not None:
        magnitude = _decode_whole(f"{site}:magnitude", entry["magnitude"], tensors)
    return LayerAdapter(
        trainable=trainable,
        anchor=anchor,
        scaling=_get(entry, "scaling", float),
        layout=layout,
        dropout=_get(entry, "dropout", float),
        magnitude=magnitude,
    )


def _decode_provenance(fields: dict[str, Json]) -> Provenance:
    # Certificates the first files of version 2 lack; gaps, those of a base that is not quantised.
    fields = {"certificates": {}, "gaps": {}} | fields
    fields = _exactly(fields, *(f.name for f in dataclasses.fields(Provenance)))
    prints = {}
    for site, item in _get(fields, "fingerprints", dict).items():
        entry = _exactly(item, *(f.name for f in dataclasses.fields(Fingerprint)))
        prints[site] = Fingerprint(
            shape=tuple(_typed(n, int, "shape") for n in _get(entry, "shape", list)),
            dtype=_printable(entry, "dtype"),
            sha256=_get(entry, "sha256", str),
            sha256_bfloat16=_get(entry, "sha256_bfloat16", str),
            sha256_float16=_get(entry, "sha256_float16", str),
            norm=_get(entry, "norm", float),
        )
    return Provenance(
        method=_get(fields, "method", str),
        seed=_optional(fields, "seed", int),
        tether_version=_optional(fields, "tether_version", str),
        base_model=_optional(fields, "base_model", str),
        base_class=_optional(fields, "base_class", str),
        learning_rate=_optional(fields, "learning_rate", float),
        steps=_optional(fields, "steps", int),
        fingerprints=prints,
        certificates={
            site: _decode_certificate(item)
            for site, item in _get(fields, "certificates", dict).items()
        },
        gaps={s: _typed(gap, float, "gaps") for s, gap in _get(fields, "gaps", dict).items()},
    )


def _decode_certificate(item: Json) -> Certificate:
    entry = _exactly(item, *(f.name for f in dataclasses.fields(Certificate)))
    return Certificate(
        route=_printable(entry, "route"),
        product_error=_get(entry, "product_error", float),
        excess=_get(entry, "excess", float),
        unique=_get(entry, "unique", bool),
        fallback=_printable(entry, "fallback"),
    )


def _printable(fields: Mapping[str, Json], name: str) -> str:
    """A text that is shown to people."""
    text = _get(fields, name, str)
    if not text.isprintable():
        raise ConfigError(f"field {name!r} is no plain text.")
    return text


def _exactly(value: Json, *names: str) -> dict[str, Json]:
    """A table with exactly these fields."""
    fields = _typed(value, dict, "header")
    for name in names:
        if name not in fields:
            raise ConfigError(f"field {name!r} is missing.")
    for name in fields:
        if name not in names:
            raise ConfigError(f"field {name!r} does not belong there.")
    return fields


def _texts(fields: dict[str, Json], name: str) -> tuple[str, ...]:
    return tuple(_typed(text, str, name) for text in _get(fields, name, list))


Expected = TypeVar("Expected")


def _typed(value: Any, kind: type[Expected], name: str) -> Expected:
    """`value` if it is of the JSON type wanted (a whole number is a float too)."""
    # OverflowError, for a number beyond float, is caught with the other errors.
    if kind is float and type(value) is int:
        return float(value)  # type: ignore[return-value]
    if type(value) is not kind:
        raise ConfigError(f"field {name!r} must be {kind.__name__}, not {type(value).__name__}.")
    return value


def _get(fields: Mapping[str, Json], name: str, kind: type[Expected]) -> Expected:
    if name not in fields:
        raise ConfigError(f"field {name!r} is missing.")
    return _typed(fields[name], kind, name)


def _optional(fields: Mapping[str, Json], name: str, kind: type[Expected]) -> Expected | None:
    return None if fields.get(name) is None else _get(fields, name, kind)
