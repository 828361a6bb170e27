"""The files of a run as values that can be compared."""

import json
from pathlib import Path
from typing import Any

from tether.fingerprints import raw_bytes
from tether.formats import container


def tensors(path: Path) -> dict[str, object]:
    """Every tensor's dtype, shape and bytes, and the metadata, of a safetensors file."""
    found, metadata = container.read(path)
    return {n: (t.dtype, t.shape, bytes(raw_bytes(t))) for n, t in found.items()} | metadata


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for the time they took."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines]


def everything(out: Path) -> dict[str, object]:
    """All that a run wrote but for its page; equal values are the same run, bit for bit."""
    found: dict[str, object] = {"metrics": metrics(out)}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".safetensors":
            found[name] = tensors(path)
        elif path.is_file() and name not in ("metrics.jsonl", "report.html"):
            found[name] = path.read_text()
    return found
