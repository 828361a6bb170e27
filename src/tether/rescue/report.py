"""What a rescue found: per site, and whether all of it can be trusted."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tether.errors import RescueError
from tether.value import Json

UNSURE = 0.1  # of |ΔW| of all sites: more may not be an artefact of computing the start again


@dataclass(frozen=True, slots=True)
class SiteRescue:
    """How one site's initial factors were found.

    Attributes:
        rank: of the trained factors.
        change: |ΔW|_F.
        anchor: |s·B0·A0|_F; 0 for a site that started as plain LoRA.
        left_over: |P − s·B0·A0|_F / |P|_F of base − residual, else 0.
        gap: how clearly the base determines the start, see `sources.Found`; None where it was not
            recomputed.
        uncertainty: estimate of |error of ΔW|_F / |ΔW|_F. From a residual it is the left-over, the
            rounding of the residual model, by which the base with ΔW differs from that model.
    """

    rank: int
    change: float
    anchor: float
    left_over: float
    gap: float | None
    uncertainty: float


@dataclass(frozen=True, slots=True)
class RescueReport:
    """What a rescue found.

    Attributes:
        source: "anchor", "residual" or "base".
        method: the start that the file names.
        sites: site path -> report.
    """

    source: str
    method: str
    sites: Mapping[str, SiteRescue]

    @property
    def uncertainty(self) -> float:
        """The uncertainty of all sites' changes taken together."""
        wrong = sum((site.uncertainty * site.change) ** 2 for site in self.sites.values())
        total = sum(site.change**2 for site in self.sites.values())
        return math.sqrt(wrong / total) if total > 0 else 0.0

    @property
    def worst(self) -> str:
        """The site of the largest uncertainty."""
        return max(self.sites, key=lambda path: self.sites[path].uncertainty)

    def check(self, path: Path) -> None:
        """Raise unless the whole can be trusted.

        Args:
            path: of the adapter, for the message.

        Raises:
            RescueError: nothing was trained, or a recomputed start is too unsure for so small a
                change.
        """
        if not any(site.change > 0 for site in self.sites.values()):
            raise RescueError(
                f"{path}: its factors are the initial ones: no site has changed. Give the "
                "trained adapter, and what was saved before training."
            )
        if self.source == "base" and self.uncertainty > UNSURE:
            site = self.sites[self.worst]
            raise RescueError(
                f"{path}: the start computed again may be wrong by {self.uncertainty:.0%} of so "
                f"small a change, and at most {UNSURE:.0%} is accepted; least sure is site "
                f"{self.worst!r}, gap {site.gap:.1e}. Give the adapter saved before training "
                "(anchor), or the residual model (residual)."
            )

    def to_dict(self) -> dict[str, Json]:
        """The report as JSON values.

        Returns:
            source, method, uncertainty, and for each site its fields.
        """
        return {
            "source": self.source,
            "method": self.method,
            "uncertainty": self.uncertainty,
            "sites": {path: asdict(site) for path, site in self.sites.items()},
        }
