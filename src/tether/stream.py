"""Write a safetensors file tensor by tensor: none has to be held until all are there."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from tether import fs
from tether.checkpoint import DTYPES
from tether.errors import ConfigError, ShapeMismatchError, UnknownNameError, WriteError, nearest
from tether.fingerprints import raw_bytes

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"


class TensorWriter:
    """Write a safetensors file tensor by tensor, in any order.

    Where each tensor lies is decided at the start, from dtypes and shapes alone, and so is the
    header's length; the header itself comes last, padded with spaces as the format allows. A file
    without its `finish` has no header and cannot be read.

        with fs.atomic_file(path) as temporary, TensorWriter(temporary, specs) as writer:
            for name in specs:
                writer.write(name, make(name))
            writer.finish({"format": "pt"})
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata_room: int = 0,
    ) -> None:
        """Lay out the file and open it.

        Args:
            path: the temporary path of an atomic block.
            specs: name -> dtype and shape of every tensor that will be written.
            metadata_room: bytes to keep for the metadata, as JSON in UTF-8.

        Raises:
            ConfigError: a name or a dtype that the format does not have.
        """
        self._specs, self._pending = dict(specs), set(specs)
        self._entries: dict[str, dict[str, object]] = {}
        end = 0
        # Wide types first: so each tensor begins at a multiple of its own width.
        for name in sorted(specs, key=lambda name: -specs[name][0].itemsize):
            dtype, shape = specs[name]
            if name == _METADATA or dtype not in _NAMES:
                raise ConfigError(f"{path}: a file cannot hold a tensor {name!r} of {dtype}.")
            start, end = end, end + math.prod(shape) * dtype.itemsize
            offsets = [start, end]
            self._entries[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": offsets,
            }
        length = len(self._header({})) + metadata_room
        self._length = -(-length // 8) * 8
        self._starts = {
            name: 8 + self._length + entry["data_offsets"][0]  # type: ignore[index]
            for name, entry in self._entries.items()
        }
        self._path = path
        self._file = fs.new_file(path)

    def __enter__(self) -> Self:
        """Open until the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Close the file; it is of no use where `finish` was not reached."""
        finished = self._file.closed
        self._file.close()
        if kind is None and not finished:
            raise WriteError(f"{self._path}: was left without finish(); it has no header.")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place.

        Args:
            name: of the tensor, not written before.
            tensor: of the dtype and shape given for it; any device and strides.

        Raises:
            UnknownNameError: no such tensor was announced, or it has been written.
            ShapeMismatchError: its dtype or shape is another.
        """
        if name not in self._pending:
            known = "has been written already" if name in self._specs else "was not announced"
            raise UnknownNameError(
                f"{self._path}: tensor {name!r} {known}. {nearest(name, self._pending)}"
            )
        here, wanted = (tensor.dtype, tuple(tensor.shape)), self._specs[name]
        if here != (wanted[0], tuple(wanted[1])):
            raise ShapeMismatchError(
                f"{self._path}: tensor {name!r} is {here[0]} {here[1]}; announced was "
                f"{wanted[0]} {tuple(wanted[1])}."
            )
        self._file.seek(self._starts[name])
        self._file.write(raw_bytes(tensor))
        self._pending.remove(name)

    def finish(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the header and close the file.

        Args:
            metadata: texts by name, for the header.

        Raises:
            WriteError: a tensor is missing.
            ConfigError: the metadata need more than the room kept for them.
        """
        if self._pending:
            raise WriteError(
                f"{self._path}: tensor {min(self._pending)!r} was never written "
                f"({len(self._pending)} of {len(self._specs)} are missing)."
            )
        header = self._header(metadata or {})
        if len(header) > self._length:
            raise ConfigError(
                f"{self._path}: the metadata need {len(header) - self._length} bytes more than "
                "metadata_room keeps for them."
            )
        self._file.seek(0)
        self._file.write(self._length.to_bytes(8, "little") + header.ljust(self._length))
        self._file.close()

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        header = {_METADATA: dict(metadata), **self._entries}
        return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
