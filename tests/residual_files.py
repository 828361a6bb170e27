"""Writes what may be on disk after a training on a residual model, without peft or a model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tether
from attacks.forge import CONFIG, PREFIX, WEIGHTS, peft_folder
from laws.cases import bits, truth
from tether import rescue

F64 = torch.float64
SHAPES = {"layers.0.q": (24, 16), "layers.0.p": (12, 20), "layers.1.q": (24, 16)}


def decaying(rows: int, columns: int, seed: int) -> Tensor:
    """A matrix (rows, columns) in float64 whose singular values fall from 1 by a fifth each."""
    g = torch.Generator().manual_seed(seed)
    smaller = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, smaller, generator=g, dtype=F64))[0]
    v = torch.linalg.qr(torch.randn(columns, smaller, generator=g, dtype=F64))[0]
    return u * 0.8 ** torch.arange(smaller, dtype=F64) @ v.T


def start_of(weight: Tensor, rank: int, kind: str) -> tuple[Tensor, Tensor]:
    """B0 and A0 for a scaling of 2, in the dtype of the weight."""
    if kind == "olora":
        q, r = torch.linalg.qr(weight)
        return q[:, :rank], r[:rank]
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / 2).sqrt()
    if kind == "small":  # as of LoRA-GA: rows of length one, and a B0 far smaller
        return 1e-3 * u[:, :rank], vt[:rank]
    return u[:, :rank] * root, root[:, None] * vt[:rank]


@dataclass(frozen=True)
class Files:
    """Everything that may be on disk, and ΔW = W_res + s·B·A − W in float64."""

    root: Path
    change: dict[str, Tensor]

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    def given(self, source: str) -> dict[str, Path]:
        both = {"base": self.root / "base", "residual": self.root / "residual"}
        return {
            "anchor": {"anchor": self.root / "start"},
            "residual": both,
            "base": {"base": both["base"]},
        }[source]

    def open(self, source: str) -> rescue.Rescue:
        given = self.given(source)
        return rescue.open_rescue(
            self.adapter, *(given.get(name) for name in ("anchor", "base", "residual"))
        )


def files(
    root: Path,
    kind: str = "pissa",
    size: float = 0.05,
    dtype: torch.dtype = torch.float32,
    config: dict | None = None,
    flat: bool = False,
) -> Files:
    """Write base, residual, start and trained adapter, of rank 3 and scaling 2.

    `size`: of the displacement, relative to the factors; `dtype`: of the two models.
    """
    base, residual, start, trained, change = {}, {}, {}, {}, {}
    g = torch.Generator().manual_seed(7)
    for number, (site, (rows, columns)) in enumerate(SHAPES.items()):
        weight = decaying(rows, columns, number)
        if flat:
            weight = torch.linalg.qr(weight)[0].contiguous()
        weight = weight.to(dtype).double()
        b0, a0 = start_of(weight, 3, kind)
        b, a = (
            t + size * t.norm() / t.numel() ** 0.5 * torch.randn(t.shape, generator=g, dtype=F64)
            for t in (b0, a0)
        )
        b, a, b0, a0 = (t.float() for t in (b, a, b0, a0))
        base[f"{site}.weight"] = weight.to(dtype)
        residual[f"{site}.weight"] = (weight - 2 * b0.double() @ a0.double()).to(dtype)
        for tensors, pair in ((trained, (a, b)), (start, (a0, b0))):
            for side, tensor in zip("AB", pair, strict=True):
                tensors[f"{PREFIX}{site}.lora_{side}.weight"] = tensor.contiguous()
        left = residual[f"{site}.weight"].double() - base[f"{site}.weight"].double()
        change[site] = left + 2 * b.double() @ a.double()
    name = {"small": "lora_ga"}.get(kind, kind)
    settings = {"r": 3, "lora_alpha": 6, "init_lora_weights": name, "target_modules": ["q", "p"]}
    settings |= {"base_model_name_or_path": "org/base"} | (config or {})
    root.mkdir(exist_ok=True)
    peft_folder(root / "adapter", settings, trained)
    peft_folder(root / "start", settings, start)
    for model, tensors in (("base", base), ("residual", residual)):
        (root / model).mkdir()
        save_file(tensors, root / model / "model.safetensors")
    return Files(root, change)


def worst(adapter: tether.Adapter, made: Files) -> float:
    """The largest relative error of any site's change, from the float32 factors in float64."""
    return max(
        float((truth(layer) - made.change[s]).norm() / made.change[s].norm())
        for s, layer in adapter.layers.items()
    )


def written(path: Path) -> dict[str, Tensor | str]:
    """All of a PEFT folder but the model card's words."""
    tensors: dict[str, Tensor | str] = dict(load_file(path / WEIGHTS))
    return tensors | {CONFIG: (path / CONFIG).read_text(), "card": (path / "README.md").read_text()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        bits(value) == bits(other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )
