"""MiLoRA: anchor in the minor singular triplets of the weight.

Source: Wang et al. 2024, arXiv:2406.09044, eqs. 4-6.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tether import linalg
from tether.methods.base import Context, register
from tether.value import Factors


@register("milora")
@dataclass(frozen=True, slots=True)
class MiLoRA:
    """Start from the `rank` smallest singular triplets, leaving the principal ones alone.

    Attributes:
        tolerance: largest backward error of the decomposition, see `linalg.TruncatedSVD`.
    """

    tolerance: float = 1e-5
    name: ClassVar[str]
    lifts: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    any_dtype: ClassVar[bool] = True

    def start(self, weight: Tensor, rank: int, context: Context) -> Factors:
        """Factor one weight.

        Args:
            weight: (out, in), any floating dtype, finite.
            rank: 1 <= rank <= min(out, in).
            context: the scaling is used.

        Returns:
            A (rank, in), B (out, rank), float32; scaling·B·A is the part of W in its `rank`
            smallest triplets. On a weight of deficient rank those are zero, and so are A and B
            (up to rounding): such a site does not train.
        """
        svd = linalg.bottom_svd(weight, rank, self.tolerance)
        root = (svd.s / context.scaling).sqrt()
        return Factors(A=root[:, None] * svd.vt, B=svd.u * root)

    def cut(self, factors: Factors, rank: int, was: float, scaling: float) -> Factors:
        """The start of a smaller or equal rank and another scaling, see `methods.Nested`.

        Args:
            factors: a start of this method.
            rank: 1 <= rank <= factors.rank.
            was: the scaling that it was made with.
            scaling: the scaling wanted.

        Returns:
            the last `rank` pairs (triplets are in descending order); without rounding if the
            scaling stays.
        """
        # In `start` the square root of 1/scaling is in both factors.
        root = math.sqrt(was / scaling)
        return Factors(
            A=(factors.A[-rank:] * root).contiguous(), B=(factors.B[:, -rank:] * root).contiguous()
        )
