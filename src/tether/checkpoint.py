"""A model folder on disk, read tensor by tensor: no tensor is read before it is asked for.

Files from others are data: the index names plain files of the folder, nothing is unpickled, and
a link out of the folder is not followed (but into the hub's own cache, where all files are links).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tether.errors import (
    HeaderError,
    ModelError,
    PickleRefusedError,
    TruncatedFileError,
    UnknownNameError,
    nearest,
)
from tether.fingerprints import raw_bytes
from tether.formats import container
from tether.value import Json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MAX_CONFIG = 16 * 2**20  # bytes
# The format's names for what torch can hold.
DTYPES = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor lies: `start` bytes into a file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder on disk, read tensor by tensor. Made by `open`.

    Attributes:
        folder: of the model.
        config: its config.json; empty if there is none.
        shards: file name -> names of its tensors, in the file's order.
        metadata: file name -> the metadata in its header.
    """

    folder: Path
    config: Mapping[str, Json]
    shards: Mapping[str, tuple[str, ...]]
    metadata: Mapping[str, Mapping[str, str]]
    _entries: Mapping[str, _Entry]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the headers of a model folder: `model.safetensors`, or an index and its shards.

        Args:
            folder: of the model. Only read.

        Returns:
            the checkpoint; no file stays open.

        Raises:
            ModelError: there is no such folder, or no weights in it.
            PickleRefusedError: its weights are pickles.
            HeaderError: a file is malformed, or index and shards disagree.
            TruncatedFileError: a file was cut off.
        """
        if not folder.is_dir():
            raise ModelError(f"{folder}: is not a folder. Give the folder of a model.")
        entries: dict[str, _Entry] = {}
        shards, metadata = {}, {}
        listed = _listed(folder)
        for file in sorted(set(listed.values())) or (WEIGHTS,):
            found, metadata[file] = _read_header(check_inside(folder, file))
            for name in found:
                if listed and listed.get(name) != file:
                    raise HeaderError(
                        f"{folder / file}: holds {name!r}, for which {INDEX} names "
                        f"{listed.get(name)!r}. {container.DAMAGED}"
                    )
            shards[file] = tuple(found)
            entries |= found
        for name, file in listed.items():
            if name not in entries:
                raise HeaderError(
                    f"{folder / INDEX}: names {file!r} for {name!r}, which is not in it. "
                    f"{container.DAMAGED}"
                )
        return cls(folder, _read_config(folder), shards, metadata, entries)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, file by file."""
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header.

        Args:
            name: of the tensor.

        Returns:
            its shape.

        Raises:
            UnknownNameError: there is no such tensor.
        """
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from its file's header.

        Args:
            name: of the tensor.

        Returns:
            its dtype.

        Raises:
            UnknownNameError: there is no such tensor.
        """
        return self._entry(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Read one tensor. Nothing else becomes resident: the file is read, not mapped.

        Args:
            name: of the tensor.

        Returns:
            a tensor of the caller's own, on the CPU, in the file's dtype.

        Raises:
            UnknownNameError: there is no such tensor.
            TruncatedFileError: the file has become shorter since it was opened.
            ModelError: it can no longer be read.
        """
        entry = self._entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        buffer = raw_bytes(tensor)  # of the tensor itself, not of a copy
        path = self.folder / entry.file
        try:
            with path.open("rb") as file:
                file.seek(entry.start)
                size = file.readinto(buffer)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}.") from error
        if size != buffer.nbytes:
            raise TruncatedFileError(
                f"{path}: tensor {name!r} has {size} of {buffer.nbytes} bytes: the file was cut "
                "off while it was read. Copy or download it again."
            )
        return tensor

    def weight_name(self, path: str, parameter: str = "weight") -> str:
        """The tensor that belongs to a module of the model.

        A checkpoint may have a prefix that the model's paths lack, or lack one that they have:
        transformers saves `h.0.attn` for what a model with a head on top calls
        `transformer.h.0.attn`.

        Args:
            path: of the module, as in an adapter.
            parameter: of the module.

        Returns:
            the name of the tensor.

        Raises:
            UnknownNameError: no tensor, or more than one, belongs to it; or it is the output head
                of a model that stores only the embedding it is tied to.
        """
        wanted = f"{path}.{parameter}"
        if wanted in self._entries:
            return wanted
        found = [n for n in self._entries if n.endswith("." + wanted)]
        found += [n for n in self._entries if wanted.endswith("." + n) and self._lacks(wanted, n)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UnknownNameError(
                f"{self.folder}: {wanted!r} may be {found[0]!r} or {found[1]!r}. Give the base "
                "model in the form that the adapter was made on."
            )
        if path.rsplit(".", 1)[-1] == "lm_head" and self.config.get("tie_word_embeddings", True):
            raise UnknownNameError(
                f"{self.folder}: has no {wanted!r} of its own: the output head is tied to the "
                "embedding. Untie it (save the model with tie_word_embeddings=false and a head of "
                "its own), or leave the head out of the adapter."
            )
        raise UnknownNameError(
            f"{self.folder}: has no tensor {wanted!r}. {nearest(wanted, self._entries)}"
        )

    def _lacks(self, wanted: str, name: str) -> bool:
        """Whether no tensor has the prefix by which `wanted` is longer than `name`."""
        prefix = wanted.removesuffix(name)
        return not any(other.startswith(prefix) for other in self._entries)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UnknownNameError(
                f"{self.folder}: has no tensor {name!r}. {nearest(name, self._entries)}"
            )
        return self._entries[name]


def check_inside(folder: Path, file: str) -> Path:
    """Raise unless a file lies in its folder, links followed.

    Args:
        folder: of a model.
        file: name of one of its files.

    Returns:
        the path of the file.

    Raises:
        HeaderError: it is missing, or a link to another place.
    """
    path, home = folder / file, folder.resolve()
    target = path.resolve()
    # The hub's cache: snapshots/<revision>/<file> is a link to blobs/<digest>.
    homes = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}
    if target.parent not in homes:
        raise HeaderError(
            f"{path}: is a link out of the folder, to {target}. Put the file itself there."
        )
    if not target.is_file():
        raise HeaderError(f"{path}: there is no such file. Copy or download the model again.")
    return path


def _listed(folder: Path) -> dict[str, str]:
    """What the index says, tensor -> file; empty where one file holds everything."""
    if (folder / WEIGHTS).exists():
        return {}
    if not (folder / INDEX).exists():
        _refuse_pickles(folder)
        raise ModelError(
            f"{folder}: holds neither {WEIGHTS} nor {INDEX}. Give the folder of a model that "
            "save_pretrained wrote."
        )
    path = check_inside(folder, INDEX)
    index = container.parse_json(_text(path, container.MAX_HEADER), str(path))
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise HeaderError(f"{path}: has no table 'weight_map'. {container.DAMAGED}")
    for file in listed.values():
        plain = isinstance(file, str) and not set(file) & set("/\\\0") and len(file) < 256
        if not plain or not str(file).endswith(".safetensors"):
            raise HeaderError(
                f"{path}: names the file {file!r}, which is not the plain name of a .safetensors "
                "file."
            )
    return {name: str(file) for name, file in listed.items()}


def _refuse_pickles(folder: Path) -> None:
    for name in _PICKLED:
        if (folder / name).exists():
            raise PickleRefusedError(
                f"{folder / name}: is a pickle; reading it can run code, so it is refused. Where "
                'you trust it, convert it with: python -c "from transformers import AutoModel'
                f"ForCausalLM as M; M.from_pretrained({str(folder)!r}).save_pretrained('NEW')\""
            )


def _read_config(folder: Path) -> dict[str, Json]:
    path = folder / CONFIG
    if not path.exists():
        return {}
    text = _text(check_inside(folder, CONFIG), _MAX_CONFIG)
    try:
        # As transformers reads it: some models' own settings are infinite.
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{path}: not valid JSON: {error}. {container.DAMAGED}") from error
    if not isinstance(config, dict):
        raise HeaderError(f"{path}: is not a table. {container.DAMAGED}")
    return config


def _text(path: Path, limit: int) -> str:
    size = path.stat().st_size
    if size > limit:
        raise HeaderError(f"{path}: {size} bytes exceed the limit of {limit}. {container.DAMAGED}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(f"{path}: not valid UTF-8: {error}. {container.DAMAGED}") from error


def _read_header(path: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Where each tensor of a file lies, in the file's order, and its metadata."""
    with container.opened(path) as checked:  # offsets, sizes and bounds are right from here on
        metadata: dict[str, str] = checked.metadata() or {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length).decode("utf-8")
    header: Any = container.parse_json(text, f"{path}: header")
    header.pop("__metadata__", None)
    entries = {}
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        if item["dtype"] not in DTYPES:
            raise HeaderError(
                f"{path}: tensor {name!r} has dtype {item['dtype']}; read are {', '.join(DTYPES)}."
            )
        dtype, shape = DTYPES[item["dtype"]], tuple(item["shape"])
        start, end = item["data_offsets"]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise HeaderError(f"{path}: tensor {name!r} has the wrong size. {container.DAMAGED}")
        entries[name] = _Entry(path.name, dtype, shape, 8 + length + start)
    return entries, metadata
