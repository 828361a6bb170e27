"""How far Ritz triplets of a block Lanczos process are from the true ones.

Ritz pairs (λ_i, v_i) of WᵀW with residuals ρ_i err, to first order, by (λ_i − H)⁻¹ρ_i, where H is
the part of WᵀW that the process has not seen. H is taken to go on as the last block ended: with
diagonal `center` and coupling `spread`, its resolvent is that of a semicircle of radius 2·spread
around `center` (the terminator of the recursion method: Haydock, Heine, Kelly 1972, J. Phys. C 5,
2845). What is estimated is the error after the half step of Rayleigh-Ritz on W that follows, which
multiplies the part at x of every error by x/λ. Measured against float64 truth on weights of a real
spectrum, from errors of 1e-2 down to rounding. Replacing the semicircle by its center gives a
third of the truth where convergence begins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 2.0**-24  # rounding in float32
# Singular values closer than this, relative to the largest, are one cluster: the rounding of a
# float32 weight moves them as much.
CLUSTER = 2.0**-20
# The rounding of the float32 products mixes two triplets of a gap g by this times eps·s1/g:
# 0.004 to 0.012 was measured on weights of 2048 and 4096. It would be 1 without float64 for the
# small matrices.
_MIXING = 0.01
# What rounding leaves in any case, of the basis and of the result: 2e-7 to 5e-7 was measured.
_ROUNDING = 6 * EPS


@dataclass(frozen=True, slots=True)
class Unseen:
    """What is known of the part of WᵀW that the process has not seen.

    Attributes:
        center: mean of the last diagonal block's diagonal.
        spread: root mean square of the coupling to the next block.
    """

    center: float
    spread: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of the leading `rank` triplets.

    Attributes:
        product: of the relative error of their product.
        excess: of the relative excess of the residual.
        unique: whether the cut separates singular values.
    """

    product: float
    excess: float
    unique: bool


def estimate(
    values: Tensor,
    couplings: Tensor,
    rank: int,
    unseen: Unseen,
    norm: float,
    precision: torch.dtype = torch.float32,
) -> Estimate:
    """Estimate the error of Ritz triplets after a half step on W.

    Args:
        values: λ (l,), descending, float64: squares of singular values; l >= rank, those beyond
            the rank are guards.
        couplings: ρᵀρ (l, l), of the residuals WᵀW·v − λ·v.
        rank: r, how many triplets are kept.
        unseen: of the process.
        norm: |W|_F.
        precision: of the products of the half step.

    Returns:
        the estimate.
    """
    kept = values[:rank].clamp(min=0)
    energy = float(kept.sum())
    if energy == 0:
        return Estimate(0.0, 0.0, unique=True)
    first, second = _resolvent(kept, unseen)
    # A residual of the size of rounding, eps·s1·s, is none; else a cluster never converges.
    noise = 8 * EPS * (values[0] * values.clamp(min=0)).sqrt()
    couplings = couplings.masked_fill(couplings.abs() <= noise[:, None] * noise, 0)
    squares = couplings.diagonal()[:rank]
    inverse = 1 / kept.clamp(min=EPS**2 * energy)
    # The mean of the left and the right vector's squared angle: the half step has multiplied the
    # one by x/λ, the other by (x/λ)². A triplet that is quite wrong errs by no more than itself.
    angles = (second - 1.5 * inverse * first + 0.5 * inverse.square()).clamp(min=0)
    outside = torch.minimum(squares * angles, torch.ones_like(kept))
    mixed, unique = _mixing(values, couplings[:rank], rank, first, torch.finfo(precision).eps / 2)
    product = (2 * float((kept * (outside + mixed)).sum()) / energy) ** 0.5
    # The norm is known to 1e-7: what is left of it may be nothing.
    tail = norm**2 - energy if norm**2 - energy > 16 * EPS * norm**2 else (EPS * norm) ** 2
    missed = float(torch.minimum(squares * (first - inverse).clamp(min=0), kept).sum())
    rounded = _ROUNDING**2 * energy
    return Estimate(min(product + _ROUNDING, 2**0.5), (missed + rounded) / (2 * tail), unique)


def _resolvent(values: Tensor, unseen: Unseen) -> tuple[Tensor, Tensor]:
    """The resolvent of the unseen part at λ, and its negated derivative; huge inside of it."""
    distance = values - unseen.center
    under = distance.square() - 4 * unseen.spread**2
    outside = (distance > 0) & (under > 0)
    root = torch.where(outside, under, torch.ones_like(under)).sqrt()
    # Not (d − root)/(2·spread²), which cancels where the spread is small.
    first = 2 / (distance + root)
    huge = torch.full_like(values, 1e300)
    return torch.where(outside, first, huge), torch.where(outside, first / root, huge)


def _mixing(
    values: Tensor, couplings: Tensor, rank: int, resolvent: Tensor, eps: float
) -> tuple[Tensor, bool]:
    """Squared angles by which kept triplets are mixed with guards, and whether the cut is one.

    They are orthogonal within the basis; what mixes them is the way through the unseen part, and
    the rounding of the products.
    """
    if len(values) == rank:
        return torch.zeros_like(values), True
    roots = values.clamp(min=0).sqrt()
    unique = bool(roots[rank - 1] - roots[rank] > CLUSTER * roots[0])
    gaps = (values[:rank, None] - values[None, rank:]).clamp(min=1e-300)
    through = (couplings[:, rank:] / gaps) * resolvent[:, None]
    apart = (roots[:rank, None] - roots[None, rank:]).clamp(min=1e-300)
    rounding = _MIXING * eps * roots[0] / apart
    angles = (through.square() + rounding.square()).clamp(max=1)
    if not unique:
        angles = angles.masked_fill(apart <= CLUSTER * roots[0], 0)
    return angles.sum(dim=1).clamp(max=1), unique
