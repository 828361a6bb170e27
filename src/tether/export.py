"""save_as_lora: any adapter, live or not, as the plain LoRA folder that other software reads."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tether import algebra
from tether.errors import ConfigError
from tether.formats import peft_write
from tether.handle import Handle
from tether.value import Adapter, Json, Progress


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

    def to_dict(self) -> dict[str, Json]:
        """The report as JSON values.

        Returns:
            path, dtype, rank, error, and for each site rank, norm and error.
        """
        return {
            "path": str(self.path),
            "dtype": self.dtype,
            "rank": self.rank,
            "error": self.error,
            "sites": {path: asdict(site) for path, site in self.sites.items()},
        }


def save_as_lora(
    source: Handle | Adapter,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    dtype: torch.dtype | None = None,
    after: str = "keep",
    progress: Progress | None = None,
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
        progress: called with (sites measured, sites in all).

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
    reports = {}
    for done, (site, layer) in enumerate(adapter.layers.items(), start=1):
        error = algebra.relative_error(layer, written[site])
        reports[site] = SiteReport(plain.layers[site].rank, algebra.norm(layer), error)
        if progress is not None:
            progress(done, len(adapter.layers))
    peft_write.save(plain, path, dtype)
    largest = max(report.rank for report in reports.values())
    return ConversionReport(Path(path), peft_write.DTYPES[dtype], largest, reports)
