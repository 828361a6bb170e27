"""Reading a safetensors file that may be hostile: bounded, named errors, never a pickle."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tether.errors import HeaderError, NotAnAdapterError, PickleRefusedError, TruncatedFileError
from tether.value import Json

MAX_HEADER = 64 * 2**20  # bytes; about 100,000 sites


DAMAGED = "The file is damaged. Copy or download it again."


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor and the metadata of a safetensors file.

    Args:
        path: of the file.

    Returns:
        tensors by name (mapped from the file, not copied) and the metadata.

    Raises:
        PickleRefusedError: it is a pickle.
        TruncatedFileError: it ends before its header says.
        HeaderError: the header is malformed, or larger than 64 MiB.
    """
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file whose header has been checked, and name every error in it.

    Args:
        path: of the file.

    Yields:
        the file as safetensors opens it.

    Raises:
        PickleRefusedError: it is a pickle.
        TruncatedFileError: it ends before its header says.
        HeaderError: the header is malformed, or larger than 64 MiB.
    """
    _check_start(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        text = str(error)
        if "MetadataIncompleteBuffer" in text or "incomplete metadata" in text:
            raise TruncatedFileError(
                f"{path}: the file is shorter or longer than its header says: it was cut off or "
                "damaged. Copy or download it again."
            ) from error
        raise HeaderError(
            f"{path}: not a valid safetensors file: {text}. It is damaged, or another kind of "
            "file. Copy or download it again."
        ) from error


def parse_json(text: str, where: str, limit: int = MAX_HEADER) -> Json:
    """Parse JSON strictly: no NaN, no repeated keys, bounded size and depth.

    Args:
        text: the document.
        where: what to call it in the message.
        limit: largest number of characters.

    Returns:
        the value.

    Raises:
        HeaderError: it is malformed or too large.
    """
    if len(text) > limit:
        raise HeaderError(f"{where}: {len(text)} characters exceed the limit of {limit}. {DAMAGED}")
    try:
        value: Json = json.loads(
            text,
            object_pairs_hook=_no_repeats,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{where}: not valid JSON: {error}. {DAMAGED}") from error
    return value


def check_file(path: Path) -> None:
    """Raise unless a path is an ordinary file: reading a pipe or a device may never end.

    Args:
        path: of the file.

    Raises:
        NotAnAdapterError: it is something else.
    """
    if not path.is_file():
        raise NotAnAdapterError(f"{path}: is not an ordinary file. Give the path of one.")


def _check_start(path: Path) -> None:
    check_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start, brace = file.read(8), file.read(1)
    pickled = start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")
    # A header's length may begin with the same bytes; its first character then follows.
    if pickled and brace != b"{":
        raise PickleRefusedError(
            f"{path}: is a pickle (a torch.save file); reading it can run code, so it is refused. "
            "Where you trust it, load it with torch.load(…, weights_only=True) and write it with "
            "safetensors.torch.save_file."
        )
    if size < 8:
        raise TruncatedFileError(f"{path}: {size} bytes are too few for a safetensors file.")
    header = int.from_bytes(start, "little")
    if header > MAX_HEADER:
        raise HeaderError(
            f"{path}: its header claims {header} bytes; at most {MAX_HEADER} are read. "
            "It is damaged, or not a safetensors file."
        )
    if 8 + header > size:
        raise TruncatedFileError(
            f"{path}: its header claims {header} bytes, the file has {size}: it was cut off. "
            "Copy or download it again."
        )


def _no_repeats(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not allowed")
