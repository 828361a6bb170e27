"""What a page shows of an adapter, as plain numbers. Pure functions; no model is needed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tether import algebra, linalg
from tether.sites import layer_index
from tether.value import Adapter, LayerAdapter, Progress


@dataclass(frozen=True, slots=True)
class BaseStats:
    """What only the weight itself tells of a site.

    Attributes:
        spectrum: the singular values of W, descending.
        count: k of the two overlaps.
        top: share of |ΔW|² along the first k singular directions of W, mean of both sides.
        bottom: the same of the last k.
        expected: the same of a change in random directions.
        intruders: how many of the leading left singular vectors of W + ΔW are near none of W's.
    """

    spectrum: tuple[float, ...]
    count: int
    top: float
    bottom: float
    expected: float
    intruders: int


@dataclass(frozen=True, slots=True)
class SiteStats:
    """One site of an adapter.

    Attributes:
        path: of the site.
        layer: index of the layer it lies in, if its path has one.
        kind: the path after that index, or the whole path: "self_attn.q_proj".
        shape: (out, in).
        rank: of the trained factors.
        norm: |ΔW|_F; with DoRA that of its low-rank part, here and below.
        weight: |W|_F, or None where it is not known.
        effective_rank: of ΔW, see `linalg.effective_rank`.
        spectrum: the singular values of ΔW, descending.
        energy: share of |ΔW|² in the best approximation of each rank.
        anchor: the singular values of s·B0·A0, descending; empty without an anchor.
        base: what the weight tells, where it was read.
    """

    path: str
    layer: int | None
    kind: str
    shape: tuple[int, int]
    rank: int
    norm: float
    weight: float | None
    effective_rank: float
    spectrum: tuple[float, ...]
    energy: tuple[float, ...]
    anchor: tuple[float, ...]
    base: BaseStats | None = None

    @property
    def relative(self) -> float | None:
        """|ΔW|_F / |W|_F, or None where |W| is not known or zero."""
        return self.norm / self.weight if self.weight else None


@dataclass(frozen=True, slots=True)
class DriftPoint:
    """How far the weights had moved after a step.

    Attributes:
        step: optimizer steps done.
        relative: |ΔW|_F / |W|_F of all sites together, or None where |W| is not known.
        effective_rank: mean over the sites.
    """

    step: int
    relative: float | None
    effective_rank: float


@dataclass(frozen=True, slots=True)
class RunValues:
    """What the page of a run shows.

    Attributes:
        name: of the run.
        facts: settings and results, by name, in the order to show them.
        curves: name -> (step, value) pairs: "training loss", "held-out loss", "learning rate", …
        drift: in the order of steps.
        sites: of the adapter at the end.
        sizes: file or folder of the run -> bytes.
        notes: sentences about what is not shown, and why.
    """

    name: str
    facts: Mapping[str, str]
    curves: Mapping[str, tuple[tuple[int, float], ...]]
    drift: tuple[DriftPoint, ...]
    sites: tuple[SiteStats, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def site_stats(adapter: Adapter, progress: Progress | None = None) -> list[SiteStats]:
    """Measure every site from its factors alone, in float64. No ΔW is formed.

    Args:
        adapter: anchored or plain.
        progress: called after each site.

    Returns:
        one for each site, in the adapter's order.
    """
    found = []
    for path, layer in adapter.layers.items():
        origin = adapter.provenance.fingerprints.get(path)
        found.append(_measure(path, layer, None if origin is None else origin.norm))
        if progress is not None:
            progress(len(found), len(adapter.layers))
    return found


def drift_of(step: int, sites: Iterable[SiteStats]) -> DriftPoint:
    """Sum up the sites of one moment, as `tether.integrations.transformers.measure_drift` does.

    Args:
        step: optimizer steps done.
        sites: of the adapter then; one at least.

    Returns:
        the point.
    """
    sites = list(sites)
    ranks = sum(site.effective_rank for site in sites) / len(sites)
    weights = [site.weight for site in sites if site.weight is not None]
    if len(weights) < len(sites) or not any(weights):
        return DriftPoint(step, None, ranks)
    return DriftPoint(
        step, math.hypot(*(site.norm for site in sites)) / math.hypot(*weights), ranks
    )


def _measure(path: str, layer: LayerAdapter, weight: float | None) -> SiteStats:
    for factor in (layer.trainable, layer.anchor):
        if factor is not None:
            linalg.check_finite(factor.A, f"site {path!r}: A")
            linalg.check_finite(factor.B, f"site {path!r}: B")
    values = algebra.singular_values(layer)
    anchor: tuple[float, ...] = ()
    if layer.anchor is not None:
        start = LayerAdapter(layer.anchor, None, layer.scaling, layer.layout)
        anchor = tuple(algebra.singular_values(start).tolist())
    return SiteStats(
        path=path,
        layer=layer_index(path),
        kind=kind_of(path),
        shape=(layer.layout.out_features, layer.layout.in_features),
        rank=layer.rank,
        norm=float(values.norm()),
        weight=weight,
        effective_rank=linalg.effective_rank(values),
        spectrum=tuple(values.tolist()),
        energy=tuple(linalg.energy(values).tolist()),
        anchor=anchor,
    )


def kind_of(path: str) -> str:
    """What sites of different layers have in common.

    Args:
        path: of a site.

    Returns:
        the path after the layer's index, or the whole path.
    """
    parts = path.split(".")
    index = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[index + 1 :]) or path
