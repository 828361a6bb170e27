"""The native file: one .safetensors file, exact.

A file MUST have
1. metadata `format` = "tether" and `version` = "2";
2. metadata `adapter`: JSON with `config`, `provenance`, `targets`, `excluded`, `layers`, a list of
   {path, kind, shape, common, scaling, dropout, anchored, magnitude}, `biases`, a table module path
   -> form, and `modules`, a table module path -> parameter name -> form; a form is "anchored" or
   "whole", a magnitude is a form or null;
3. for each layer the tensors `{path}.dA`, `{path}.dB`, `{path}.A0`, `{path}.B0` if anchored, else
   `{path}.A`, `{path}.B`; for each magnitude, bias and parameter, of the name
   `{path}:magnitude`, `{path}:bias` or `{path}:{parameter}:module`, the tensors `{name}:moved` and
   `{name}:anchor` if anchored, else `{name}:whole`; all float32 (or float64), and no other tensor;
4. metadata `digests`: JSON, tensor name -> sha256 of its bytes;
5. metadata `digest`: sha256 of version, adapter and digests, each followed by a zero byte.
Version "1", which is still read, has no `magnitude`, `biases` and `modules`.
A reader refuses a file that breaks any of these, naming it.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor

from tether import fs
from tether.errors import (
    ConfigError,
)
from tether.fingerprints import raw_bytes
from tether.linalg import check_finite
from tether.provenance import Provenance
from tether.value import Adapter, Json, LayerAdapter, Trained

FORMAT, VERSION = "tether", "2"


def save(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write an adapter.

    Args:
        adapter: anchored or plain.
        path: of the file; replaced in one rename.

    Raises:
        WriteError: it cannot be written; what was there stays.
        NonFiniteError: a factor holds NaN or Inf.
    """
    tensors = {}
    for site, layer in adapter.layers.items():
        for name, tensor in layer_tensors(layer).items():
            check_finite(tensor, f"site {site!r}: factor {name}")
            tensors[f"{site}.{name}"] = tensor
    for stem, value in wholes(adapter):
        for name, tensor in whole_tensors(value).items():
            check_finite(tensor, f"{stem}:{name}")
            tensors[f"{stem}:{name}"] = tensor
    with fs.atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata(adapter, {n: digest(t) for n, t in tensors.items()}))


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes.

    Args:
        tensor: any.

    Returns:
        the hex digest.
    """
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def digest_texts(*texts: str) -> str:
    """sha256 of texts, each followed by a zero byte.

    Args:
        *texts: in order.

    Returns:
        the hex digest.
    """
    return hashlib.sha256(b"".join(text.encode() + b"\0" for text in texts)).hexdigest()


def provenance_to_dict(provenance: Provenance) -> dict[str, Json]:
    """Provenance as JSON values.

    Args:
        provenance: where an adapter came from.

    Returns:
        field -> value.
    """
    values = {f.name: getattr(provenance, f.name) for f in dataclasses.fields(provenance)}
    prints = provenance.fingerprints
    values["fingerprints"] = {
        k: dataclasses.asdict(v) | {"shape": list(v.shape)} for k, v in prints.items()
    }
    values["certificates"] = {k: dataclasses.asdict(v) for k, v in provenance.certificates.items()}
    values["gaps"] = dict(provenance.gaps)
    if not provenance.gaps:
        del values["gaps"]  # only quantised bases have any: other files stay as they were
    return values


def layer_tensors(layer: LayerAdapter) -> dict[str, Tensor]:
    """The factors of a layer as they are written.

    Args:
        layer: anchored or plain.

    Returns:
        "dA", "dB", "A0", "B0", or "A", "B" -> a copy.
    """
    if layer.anchor is None:
        pairs = {"A": layer.trainable.A, "B": layer.trainable.B}
    else:
        pairs = {"dA": layer.trainable.A, "dB": layer.trainable.B}
        pairs |= {"A0": layer.anchor.A, "B0": layer.anchor.B}
    return {name: _written(tensor, layer.dtype) for name, tensor in pairs.items()}


def whole_tensors(value: Trained) -> dict[str, Tensor]:
    """A parameter trained whole as it is written.

    Args:
        value: with or without an anchor.

    Returns:
        "moved" and "anchor", or "whole" -> a copy.
    """
    dtype = torch.promote_types(value.trainable.dtype, torch.float32)
    if value.anchor is None:
        return {"whole": _written(value.trainable, dtype)}
    dtype = torch.promote_types(value.anchor.dtype, dtype)
    pairs = {"moved": value.trainable, "anchor": value.anchor}
    return {name: _written(tensor, dtype) for name, tensor in pairs.items()}


def wholes(adapter: Adapter) -> Iterator[tuple[str, Trained]]:
    """Every parameter trained whole, by the stem of its tensors' names.

    Args:
        adapter: any.

    Yields:
        ("model.norm:weight:module", parameter) and so on.
    """
    for path, layer in adapter.layers.items():
        if layer.magnitude is not None:
            yield f"{path}:magnitude", layer.magnitude
    yield from ((f"{path}:bias", bias) for path, bias in adapter.biases.items())
    for path, state in adapter.modules.items():
        yield from ((f"{path}:{name}:module", value) for name, value in state.items())


def metadata(adapter: Adapter, digests: Mapping[str, str]) -> dict[str, str]:
    """The metadata of the file.

    Args:
        adapter: what is written; its factors are not read.
        digests: tensor name -> sha256 of its bytes.

    Returns:
        the five entries.

    Raises:
        ConfigError: settings or provenance hold NaN or Inf.
    """
    header = {
        "config": dict(adapter.config),
        "provenance": provenance_to_dict(adapter.provenance),
        "targets": list(adapter.targets),
        "excluded": list(adapter.excluded),
        "layers": [_entry(path, layer) for path, layer in adapter.layers.items()],
        "biases": {path: _form(bias) for path, bias in adapter.biases.items()},
        "modules": {
            path: {name: _form(value) for name, value in state.items()}
            for path, state in adapter.modules.items()
        },
    }
    try:
        text = json.dumps(header, allow_nan=False)
    except ValueError as error:
        raise ConfigError(
            f"the adapter's settings or provenance hold NaN or Inf: {error}."
        ) from error
    listed = json.dumps(dict(digests))
    return {
        "format": FORMAT,
        "version": VERSION,
        "adapter": text,
        "digests": listed,
        "digest": digest_texts(VERSION, text, listed),
    }


def _entry(path: str, layer: LayerAdapter) -> dict[str, Json]:
    return {
        "path": path,
        "kind": layer.layout.kind,
        "shape": list(layer.layout.shape),
        "common": layer.layout.common,
        "scaling": layer.scaling,
        "dropout": layer.dropout,
        "anchored": layer.anchor is not None,
        "magnitude": None if layer.magnitude is None else _form(layer.magnitude),
    }


def _form(value: Trained) -> str:
    return "whole" if value.anchor is None else "anchored"


def _written(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy: a file holds every tensor by itself, also where two share memory."""
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
