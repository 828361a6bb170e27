"""How far training has moved the weights: |ΔW|/|W| and the effective rank of ΔW."""

import math
from dataclasses import dataclass

from tether import algebra, linalg
from tether.handle import Handle


@dataclass(frozen=True, slots=True)
class Drift:
    """How far an adapter has moved the weights.

    Attributes:
        relative: |ΔW|_F / |W|_F, all sites together; None where the adapter does not know the
            norms of its base (a file of another library).
        effective_rank: mean over the sites of exp(−Σ p·ln p) with p = σ²/Σσ², σ the singular
            values of ΔW: 1 for a single direction, k for k equal ones; 0 where ΔW = 0.
    """

    relative: float | None
    effective_rank: float


def measure_drift(handle: Handle) -> Drift:
    """Measure an attached adapter, from its factors alone: no ΔW is formed. Changes nothing.

    With DoRA it is the low-rank part that is measured. |W| is the norm that the provenance noted
    of each site's weight when the adapter was made.

    Args:
        handle: of the adapter.

    Returns:
        the measures, in float64.

    Raises:
        DetachedError: the adapter was detached.
    """
    source = handle.source()
    moved, ranks = 0.0, []
    for site in source.about.layers:
        values = algebra.singular_values(source.layer(site))
        moved += float(values.square().sum())
        ranks.append(linalg.effective_rank(values))
    prints = source.about.provenance.fingerprints
    known = all(site in prints for site in source.about.layers)
    base = math.sqrt(sum(prints[site].norm ** 2 for site in source.about.layers)) if known else 0.0
    relative = math.sqrt(moved) / base if base > 0 else None
    return Drift(relative, sum(ranks) / len(ranks))
