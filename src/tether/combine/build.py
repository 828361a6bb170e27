"""The combined value: what each rule makes of a site, put together with where it came from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import MappingProxyType

import torch
from torch import Tensor

from tether.combine import terms
from tether.combine.terms import Term
from tether.errors import TetherError
from tether.provenance import Fingerprint, Provenance
from tether.value import Adapter, Factors, Json, LayerAdapter, Layout, Progress, Trained


@dataclass(frozen=True, slots=True)
class CombinedSite:
    """What combining cost at one site.

    Attributes:
        rank: of the combined factors.
        norm: |ΔW|_F of the combination before its rank was reduced.
        error: |ΔW − ΔW'|_F / |ΔW|_F, measured in float64 on the factors returned.
    """

    rank: int
    norm: float
    error: float


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """A combination of adapters.

    Of where the adapters came from it keeps what is said of the base, and what they agree in: the
    fingerprints, the names, and a site's gap where none gives another. The certificates, learning
    rates and steps say how each of them was made: the combination has no anchor to be certified.

    Attributes:
        adapter: plain: no anchors, scaling 1, dropout 0. Its config is the recipe.
        sites: site path -> rank, norm and measured error.
    """

    adapter: Adapter
    sites: Mapping[str, CombinedSite]

    def __post_init__(self) -> None:
        """Freeze the mapping."""
        object.__setattr__(self, "sites", MappingProxyType(dict(self.sites)))

    @property
    def error(self) -> float:
        """Relative Frobenius error of all sites' changes taken together."""
        total = sum(site.norm**2 for site in self.sites.values())
        lost = sum((site.norm * site.error) ** 2 for site in self.sites.values())
        return float((lost / total) ** 0.5) if total > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """One combined site.

    Attributes:
        layer: plain.
        norm: |ΔW|_F of the combination before its rank was reduced.
        error: relative, measured.
    """

    layer: LayerAdapter
    norm: float
    error: float


OnSite = Callable[[str, Layout, Sequence[Term[LayerAdapter]]], Result]
OnWhole = Callable[[str, Sequence[Term[Tensor]]], Tensor]


@torch.no_grad()
def build(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    recipe: Mapping[str, Json],
    on_site: OnSite,
    on_whole: OnWhole,
    progress: Progress | None,
) -> Combined:
    """Apply a rule to every site and every parameter that is trained whole.

    Args:
        adapters: read, never changed. A site that an adapter does not have is zero there.
        weights: one for each, or None for 1 each.
        recipe: the method's name as "combine", and its settings.
        on_site: (path, layout, one or more terms) -> the combined site.
        on_whole: (name, one or more terms) -> the combined displacement.
        progress: called with (sites done, sites in all).

    Returns:
        the combination.

    Raises:
        TetherError: as of `terms.check`; those of the rules, naming the site.
    """
    chosen = terms.check(adapters, weights)
    layouts = terms.layouts(adapters)
    results: dict[str, Result] = {}
    for done, (path, layout) in enumerate(layouts.items(), start=1):
        parts = terms.site_terms(adapters, chosen, path)
        try:
            results[path] = on_site(path, layout, parts) if parts else nothing(layout)
        except TetherError as error:
            raise type(error)(f"site {path!r}: {error}") from error
        if progress is not None:
            progress(done, len(layouts))
    targets, excluded = _targets(adapters, tuple(layouts))
    adapter = Adapter(
        layers={path: result.layer for path, result in results.items()},
        provenance=_provenance(adapters, recipe),
        config={**recipe, "weights": list(chosen)},
        targets=targets,
        excluded=excluded,
        biases=_biases(adapters, chosen, on_whole),
        modules=_modules(adapters, chosen, on_whole),
    )
    sites = {p: CombinedSite(r.layer.rank, r.norm, r.error) for p, r in results.items()}
    return Combined(adapter, sites)


