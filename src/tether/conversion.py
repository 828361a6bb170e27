"""ConversionReport: what `save_as_lora` wrote, measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tether.value import Json


@dataclass(frozen=True, slots=True)
class SiteReport:
    """What one site became.

    Attributes:
        rank: of the factors that carry its change, before zero rows are added.
        norm: |ΔW|_F (with DoRA: of its low-rank part).
        error: |ΔW − ΔW'|_F / |ΔW|_F, ΔW' from the numbers in the file.
    """

    rank: int
    norm: float
    error: float


@dataclass(frozen=True, slots=True)
class Verification:
    """The live model beside base + file, on one batch.

    Attributes:
        error: |L − L'|_F / |L|_F of the logits, L of the live model, L' of base + file.
        largest: max |L − L'|.
        tolerance: largest `error` that is published.
        losses: mean next-token loss, or the model's own, of "base", "live" and each rank of the
            plain form, such as "rank 32"; empty where the batch has no loss.
    """

    error: float
    largest: float
    tolerance: float
    losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What `save_as_lora` wrote, measured on the written numbers in float64.

    Attributes:
        path: of the folder.
        dtype: of the tensors.
        rank: of the file.
        sites: site path -> report.
        curve: rank -> relative error of all sites' changes, cut to that rank, taken together.
        wholes: name of a parameter trained whole -> relative error of its displacement.
        verification: the comparison with the live model, if one was asked for.
        after: what became of the live adapter: "keep", "offload" or "detach".
        quantization: how the base is quantised that the adapter belongs to: no kind, one or more.
        gaps: site path -> |W_q − W| / |W| of that base, where the original weight W was at hand.
    """

    path: Path
    dtype: str
    rank: int
    sites: Mapping[str, SiteReport]
    curve: Mapping[int, float] = field(default_factory=dict)
    wholes: Mapping[str, float] = field(default_factory=dict)
    verification: Verification | None = None
    after: str = "keep"
    quantization: tuple[str, ...] = ()
    gaps: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Relative Frobenius error of all sites' changes taken together."""
        total = sum(site.norm**2 for site in self.sites.values())
        lost = sum((site.norm * site.error) ** 2 for site in self.sites.values())
        return float((lost / total) ** 0.5) if total > 0 else 0.0

    def to_dict(self) -> dict[str, Json]:
        """The report as JSON values.

        Returns:
            path, dtype, rank, error, curve, after, and for each site rank, norm and error; wholes,
            verification, quantization and gaps where there are any.
        """
        values: dict[str, Json] = {
            "path": str(self.path),
            "dtype": self.dtype,
            "rank": self.rank,
            "error": self.error,
            "curve": {str(rank): error for rank, error in self.curve.items()},
            "after": self.after,
            "sites": {path: asdict(site) for path, site in self.sites.items()},
        }
        if self.wholes:
            values["wholes"] = dict(self.wholes)
        if self.quantization:
            values["quantization"] = list(self.quantization)
            values["gaps"] = dict(self.gaps)
        if self.verification is not None:
            checked = self.verification
            values["verification"] = {
                "error": checked.error,
                "largest": checked.largest,
                "tolerance": checked.tolerance,
                "losses": dict(checked.losses),
            }
        return values

    def __str__(self) -> str:
        """A few lines for a person: size, error, what rank costs."""
        lines = [
            f"{self.path}: {len(self.sites)} sites, rank {self.rank}, {self.dtype}, "
            f"relative error {self.error:.2e}"
        ]
        if self.curve:
            cuts = ", ".join(f"{rank}: {error:.2e}" for rank, error in self.curve.items())
            lines.append(f"relative error when cut to rank {cuts}")
        if self.quantization:
            lines.append(f"for the base quantised as {', '.join(self.quantization)}")
        if self.gaps:
            low, high = min(self.gaps.values()), max(self.gaps.values())
            lines.append(f"which lies {low:.2g} to {high:.2g} of |W| from the original weights")
        if self.verification is not None:
            lines.append(
                f"logits differ by {self.verification.error:.2e} (largest "
                f"{self.verification.largest:.2e}), allowed {self.verification.tolerance:.2e}"
            )
            losses = self.verification.losses.items()
            lines += [f"loss of {name}: {loss:.6f}" for name, loss in losses]
        return "\n".join(lines)


def error_curve(spectra: Mapping[str, list[float]]) -> dict[int, float]:
    """What every rank would leave out, from the singular values of the changes.

    Args:
        spectra: site path -> singular values of ΔW, descending.

    Returns:
        rank (powers of two and the full rank) -> |ΔW − ΔW_rank|_F / |ΔW|_F over all sites.
    """
    full = max((len(values) for values in spectra.values()), default=0)
    total = sum(s * s for values in spectra.values() for s in values)
    if not full or not total > 0:
        return {}
    ranks = [1 << k for k in range(full.bit_length()) if 1 << k < full]
    left = {
        rank: sum(s * s for values in spectra.values() for s in values[rank:]) for rank in ranks
    }
    return {rank: float((rest / total) ** 0.5) for rank, rest in left.items()} | {full: 0.0}
