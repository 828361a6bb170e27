"""Writes hostile files: any part of a valid native file or PEFT folder, replaced."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

import tether
from tether import Adapter, Factors, LayerAdapter, Layout, Provenance
from tether.errors import FormatError
from tether.fingerprints import fingerprint_tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


class Raw(str):
    """JSON text to be written as it is, where `json.dumps` would not write it."""


def small_adapter() -> Adapter:
    """An anchored site of rank 2 and a plain one of rank 1, with every field of provenance set."""
    weight = torch.arange(12.0).view(3, 4)
    anchored = LayerAdapter(
        trainable=Factors(torch.full((2, 4), 0.25), torch.full((3, 2), -0.5)),
        anchor=Factors(torch.full((2, 4), 1.5), torch.full((3, 2), 2.5)),
        scaling=0.5,
        layout=Layout("linear", (3, 4)),
        dropout=0.125,
    )
    plain = LayerAdapter(
        Factors(torch.ones(1, 2), torch.ones(2, 1)), None, 1.0, Layout("linear", (2, 2))
    )
    origin = Provenance(
        method="pissa",
        seed=0,
        tether_version="0.1.0",
        base_model="org/base",
        base_class="transformers.LlamaForCausalLM",
        learning_rate=1e-3,
        steps=7,
        fingerprints={"layers.0.up": fingerprint_tensor(weight)},
    )
    return Adapter(
        layers={"layers.0.up": anchored, "head": plain},
        provenance=origin,
        config={"rank": 2},
        targets=("up", "head"),
        excluded=("vision.up",),
    )


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The decoded `adapter` metadata and the tensors of a native file."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["adapter"]), load_file(path)


def to_json(value: Any) -> str:
    """JSON, with every `Raw` value inside written as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {to_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return json.dumps(value)


def seal(path: Path, header: Any, tensors: dict[str, Tensor], **metadata: str | None) -> Path:
    """Write a native file whose digests are right, as an attacker would.

    `metadata` replaces entries; None leaves one out.
    """
    text = to_json(header)
    digests = json.dumps({name: _sha256(_bytes(t)) for name, t in tensors.items()})
    entries = {"format": "tether", "version": "2", "adapter": text, "digests": digests} | metadata
    sealed = b"".join(
        (entries[k] or "").encode() + b"\0" for k in ("version", "adapter", "digests")
    )
    entries = {"digest": _sha256(sealed)} | entries
    save_file(tensors, path, {k: v for k, v in entries.items() if v is not None})
    return path


def write_container(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a safetensors file byte by byte."""
    raw = to_json(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def peft_folder(folder: Path, config: Any = None, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a PEFT folder of one site "m" (4, 3) of rank 2; `config` adds fields or is Raw text."""
    folder.mkdir()
    if not isinstance(config, Raw):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | (config or {})
    (folder / CONFIG).write_text(to_json(config), encoding="utf-8")
    save_file(peft_tensors() if tensors is None else tensors, folder / WEIGHTS)
    return folder


def peft_tensors(site: str = "m", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The two tensors of one site, (4, 3) of rank 2."""
    stem = PREFIX + site
    a, b = torch.ones(2, 3, dtype=dtype), torch.ones(4, 2, dtype=dtype)
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}


def refused(path: Path, kind: type[Exception], *words: str, named: Path | None = None) -> str:
    """Check that loading `path` raises exactly `kind`, naming the file and the problem."""
    with pytest.raises(kind) as caught:
        tether.load(path)
    message = str(caught.value)
    assert type(caught.value) is kind
    for word in (str(named or path), *words):
        assert word in message
    return message


def is_refused(path: Path) -> bool:
    """Whether loading `path` raises a FormatError that names it."""
    try:
        tether.load(path)
    except FormatError as error:
        return str(path) in str(error)
    return False


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
