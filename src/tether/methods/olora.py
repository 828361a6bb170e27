"""OLoRA: anchor in the leading columns of the weight's QR factorisation.

Source: Büyükakyüz 2024, arXiv:2406.01775, algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tether import linalg
from tether.methods.base import Context, register
from tether.value import Factors


@register("olora")
@dataclass(frozen=True, slots=True)
class OLoRA:
    """B orthonormal columns Q_r, A the rows R_r, where W = Q·R."""

    name: ClassVar[str]
    lifts: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    any_dtype: ClassVar[bool] = True

    def start(self, weight: Tensor, rank: int, context: Context) -> Factors:  # noqa: ARG002
        """Factor one weight.

        Args:
            weight: (out, in), any floating dtype, finite.
            rank: 1 <= rank <= min(out, in).
            context: not used; as in the paper, the scaling does not enter, so the part of W that
                is lifted is scaling·Q_r·R_r.

        Returns:
            A (rank, in) = R_r, B (out, rank) = Q_r, float32; BᵀB = 1.
        """
        q, r = linalg.leading_qr(weight, rank)
        return Factors(A=r, B=q)

    def cut(self, factors: Factors, rank: int, was: float, scaling: float) -> Factors:  # noqa: ARG002
        """The start of a smaller or equal rank and another scaling, see `methods.Nested`.

        Args:
            factors: a start of this method.
            rank: 1 <= rank <= factors.rank.
            was: not used.
            scaling: not used; it does not enter.

        Returns:
            the first `rank` columns of Q and rows of R.
        """
        return Factors(
            A=factors.A[:rank].clone(memory_format=torch.contiguous_format),
            B=factors.B[:, :rank].clone(memory_format=torch.contiguous_format),
        )
