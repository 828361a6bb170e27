"""PiSSA: anchor in the principal singular triplets of the weight.

Source: Meng, Wang, Zhang 2024, arXiv:2404.02948, eqs. 2-4.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tether import linalg
from tether.methods.base import Context, register
from tether.value import Factors


@register("pissa")
@dataclass(frozen=True, slots=True)
class PiSSA:
    """Start from the `rank` largest singular triplets.

    Attributes:
        tolerance: largest error of the decomposition, see `linalg.top_svd`.
        criterion: of which error: "product", |P − W_r|_F / |W_r|_F with P = s·B0·A0; or "excess",
            |W − P|_F / |W − W_r|_F − 1: met in about two thirds of the time, where it does not
            matter which of nearly equal singular triplets are taken.
    """

    tolerance: float = 1e-5
    criterion: str = "product"
    name: ClassVar[str]
    lifts: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    any_dtype: ClassVar[bool] = True

    def start(self, weight: Tensor, rank: int, context: Context) -> Factors:
        """Factor one weight.

        Args:
            weight: (out, in), any floating dtype, finite.
            rank: 1 <= rank <= min(out, in).
            context: the scaling is used; the certificate is recorded.

        Returns:
            A (rank, in), B (out, rank), float32; scaling·B·A is the best
            approximation of W of that rank, up to the certificate. Directions
            whose singular value is zero start at zero in both factors and are never trained.
        """
        svd = linalg.top_svd(weight, rank, self.tolerance, criterion=self.criterion)
        if svd.certificate is not None:
            context.record(svd.certificate)
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
            the first `rank` pairs; without rounding if the scaling stays.
        """
        # In `start` the square root of 1/scaling is in both factors.
        root = math.sqrt(was / scaling)
        return Factors(
            A=(factors.A[:rank] * root).contiguous(), B=(factors.B[:, :rank] * root).contiguous()
        )
