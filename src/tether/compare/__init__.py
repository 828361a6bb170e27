"""How far adapters of one base are apart, in numbers and in words. No model is needed."""

from tether.compare.bases import check_bases
from tether.compare.measure import compare
from tether.compare.subspace import Overlap
from tether.compare.values import Comparison, Difference, SiteDifference
from tether.compare.verdict import ROUNDING

__all__ = [
    "ROUNDING",
    "Comparison",
    "Difference",
    "Overlap",
    "SiteDifference",
    "check_bases",
    "compare",
]
