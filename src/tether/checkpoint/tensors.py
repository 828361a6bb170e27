"""A model folder on disk, read tensor by tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tether.checkpoint.folder import (
    INDEX,
    WEIGHTS,
    Entry,
    check_inside,
    read_config,
    read_header,
    read_index,
)
from tether.errors import HeaderError, ModelError, TruncatedFileError, UnknownNameError, nearest
from tether.fingerprints import raw_bytes
from tether.formats import container
from tether.value import Json


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
    _entries: Mapping[str, Entry]

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
        entries: dict[str, Entry] = {}
        shards, metadata = {}, {}
        listed = read_index(folder)
        for file in sorted(set(listed.values())) or (WEIGHTS,):
            found, metadata[file] = read_header(check_inside(folder, file))
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
        return cls(folder, read_config(folder), shards, metadata, entries)

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

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise UnknownNameError(
                f"{self.folder}: has no tensor {name!r}. {nearest(name, self._entries)}"
            )
        return self._entries[name]
