"""How much of ΔW a smaller rank would keep."""

from collections.abc import Sequence

from tether.report.figures.drawing import Data, Drawing, Figure, rounded
from tether.report.figures.svg import SERIES
from tether.report.values import SiteStats

_EACH = 8  # ranks with a dot each; above, every fourth has one
_LEFT_OUT = (0.1, 0.01, 0.001)  # shares of the energy whose ranks are told in words


def energy_by_rank(sites: Sequence[SiteStats], choices: Sequence[str], chosen: int) -> Figure:
    """Draw each site's energy over rank, one site visible, and the mean of all.

    Args:
        sites: one at least with a change.
        choices: the name of each site.
        chosen: place of the site that is shown at first.

    Returns:
        the figure.
    """
    longest = max(len(site.energy) for site in sites)
    moved = [site for site in sites if site.norm > 0]
    ranks = range(1, longest + 1)
    mean = [sum(_at(site, rank) for site in moved) / len(moved) for rank in ranks]
    with Drawing() as drawing:
        axes = drawing.axes
        (line,) = axes.plot(ranks, mean, color=SERIES[5], linestyle="--", label="mean of all sites")
        drawing.mark(line, "mean of all sites")
        axes.plot([], [], color=SERIES[0], label="this site")
        axes.set_ylim(0, 1.03)
        axes.set_xlim(left=0)
        for choice, site in enumerate(sites):
            if site.norm > 0:
                _draw(drawing, site, choice)
        axes.set_xlabel("rank kept")
        axes.set_ylabel("share of |ΔW|²")
        axes.grid(axis="y")
        drawing.legend()
        picture = drawing.to_svg("energy", chosen)
    rows = [(site.path, *map(rounded, site.energy)) for site in sites]
    return Figure(
        name="energy",
        title="Energy of ΔW by rank",
        caption="The share of |ΔW|² in its best approximation of each rank. Where the curve is "
        "flat, a smaller rank loses little.",
        alt="Mean of all sites: " + "; ".join(_needed(mean, share) for share in _LEFT_OUT) + ".",
        svg=picture,
        data=Data(("site", *map(str, ranks)), tuple(rows)),
        choices=tuple(choices),
        chosen=chosen,
    )


def _draw(drawing: Drawing, site: SiteStats, choice: int) -> None:
    points = list(enumerate(site.energy, start=1))
    dots = [(r, e, f"rank {r}: {e:.2%}") for r, e in points if r <= _EACH or r % 4 == 0]
    drawing.curve(choice, SERIES[0], "this site", points, dots)


def _at(site: SiteStats, rank: int) -> float:
    return site.energy[min(rank, len(site.energy)) - 1]


def _needed(mean: Sequence[float], left_out: float) -> str:
    # A margin for rounding: the last value is 1 but for its last digits.
    rank = next(r for r, share in enumerate(mean, start=1) if share >= 1 - left_out - 1e-12)
    return f"rank {rank} holds {1 - left_out:.1%}"
