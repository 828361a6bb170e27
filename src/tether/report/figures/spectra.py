"""The singular values of W, of the anchor and of ΔW, of one site at a time."""

from collections.abc import Sequence

from tether.report.figures.drawing import Data, Drawing, Figure, rounded
from tether.report.figures.svg import SERIES
from tether.report.values import SiteStats

_DOTS = 20  # of one line that have a hover value
_SMALLEST = 1e-7  # of a site's largest value: below is rounding


def spectra(sites: Sequence[SiteStats], choices: Sequence[str]) -> Figure:
    """Draw the spectra of every site on the same axes, one of them visible.

    Args:
        sites: one at least with a change or an anchor.
        choices: the name of each site.

    Returns:
        the figure.
    """
    drawing = Drawing()
    axes = drawing.axes
    for choice, site in enumerate(sites):
        for number, (what, values) in enumerate(_lines(site).items()):
            _draw(drawing, what, values, SERIES[number], choice)
    for number, what in enumerate(_lines(sites[0])):
        axes.plot([], [], color=SERIES[number], label=what)
    drawing.log_scale("y")
    drawing.log_scale("x")
    axes.set_xlabel("index of the singular value")
    axes.set_ylabel("singular value")
    axes.grid(axis="y")
    axes.legend()
    name, first = "spectra", sites[0]
    return Figure(
        name=name,
        title="Spectra of one site",
        caption="Singular values, largest first, both axes logarithmic and the same for all "
        "sites. The anchor is the part of W that the adapter started from. W itself is drawn "
        "where it was read.",
        alt=f"Of {choices[0]}: the largest singular value of ΔW is {_first(first.spectrum)}, "
        f"of the anchor {_first(first.anchor)}, of W "
        f"{_first(first.base.spectrum) if first.base else 'not read'}.",
        svg=drawing.to_svg(name),
        data=_data(sites),
        choices=tuple(choices),
    )


def _lines(site: SiteStats) -> dict[str, tuple[float, ...]]:
    weight = site.base.spectrum if site.base else ()
    return {"W": weight, "anchor": site.anchor, "ΔW": site.spectrum}


def _draw(
    drawing: Drawing, what: str, values: tuple[float, ...], color: str, choice: int
) -> None:
    kept = [v for v in values if v > _SMALLEST * values[0]]
    if not kept:
        return
    places = _spread(len(kept), 200)
    (line,) = drawing.axes.plot(
        [place + 1 for place in places], [kept[place] for place in places], color=color
    )
    drawing.mark(line, what, choice)
    dotted = _spread(len(kept), _DOTS)
    dots = drawing.axes.scatter(
        [place + 1 for place in dotted], [kept[place] for place in dotted], s=12, color=color
    )
    drawing.mark(dots, [f"{what}, σ{place + 1} = {kept[place]:.4g}" for place in dotted], choice)


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
