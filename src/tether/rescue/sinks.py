"""Writing an adapter site by site: a native file or a PEFT folder that is whole, or not there."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tether import fs
from tether.errors import ConfigError
from tether.formats import native, peft_names, peft_write
from tether.linalg import check_finite
from tether.provenance import Fingerprint
from tether.source import sketch, sketch_trained
from tether.stream import TensorWriter
from tether.value import Adapter, LayerAdapter, Trained

_DIGEST = "0" * 64
_NORM = -1.2345678901234567e-300  # as long as a number gets in JSON


class Sink(Protocol):
    """Takes the sites of an adapter whose shapes were announced."""

    def add(self, site: str, layer: LayerAdapter) -> LayerAdapter:
        """Write one site.

        Args:
            site: its path.
            layer: of the form announced.

        Returns:
            the layer whose factors are the numbers in the file.
        """
        ...

    def add_bias(self, path: str, value: Trained) -> None:
        """Write one trained bias.

        Args:
            path: of its module.
            value: the bias.
        """
        ...

    def add_module(self, path: str, name: str, value: Trained) -> None:
        """Write one parameter of a module trained whole.

        Args:
            path: of the module.
            name: of the parameter.
            value: the parameter.
        """
        ...

    def finish(self, prints: Mapping[str, Fingerprint]) -> None:
        """Complete the file, when everything has been added.

        Args:
            prints: site path -> fingerprint of its base weight.
        """
        ...


class _Native:
    def __init__(self, shapes: Adapter, writer: TensorWriter) -> None:
        self._shapes, self._writer = shapes, writer
        self._digests: dict[str, str] = {}

    def add(self, site: str, layer: LayerAdapter) -> LayerAdapter:
        self._write(_native_tensors(site, layer))
        return layer

    def add_bias(self, path: str, value: Trained) -> None:
        self._write(_whole_tensors(f"{path}:bias", value))

    def add_module(self, path: str, name: str, value: Trained) -> None:
        self._write(_whole_tensors(f"{path}:{name}:module", value))

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            check_finite(tensor, f"tensor {name!r}")
            self._digests[name] = native.digest(tensor)
            self._writer.write(name, tensor)

    def finish(self, prints: Mapping[str, Fingerprint]) -> None:
        self._writer.finish(native.metadata(_with(self._shapes, prints), self._digests))


class _Peft:
    def __init__(
        self, shapes: Adapter, writer: TensorWriter, folder: Path, dtype: torch.dtype
    ) -> None:
        self._shapes, self._writer, self._folder, self._dtype = shapes, writer, folder, dtype
        self._rank = _file_rank(shapes)

    def add(self, site: str, layer: LayerAdapter) -> LayerAdapter:
        written = peft_write.canonical_layer(site, layer, self._rank, self._dtype)
        for name, tensor in peft_write.layer_tensors(site, written).items():
            self._writer.write(name, tensor)
        return written

    def add_bias(self, path: str, value: Trained) -> None:
        self._write(peft_write.bias_key(self._shapes, path), value)

    def add_module(self, path: str, name: str, value: Trained) -> None:
        self._write(peft_write.module_key(path, name), value)

    def _write(self, key: str, value: Trained) -> None:
        self._writer.write(key, peft_write.whole_tensor(key, value, self._dtype))

    def finish(self, prints: Mapping[str, Fingerprint]) -> None:
        self._writer.finish({"format": "pt"})
        peft_write.write_description(self._folder, _with(self._shapes, prints), self._dtype)


@contextmanager
def native_file(shapes: Adapter, path: Path) -> Iterator[Sink]:
    """Write a native file.

    Args:
        shapes: what will be written, its factors on the meta device, in float32.
        path: of the file; replaced in one rename after `finish`.

    Yields:
        the sink.

    Raises:
        WriteError: it cannot be written; what was there stays.
    """
    specs = {
        name: (torch.float32, tuple(tensor.shape))
        for site, layer in shapes.layers.items()
        for name, tensor in _native_tensors(site, sketch(layer)).items()
    }
    for stem, value in native.wholes(shapes):
        if not stem.endswith(":magnitude"):
            for name, tensor in _whole_tensors(stem, sketch_trained(value)).items():
                specs[name] = (torch.float32, tuple(tensor.shape))
    with (
        fs.atomic_file(path) as temporary,
        TensorWriter(temporary, specs, _room(shapes, specs)) as writer,
    ):
        yield _Native(shapes, writer)


@contextmanager
def peft_folder(shapes: Adapter, path: Path, dtype: torch.dtype) -> Iterator[Sink]:
    """Write a plain LoRA folder in the canonical form of `formats.peft_write`.

    Args:
        shapes: what will be written, its factors on the meta device; no site has an anchor.
        path: of the folder; replaced in one rename after `finish`.
        dtype: of the file: float32, bfloat16 or float16.

    Yields:
        the sink.

    Raises:
        ConfigError: another dtype.
        UnsupportedAdapterError: a site that PEFT cannot express, by name.
        WriteError: it cannot be written; what was there stays.
    """
    if dtype not in peft_write.DTYPES:
        raise ConfigError(f"dtype {dtype} is none of {', '.join(peft_write.DTYPES.values())}.")
    peft_write.check_expressible(shapes)
    specs = {}
    for site, layer in shapes.layers.items():
        padded = sketch(layer, _file_rank(shapes))
        for name, tensor in peft_write.layer_tensors(site, padded).items():
            whole = name.endswith(peft_names.MAGNITUDE)
            specs[name] = (torch.float32 if whole else dtype, tuple(tensor.shape))
    for key, value in peft_write.whole_keys(shapes):
        specs[key] = (dtype, tuple(value.trainable.shape))
    with (
        fs.atomic_directory(path, peft_names.FILES) as folder,
        TensorWriter(folder / peft_names.WEIGHTS, specs, 64) as writer,
    ):
        yield _Peft(shapes, writer, folder, dtype)


def _native_tensors(site: str, layer: LayerAdapter) -> dict[str, Tensor]:
    found = {f"{site}.{name}": t for name, t in native.layer_tensors(layer).items()}
    if layer.magnitude is not None:
        found |= _whole_tensors(f"{site}:magnitude", layer.magnitude)
    return found


def _whole_tensors(stem: str, value: Trained) -> dict[str, Tensor]:
    return {f"{stem}:{name}": t for name, t in native.whole_tensors(value).items()}


def _file_rank(shapes: Adapter) -> int:
    return max(layer.rank for layer in shapes.layers.values())


def _with(shapes: Adapter, prints: Mapping[str, Fingerprint]) -> Adapter:
    return replace(shapes, provenance=replace(shapes.provenance, fingerprints=prints))


def _room(shapes: Adapter, names: Mapping[str, object]) -> int:
    """Bytes that the metadata take at most: all digests and fingerprints have one length."""
    prints = {
        site: Fingerprint(layer.layout.shape, "bfloat16", _DIGEST, _DIGEST, _DIGEST, _NORM)
        for site, layer in shapes.layers.items()
    }
    longest = native.metadata(_with(shapes, prints), dict.fromkeys(names, _DIGEST))
    return len(json.dumps(longest, ensure_ascii=False).encode())
