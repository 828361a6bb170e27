"""Intruder dimensions: new leading directions that W did not have (arXiv:2410.21228)."""

from collections.abc import Sequence

from tether.report.base import INTRUDER_COSINE, INTRUDER_TOP
from tether.report.figures.bars import bars
from tether.report.figures.drawing import Figure
from tether.report.values import SiteStats


def intruders(sites: Sequence[SiteStats]) -> Figure:
    """Draw how many each site has.

    Args:
        sites: whose weights were read, one at least.

    Returns:
        the figure.
    """
    read = [(site, site.base) for site in sites if site.base is not None]
    return bars(
        "intruders",
        "Intruder dimensions",
        f"Of the first {INTRUDER_TOP} left singular vectors of W + ΔW, those whose cosine with "
        f"every left singular vector of W is below {INTRUDER_COSINE} (arXiv 2410.21228). Many of "
        "them go along with forgetting.",
        [site.path for site, _ in read],
        {"intruder dimensions": [float(base.intruders) for _, base in read]},
    )
