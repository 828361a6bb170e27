"""The files of a model folder beside its weights: which are copied, which are written anew."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from tether import fs
from tether.checkpoint import CONFIG, INDEX, Checkpoint, check_inside
from tether.errors import WriteError
from tether.value import Json

# Weights in any other form, and an adapter's files: they would not be the merged model's.
_LEFT_OUT = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"),
    *(".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".npy", ".joblib"),
)


def check_outside(path: Path, source: Path, what: str) -> None:
    """Raise if a folder to write lies in an input folder.

    Args:
        path: of the folder to write.
        source: an input folder, or file.
        what: what to call the input.

    Raises:
        WriteError: it does.
    """
    target, place = path.resolve(), source.resolve()
    if target == place or place in target.parents:
        raise WriteError(f"{path}: lies in the folder of the {what}, {source}; give another place.")


def check_free(path: Path) -> None:
    """Raise unless a folder to write is new, or empty: a model there would be lost.

    Args:
        path: of the folder.

    Raises:
        WriteError: it holds something.
    """
    if path.is_dir() and (first := next(iter(sorted(path.iterdir())), None)):
        raise WriteError(f"{path}: holds {first.name!r}; give a new folder, or empty this one.")


def beside_weights(folder: Path) -> tuple[list[str], list[str]]:
    """The files of a model folder that a merged model takes over, and what it does not.

    Args:
        folder: of the base.

    Returns:
        names to copy; and names left out: other forms of the weights, and folders.

    Raises:
        HeaderError: a file is a link to another place.
    """
    copied, left_out = [], []
    for item in sorted(folder.iterdir()):
        name = item.name
        if name.startswith(".") or name == CONFIG:
            continue
        if item.is_dir() or name.endswith(_LEFT_OUT) or name.startswith("adapter_"):
            left_out.append(name)
        else:
            copied.append(check_inside(folder, name).name)
    return copied, left_out


def write_beside(
    base: Checkpoint, folder: Path, copied: list[str], changes: Mapping[str, Json]
) -> None:
    """Fill in what a model folder needs beside its weights.

    Args:
        base: the checkpoint.
        folder: to fill.
        copied: names to copy.
        changes: entries of config.json that change; none to copy it as it is.
    """
    for name in (*copied, *([] if changes else [CONFIG])):
        fs.copy_file(base.folder / name, folder / name)
    if changes:
        text = json.dumps(dict(base.config) | dict(changes), indent=2, ensure_ascii=False)
        fs.write_text(folder / CONFIG, text + "\n")


def write_index(folder: Path, shards: Mapping[str, tuple[str, ...]], size: int) -> None:
    """Say which file holds which tensor, where there is more than one.

    Args:
        folder: to fill.
        shards: file -> names of its tensors.
        size: bytes of all tensors.
    """
    listed = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(listed.items()))}
    fs.write_text(folder / INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")


def with_dtype(config: Mapping[str, Json], dtype: torch.dtype) -> dict[str, Json]:
    """The entries of a config that say in which dtype the weights are.

    Args:
        config: of the base.
        dtype: of the merged weights.

    Returns:
        the entries that change, nested ones too.
    """
    name = str(dtype).removeprefix("torch.")
    changes: dict[str, Json] = {"dtype": name}
    if "torch_dtype" in config:
        changes["torch_dtype"] = name
    for key, value in config.items():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            changes[key] = value | with_dtype(value, dtype)
    return changes