def nothing(layout: Layout, dtype: torch.dtype = torch.float32) -> Result:
    """A change of zero.

    Args:
        layout: of the site.
        dtype: of the factors.

    Returns:
        zero factors of rank 1, without error.
    """
    a = torch.zeros(1, layout.in_features, dtype=dtype)
    b = torch.zeros(layout.out_features, 1, dtype=dtype)
    return Result(LayerAdapter(Factors(a, b), None, 1.0, layout), 0.0, 0.0)


def _biases(
    adapters: Sequence[Adapter], weights: Sequence[float], on_whole: OnWhole
) -> dict[str, Trained]:
    own = [{f"{path}.bias": bias for path, bias in a.biases.items()} for a in adapters]
    return {name.removesuffix(".bias"): t for name, t in _whole(own, weights, on_whole)}


def _modules(
    adapters: Sequence[Adapter], weights: Sequence[float], on_whole: OnWhole
) -> dict[str, dict[str, Trained]]:
    found: dict[str, dict[str, Trained]] = {}
    for module in dict.fromkeys(path for adapter in adapters for path in adapter.modules):
        own = [
            {f"{module}.{name}": value for name, value in a.modules.get(module, {}).items()}
            for a in adapters
        ]
        found[module] = {
            name.removeprefix(f"{module}."): t for name, t in _whole(own, weights, on_whole)
        }
    return found


def _whole(
    own: Sequence[Mapping[str, Trained]], weights: Sequence[float], on_whole: OnWhole
) -> Iterator[tuple[str, Trained]]:
    for name in dict.fromkeys(name for parameters in own for name in parameters):
        start = next(parameters[name].anchor for parameters in own if name in parameters)
        assert start is not None
        parts = terms.whole_terms(own, weights, name)
        moved = on_whole(name, parts) if parts else torch.zeros_like(start)
        yield name, Trained(moved, start.clone())


def _provenance(adapters: Sequence[Adapter], recipe: Mapping[str, Json]) -> Provenance:
    origins = [adapter.provenance for adapter in adapters]
    prints: dict[str, Fingerprint] = {}
    for origin in reversed(origins):
        prints |= origin.fingerprints
    seed = recipe.get("seed")
    return Provenance(
        method=f"combine:{recipe['combine']}",
        seed=seed if isinstance(seed, int) else None,
        tether_version=version("tether"),
        base_model=_agreed([origin.base_model for origin in origins]),
        base_class=_agreed([origin.base_class for origin in origins]),
        fingerprints=prints,
        gaps=_gaps(origins, prints),
    )


def _gaps(origins: Sequence[Provenance], prints: Mapping[str, Fingerprint]) -> dict[str, float]:
    """Site path -> how far the base lies from the original weight, where no two say otherwise."""
    found: dict[str, set[float]] = {}
    for origin in origins:
        for path, gap in origin.gaps.items():
            # The same values in plain layers are the same base, but one that nothing was lost of.
            if path in prints and origin.fingerprints.get(path) == prints[path]:
                found.setdefault(path, set()).add(gap)
    return {path: gaps.pop() for path, gaps in found.items() if len(gaps) == 1}


def _agreed(names: Sequence[str | None]) -> str | None:
    """The one name that all who know one give."""
    known = {name for name in names if name is not None}
    return known.pop() if len(known) == 1 else None


def _targets(
    adapters: Sequence[Adapter], sites: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that select the sites of all adapters, and what to leave out.

    Each adapter's names select its own sites. Where no adapter leaves anything out, all names
    together select all sites. Otherwise a name of one may be left out by another: then whole
    paths, and of what was left out only modules whose path ends in one of them.
    """
    first = adapters[0]
    alike = all(
        (set(a.layers), a.targets, a.excluded) == (set(sites), first.targets, first.excluded)
        for a in adapters
    )
    if alike:
        return first.targets, first.excluded
    if not any(adapter.excluded for adapter in adapters):
        return tuple(sorted({name for adapter in adapters for name in adapter.targets})), ()
    left_out = {name for adapter in adapters for name in adapter.excluded} - set(sites)
    besides = (name for name in left_out if any(name.endswith("." + site) for site in sites))
    return tuple(sorted(sites)), tuple(sorted(besides))
