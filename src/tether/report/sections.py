"""The parts of a page that show one adapter's sites, for every page that has an adapter."""

from collections.abc import Sequence

from tether.report import figures
from tether.report.page import Cell, Part, Table, Text
from tether.report.values import SiteStats

_MOST_CHOICES = 256  # sites whose curves are drawn: bounds the size of the page


def change(sites: Sequence[SiteStats]) -> list[Part]:
    """Heatmaps of sites × layers.

    Args:
        sites: of an adapter.

    Returns:
        figures of |ΔW|/|W| (of |ΔW| where no |W| is known) and of the effective rank.
    """
    known = any(site.relative is not None for site in sites)
    size = "|ΔW|/|W|" if known else "|ΔW|"
    return [
        figures.site_heatmap(
            "change",
            f"Size of the change, {size}",
            "The stronger the colour, the larger beside the weight. A click shows the site below."
            if known
            else "The stronger the colour, the larger. The norms of the base are not known here.",
            sites,
            (lambda site: site.relative) if known else (lambda site: site.norm),
            (lambda value: f"{value:.3%}") if known else (lambda value: f"{value:.4g}"),
        ),
        figures.site_heatmap(
            "effective-rank",
            "Effective rank of ΔW",
            "exp of the entropy of σ²/Σσ²: 1 for a change in a single direction, k for k equal "
            "ones.",
            sites,
            lambda site: site.effective_rank,
            lambda value: f"{value:.2f}",
        ),
    ]


def one_site(sites: Sequence[SiteStats]) -> list[Part]:
    """Figures of one site at a time.

    Args:
        sites: of an adapter.

    Returns:
        spectra and energy by rank; none where nothing has changed yet.
    """
    shown = sites[:_MOST_CHOICES]
    if not any(site.norm > 0 for site in shown):
        return [Text("The adapter is at its start: ΔW is zero everywhere.")]
    choices = tuple(site.path + (", with W" if site.base else "") for site in shown)
    chosen = _most_changed(shown)
    parts: list[Part] = [
        figures.spectra(shown, choices, chosen),
        figures.energy_by_rank(shown, choices, chosen),
    ]
    if len(shown) < len(sites):
        parts.append(
            Text(f"Drawn are the first {len(shown)} of {len(sites)} sites; the table has all.")
        )
    return parts


def beside_base(sites: Sequence[SiteStats]) -> list[Part]:
    """Figures that need the base's weights.

    Args:
        sites: of an adapter.

    Returns:
        overlap and intruder dimensions of the sites that were measured, and which those are.
    """
    read_sites = [site for site in sites if site.base is not None]
    if not read_sites:
        return [
            Text(
                "The overlap of ΔW with the directions of W, intruder dimensions and the spectra "
                "of W need the base's weights: tether report RUN_DIR --base MODEL adds them."
            )
        ]
    parts: list[Part] = [figures.overlap(sites), figures.intruders(sites)]
    if len(read_sites) < len(sites):
        parts.append(
            Text(
                f"Measured at {len(read_sites)} of {len(sites)} sites, spread evenly over kinds "
                "and layers; --base-sites 0 measures all."
            )
        )
    return parts


def _most_changed(sites: Sequence[SiteStats]) -> int:
    """The place of the site to look at first: of those with W, if there are any."""
    with_weight = any(site.base is not None for site in sites)
    places = [i for i, site in enumerate(sites) if site.base is not None or not with_weight]
    return max(places, key=lambda place: (sites[place].relative or 0.0, sites[place].norm))


def site_table(sites: Sequence[SiteStats]) -> Table:
    """All sites with their numbers.

    Args:
        sites: of an adapter.

    Returns:
        the table; its rows lead to the spectra.
    """
    with_weights = any(site.base is not None for site in sites)
    columns = ("site", "shape", "rank", "|ΔW|", "|ΔW|/|W|", "effective rank", "largest σ", "anchor")
    extra = ("top k", "bottom k", "intruders") if with_weights else ()
    return Table(
        name="sites",
        title="All sites",
        caption="A click on a heading sorts, one on a site shows its spectra. “anchor” is the "
        "norm of the anchor beside that of W.",
        columns=columns + extra,
        rows=tuple(_row(site, with_weights) for site in sites),
        opens="spectra" if any(site.norm > 0 for site in sites[:_MOST_CHOICES]) else None,
    )


def _row(site: SiteStats, with_weights: bool) -> tuple[Cell, ...]:
    taken = sum(value**2 for value in site.anchor) ** 0.5
    cells = (
        Cell.word(site.path),
        Cell("×".join(map(str, site.shape)), site.shape[0] * site.shape[1]),
        Cell.number(site.rank, "d"),
        Cell.number(site.norm),
        Cell.number(site.relative, ".3%"),
        Cell.number(site.effective_rank, ".2f"),
        Cell.number(site.spectrum[0]),
        Cell.number(taken / site.weight if site.weight and site.anchor else None, ".1%"),
    )
    if not with_weights:
        return cells
    base = site.base
    return (
        *cells,
        Cell.number(None if base is None else base.top, ".1%"),
        Cell.number(None if base is None else base.bottom, ".1%"),
        Cell.number(None if base is None else base.intruders, "d"),
    )
