"""How much of ΔW a smaller rank would keep."""

from collections.abc import Sequence

from tether.report.figures.drawing import Data, Drawing, Figure, rounded
from tether.report.figures.svg import SERIES
from tether.report.values import SiteStats

_LEFT_OUT = (0.1, 0.01, 0.001)  # shares of the energy whose ranks are told in words


def energy_by_rank(sites: Sequence[SiteStats], choices: Sequence[str]) -> Figure:
    """Draw each site's energy over rank, one site visible, and the mean of all.

    Args:
        sites: one at least with a change.
        choices: the name of each site.

    Returns:
        the figure.
    """
    drawing = Drawing()
    axes = drawing.axes
    longest = max(len(site.energy) for site in sites)
    moved = [site for site in sites if site.norm > 0]
    mean = [sum(_at(site, r) for site in moved) / len(moved) for r in range(1, longest + 1)]
    ranks = range(1, longest + 1)
    (line,) = axes.plot(ranks, mean, color=SERIES[0], linestyle="--", label="mean of all sites")
    drawing.mark(line, "mean of all sites")
    for choice, site in enumerate(sites):
        if site.norm == 0:
            continue
        here = range(1, len(site.energy) + 1)
        (line,) = axes.plot(here, site.energy, color=SERIES[2])
        drawing.mark(line, "this site", choice)
        places = [r for r in here if r <= 16 or r % 4 == 0]
        dots = axes.scatter(places, [site.energy[r - 1] for r in places], s=12, color=SERIES[2])
        drawing.mark(dots, [f"rank {r}: {site.energy[r - 1]:.2%}" for r in places], choice)
    axes.plot([], [], color=SERIES[2], label="this site")
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("rank kept")
    axes.set_ylabel("share of |ΔW|²")
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    name = "energy"
    rows = [(site.path, *map(rounded, site.energy)) for site in sites]
    return Figure(
        name=name,
        title="Energy of ΔW by rank",
        caption="The share of |ΔW|² in its best approximation of each rank. Where the curve is "
        "flat, a smaller rank loses little.",
        alt="Mean of all sites: " + "; ".join(_needed(mean, share) for share in _LEFT_OUT) + ".",
        svg=drawing.to_svg(name),
        data=Data(("site", *map(str, ranks)), tuple(rows)),
        choices=tuple(choices),
    )


def _at(site: SiteStats, rank: int) -> float:
    return site.energy[min(rank, len(site.energy)) - 1]


def _needed(mean: Sequence[float], left_out: float) -> str:
    # A margin for rounding: the last value is 1 but for its last digits.
    rank = next(r for r, share in enumerate(mean, start=1) if share >= 1 - left_out - 1e-12)
    return f"rank {rank} holds {1 - left_out:.1%}"
