"""The directions of a change ΔW, and how far two changes share them.

Source: Hu et al. 2021, arXiv:2106.09685, eq. 4: φ = |Uaᵀ·Ub|²_F / k, the mean squared cosine of the
principal angles (Björck and Golub 1973).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tether import algebra
from tether.linalg import check_finite
from tether.value import LayerAdapter

# Of the largest singular value; below it, factors in float32 do not tell the direction.
SMALLEST = 1e-5


@dataclass(frozen=True, slots=True)
class Overlap:
    """How far two changes of one weight go in the same directions.

    Attributes:
        k: how many leading singular directions of each are compared: all of the change that has
            fewer.
        rows: φ of the right ones, which span the row spaces (the inputs): 1 where the spaces are
            equal, 0 where they are orthogonal.
        columns: the same of the left ones, the column spaces (the outputs).
        chance: the mean of the two for random directions, k·(1/in + 1/out)/2.
    """

    k: int
    rows: float
    columns: float
    chance: float

    @property
    def mean(self) -> float:
        """The mean of rows and columns."""
        return (self.rows + self.columns) / 2


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """The singular value decomposition of a change, ΔW = left·diag(values)·rightᵀ, in float64.

    Attributes:
        left: (out, p) orthonormal columns.
        values: (p,) descending.
        right: (in, p) orthonormal columns.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def norm(self) -> float:
        """|ΔW|_F."""
        return float(self.values.norm())

    @property
    def rank(self) -> int:
        """How many values are above 1e-5 of the largest; 0 for no change."""
        return int((self.values > SMALLEST * self.values[0]).sum())


def directions(layer: LayerAdapter) -> Directions:
    """Decompose one site's ΔW (with DoRA: its low-rank part) through its factors.

    Args:
        layer: anchored or plain.

    Returns:
        its directions; p is at most the rank of the plain form.

    Raises:
        NonFiniteError: a factor holds NaN or Inf.
    """
    factors = algebra.factors(layer)
    check_finite(factors.A, "A")
    check_finite(factors.B, "B")
    left, upper = torch.linalg.qr(factors.B)
    right, lower = torch.linalg.qr(factors.A.T)
    u, values, vt = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return Directions(left @ u, values, right @ vt.T)


def overlap(a: Directions, b: Directions) -> Overlap | None:
    """How far two changes share their leading directions.

    Args:
        a: of one change.
        b: of the other, of the same shape.

    Returns:
        the overlap; None where one of them is zero.
    """
    k = min(a.rank, b.rank)
    if k == 0:
        return None
    rows, columns = (
        float((x[:, :k].T @ y[:, :k]).square().sum()) / k
        for x, y in ((a.right, b.right), (a.left, b.left))
    )
    chance = k * (1 / len(a.right) + 1 / len(a.left)) / 2
    # Rounding may leave it just above.
    return Overlap(k, min(rows, 1.0), min(columns, 1.0), chance)


def least_error(a: Directions, rank: int) -> float:
    """The smallest relative error that any change of a smaller rank leaves (Eckart-Young).

    Args:
        a: of the change.
        rank: of what stands for it.

    Returns:
        |σ[rank:]| / |σ|; 0 for no change.
    """
    return float(a.values[rank:].norm()) / a.norm if a.norm > 0 else 0.0
