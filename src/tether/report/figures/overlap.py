"""Does the change go along the directions that W uses most, or least?"""

from collections.abc import Sequence

from tether.report.figures.bars import bars
from tether.report.figures.drawing import Figure
from tether.report.values import SiteStats


def overlap(sites: Sequence[SiteStats]) -> Figure:
    """Draw the shares of |ΔW|² in the top and the bottom singular directions of W.

    Args:
        sites: whose weights were read, one at least.

    Returns:
        the figure.
    """
    read = [(site, site.base) for site in sites if site.base is not None]
    return bars(
        "overlap",
        "Overlap of ΔW with the directions of W",
        "The share of |ΔW|² along the first and the last k singular directions of W, mean of "
        "input and output side, k the rank of the adapter. “Random” is what a change without any "
        "direction of its own would have.",
        [site.path for site, _ in read],
        {
            "top k": [100 * base.top for _, base in read],
            "bottom k": [100 * base.bottom for _, base in read],
            "random": [100 * base.expected for _, base in read],
        },
        unit=" %",
    )
