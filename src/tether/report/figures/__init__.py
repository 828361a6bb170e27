"""One file per picture: values -> Figure. Only these files import matplotlib.

A new picture is a function in a file of its own that draws on a `Drawing` and returns its Figure.
"""

from tether.report.figures.bars import bars
from tether.report.figures.curves import curves
from tether.report.figures.drawing import Data, Figure, missing_library
from tether.report.figures.energies import energies
from tether.report.figures.energy import energy_by_rank
from tether.report.figures.heatmap import Cell, heatmap, site_heatmap
from tether.report.figures.intruders import intruders
from tether.report.figures.overlap import overlap
from tether.report.figures.spectra import spectra

__all__ = [
    "Cell",
    "Data",
    "Figure",
    "bars",
    "curves",
    "energies",
    "energy_by_rank",
    "heatmap",
    "intruders",
    "missing_library",
    "overlap",
    "site_heatmap",
    "spectra",
]
