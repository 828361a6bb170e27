"""Decompositions of one weight: leading and trailing singular triplets, leading QR.

Whatever dtype a weight has, its values are read as they are, so that a weight in bfloat16 and the
same weight in float32 give the same anchor. Results are float32.
"""

from tether.linalg.bottom import bottom_svd
from tether.linalg.checks import check_finite, check_rank
from tether.linalg.precision import full_precision
from tether.linalg.qr import leading_qr
from tether.linalg.spectrum import effective_rank, energy
from tether.linalg.top import CRITERIA, top_svd
from tether.linalg.triplets import Certificate, TruncatedSVD

__all__ = [
    "CRITERIA",
    "Certificate",
    "TruncatedSVD",
    "bottom_svd",
    "check_finite",
    "check_rank",
    "effective_rank",
    "energy",
    "full_precision",
    "leading_qr",
    "top_svd",
]
