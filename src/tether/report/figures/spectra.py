"""The singular values of W, of the anchor and of ΔW, of one site at a time."""

from collections.abc import Sequence

from tether.report.figures.drawing import Data, Drawing, Figure, rounded
from tether.report.figures.svg import SERIES
from tether.report.values import SiteStats

_COLORS = {"W": SERIES[5], "anchor": SERIES[1], "ΔW": SERIES[0]}
_POINTS = 120  # drawn of one line
_DOTS = 16  # of one line that have a hover value
_SMALLEST = 1e-7  # of a site's largest value: below is rounding


def spectra(sites: Sequence[SiteStats], choices: Sequence[str], chosen: int) -> Figure:
    """Draw the spectra of every site on the same axes, one of them visible.

    Args:
        sites: one at least with a change or an anchor.
        choices: the name of each site.
        chosen: place of the site that is shown at first.

    Returns:
        the figure.
    """
    with Drawing() as drawing:
        drawing.log_scale("x")
        drawing.log_scale("y")
        for choice, site in enumerate(sites):
            for what, values in _lines(site).items():
                _draw(drawing, what, values, choice)
        axes = drawing.axes
        for what, color in _COLORS.items():
            if any(_lines(site)[what] for site in sites):
                axes.plot([], [], color=color, label=what)
        axes.set_xlabel("index of the singular value")
        axes.set_ylabel("singular value")
        axes.grid(axis="y")
        drawing.legend()
        picture = drawing.to_svg("spectra", chosen)
    first = sites[chosen]
    return Figure(
        name="spectra",
        title="Spectra of one site",
        caption="Singular values, largest first, both axes logarithmic and the same for all "
        "sites. The anchor is the part of W that the adapter started from. W itself is drawn "
        "of the sites marked “with W”.",
        alt=f"Of {choices[chosen]}: the largest singular value of ΔW is {_first(first.spectrum)}, "
        f"of the anchor {_first(first.anchor)}, of W "
        f"{_first(first.base.spectrum) if first.base else 'not read'}.",
        svg=picture,
        data=_data(sites),
        choices=tuple(choices),
        chosen=chosen,
    )


def _lines(site: SiteStats) -> dict[str, tuple[float, ...]]:
    weight = site.base.spectrum if site.base else ()
    return {"W": weight, "anchor": site.anchor, "ΔW": site.spectrum}


def _draw(drawing: Drawing, what: str, values: tuple[float, ...], choice: int) -> None:
    kept = [value for value in values if value > _SMALLEST * values[0]]
    if not kept:
        return
    drawing.curve(
        choice,
        _COLORS[what],
        what,
        [(place + 1, kept[place]) for place in _spread(len(kept), _POINTS)],
        [
            (place + 1, kept[place], f"{what}, σ{place + 1} = {kept[place]:.4g}")
            for place in _spread(len(kept), _DOTS)
        ],
    )


def _spread(count: int, most: int) -> list[int]:
    """Places of at most so many of `count` values, even on a logarithmic axis."""
    if count <= most:
        return list(range(count))
    steps = (round(count ** (step / (most - 1))) - 1 for step in range(most))
    return sorted(set(steps))


def _first(values: tuple[float, ...]) -> str:
    return f"{values[0]:.4g}" if values else "not there"


def _data(sites: Sequence[SiteStats]) -> Data:
    rows = [
        (site.path, what, *map(rounded, values))
        for site in sites
        for what, values in _lines(site).items()
        if values
    ]
    longest = max(len(row) for row in rows) - 2
    return Data(("site", "of", *map(str, range(1, longest + 1))), tuple(rows))
