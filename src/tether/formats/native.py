"""The native file: one .safetensors file, exact.

A file MUST have
1. metadata `format` = "tether" and `version` = "1";
2. metadata `adapter`: JSON with `config`, `provenance`, `targets`, `excluded` and `layers`, a
   list of {path, kind, shape, common, scaling, dropout, anchored};
3. for each layer the tensors `{path}.dA`, `{path}.dB`, `{path}.A0`, `{path}.B0` if anchored, else
   `{path}.A`, `{path}.B`; all float32 (or float64 for float64 factors), and no other tensor;
4. metadata `digests`: JSON, tensor name -> sha256 of its bytes;
5. metadata `digest`: sha256 of version, adapter and digests, each followed by a zero byte.
A reader refuses a file that breaks any of these, naming it.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping

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
from tether.value import Adapter, Json, LayerAdapter

FORMAT, VERSION = "tether", "1"


def save(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write an adapter.

    Args:
        adapter: anchored or plain.
        path: of the file; replaced in one rename.

    Raises:
        WriteError: it cannot be written; what was there stays.
        NonFiniteError: a factor holds NaN or Inf.
    """
    tensors: dict[str, Tensor] = {}
    for site, layer in adapter.layers.items():
        tensors |= checked(site, layer)
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    with fs.atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata(adapter, digests))


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
    return values


def checked(site: str, layer: LayerAdapter) -> dict[str, Tensor]:
    """The tensors of one site as they are written.

    Args:
        site: its path.
        layer: anchored or plain.

    Returns:
        tensor name -> a copy on the CPU: a file holds every tensor by itself, also where two share
        memory.

    Raises:
        NonFiniteError: a factor holds NaN or Inf.
    """
    tensors = {}
    for name, tensor in named(site, layer).items():
        check_finite(tensor, f"site {site!r}: factor {name.removeprefix(site + '.')}")
        tensors[name] = tensor.detach().to(
            "cpu", layer.dtype, copy=True, memory_format=torch.contiguous_format
        )
    return tensors


def named(site: str, layer: LayerAdapter) -> dict[str, Tensor]:
    """The tensors of one site by their names in the file.

    Args:
        site: its path.
        layer: anchored or plain; on any device.

    Returns:
        tensor name -> the layer's own tensor.
    """
    if layer.anchor is None:
        pairs = {"A": layer.trainable.A, "B": layer.trainable.B}
    else:
        pairs = {"dA": layer.trainable.A, "dB": layer.trainable.B}
        pairs |= {"A0": layer.anchor.A, "B0": layer.anchor.B}
    return {f"{site}.{name}": tensor for name, tensor in pairs.items()}


def metadata(adapter: Adapter, digests: Mapping[str, str]) -> dict[str, str]:
    """The header's texts.

    Args:
        adapter: all but the tensors' values is taken from it.
        digests: tensor name -> sha256 of its bytes.

    Returns:
        name -> text.

    Raises:
        ConfigError: a setting is NaN or Inf.
    """
    layers: list[Json] = [
        {
            "path": path,
            "kind": layer.layout.kind,
            "shape": list(layer.layout.shape),
            "common": layer.layout.common,
            "scaling": layer.scaling,
            "dropout": layer.dropout,
            "anchored": layer.anchor is not None,
        }
        for path, layer in adapter.layers.items()
    ]
    header = {
        "config": dict(adapter.config),
        "provenance": provenance_to_dict(adapter.provenance),
        "targets": list(adapter.targets),
        "excluded": list(adapter.excluded),
        "layers": layers,
    }
    try:
        text = json.dumps(header, allow_nan=False)
    except ValueError as error:
        raise ConfigError(
            f"the adapter's settings or provenance hold NaN or Inf: {error}."
        ) from error
    sums = json.dumps(dict(digests))
    return {
        "format": FORMAT,
        "version": VERSION,
        "adapter": text,
        "digests": sums,
        "digest": digest_texts(VERSION, text, sums),
    }
