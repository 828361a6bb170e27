"""save_as_lora: any adapter, live or not, as the plain LoRA folder that other software reads."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tether import algebra
from tether.errors import ConfigError
from tether.formats import peft_write
from tether.handle import Handle
from tether.value import Adapter


@dataclass(frozen=True, slots=True)
class SiteReport:
    """What one site became.

    Attributes:
        rank: of the factors that carry its change, before zero rows are added.
        norm: |ΔW|_F.
        error: |ΔW − ΔW'|_F / |ΔW|_F, ΔW' from the numbers in the file.
    """

    rank: int
    norm: float
    error: float


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What `save_as_lora` wrote, measured on the written numbers in float64.

    Attributes:
        path: of the folder.
        dtype: of the tensors.
        rank: of the file.
        sites: site path -> report.
    """

    path: Path
    dtype: str
    rank: int
    sites: Mapping[str, SiteReport]

    @property
    def error(self) -> float:
        """Relative Frobenius error of all sites' changes taken together."""
        total = sum(site.norm**2 for site in self.sites.values())
        lost = sum((site.norm * site.error) ** 2 for site in self.sites.values())
        return float((lost / total) ** 0.5) if total > 0 else 0.0


def save_as_lora(
    source: Handle | Adapter,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    dtype: torch.dtype | None = None,
    after: str = "keep",
) -> ConversionReport:
    """Write a plain LoRA for the unchanged base, as a PEFT folder.

    A live model is only looked at: weights, gradients, modes, requires_grad and random state stay
    as they are, and the adapter goes on living.

    Args:
        source: a handle, or an adapter.
        path: of the folder. An older adapter there is replaced in one step; a folder that holds
            other files is refused.
        rank: largest rank of any site; None for no limit (2r for an anchored adapter).
        tolerance: largest relative error of any site's ΔW from reducing its rank.
        dtype: of the file: float32 (None), bfloat16 or float16.
        after: what becomes of the live adapter: "keep" leaves it as it is.

    Returns:
        the measured report.

    Raises:
        ConfigError: rank, tolerance, dtype or `after` cannot be meant.
        UnsupportedAdapterError: a site that PEFT cannot express, by name.
        NonFiniteError: a value is NaN or Inf, or does not fit `dtype`.
        WriteError: it cannot be written; what was there stays.
    """
    if after != "keep":
        raise ConfigError(f"after={after!r}: the live adapter can only be kept; use after='keep'.")
    adapter = source.snapshot() if isinstance(source, Handle) else source
    dtype = torch.float32 if dtype is None else dtype
    plain = algebra.to_lora(adapter, rank, tolerance)
    written = peft_write.canonical(plain, dtype)
    report = ConversionReport(
        path=Path(path),
        dtype=peft_write.DTYPES[dtype],
        rank=max(layer.rank for layer in plain.layers.values()),
        sites={
            site: SiteReport(
                rank=plain.layers[site].rank,
                norm=algebra.norm(layer),
                error=algebra.relative_error(layer, written[site]),
            )
            for site, layer in adapter.layers.items()
        },
    )
    peft_write.save(plain, path, dtype)
    return report
