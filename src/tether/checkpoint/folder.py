"""The files of a model folder: what index, headers and config.json say, checked."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tether.errors import HeaderError, ModelError, PickleRefusedError
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
class Entry:
    """Where one tensor lies.

    Attributes:
        file: name of its file.
        dtype: of its values.
        shape: of the tensor.
        start: bytes into the file.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


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


def read_index(folder: Path) -> dict[str, str]:
    """What the index says.

    Args:
        folder: of the model.

    Returns:
        tensor -> file; empty where one file holds everything.

    Raises:
        ModelError: there are no weights.
        PickleRefusedError: they are pickles.
        HeaderError: the index is malformed.
    """
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


def read_config(folder: Path) -> dict[str, Json]:
    """The config.json of a model.

    Args:
        folder: of the model.

    Returns:
        its values; empty if there is none.

    Raises:
        HeaderError: it is malformed.
    """
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


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """What the header of a file says.

    Args:
        path: of the file.

    Returns:
        where each tensor lies, in the file's order, and the metadata.

    Raises:
        HeaderError: it is malformed.
    """
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
        entries[name] = Entry(path.name, dtype, shape, 8 + length + start)
    return entries, metadata
