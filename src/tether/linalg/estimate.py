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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
EPS = 2.0**-24  # rounding in float32
# Singular values closer than this, relative to the largest, are one cluster: the rounding of a
# float32 weight moves them as much.
CLUSTER = 2.0**-20
# The rounding of the products of a half step mixes two triplets, the larger s, a gap g apart, by
# _MIXING·eps·(s + _OUTLIER·s1)/(√n·g). 1.5 to 3 of s and 0.1 to 0.14 of s1 were measured on random,
# flat and steep spectra, n 300 to 1200, s down to s1/1000.
_MIXING = 2.5
_OUTLIER = 0.05
_SMALL = 1e-5  # triplets that matter to no product: singular values below this, over s1
# Residuals of the vectors of a converged float32 process, over eps·s1·s: 2 to 5.3 was measured, on
# the same. They do not shrink with further steps.
_FLOOR = 4.0
# What rounding leaves in any case, of the basis and of the result: 2e-7 to 5e-7 was measured.
ROUNDING = 6 * EPS
_HUGE = 1e150


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
        angle: root mean square of the vectors' angles, all alike, where `product` gives the small
            ones little weight. The estimate is of first order: large angles it underrates.
    """

    product: float
    excess: float
    unique: bool
    angle: float


@np.errstate(over="ignore")  # infinite, and so as wrong as can be
def estimate(
    values: Tensor,
    couplings: Tensor,
    rank: int,
    unseen: Unseen,
    norm: float,
    size: int,
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
        size: n, the length of the vectors of WᵀW.
        precision: of the products of the half step.

    Returns:
        the estimate.
    """
    # NumPy: on arrays of some dozens a call of torch costs ten times as much, and there are fifty.
    all_values, paired = values.numpy(), couplings.numpy()
    kept = all_values[:rank].clip(min=0)
    energy = float(kept.sum())
    if energy == 0:
        return Estimate(0.0, 0.0, unique=True, angle=0.0)
    first, second = _resolvent(kept, unseen)
    roots = np.sqrt(all_values.clip(min=0))
    unique = bool(len(roots) == rank or roots[rank - 1] - roots[rank] > CLUSTER * roots[0])
    squares = paired.diagonal()[:rank]
    if not unique:
        # Within the cluster of the cut a residual of the size of rounding is none: any of its
        # vectors will do. Else a flat spectrum never converges.
        alike = roots[:rank] - roots[rank] <= CLUSTER * roots[0]
        noise = (2 * _FLOOR * EPS) ** 2 * all_values[0] * kept
        squares = np.where(alike & (squares <= noise), 0.0, squares)
    inverse = 1 / kept.clip(min=EPS**2 * energy)
    # The mean of the left and the right vector's squared angle: the half step has multiplied the
    # one by x/λ, the other by (x/λ)². A triplet that is quite wrong errs by no more than itself.
    angles = (second - 1.5 * inverse * first + 0.5 * inverse**2).clip(min=0)
    outside = (squares * angles).clip(max=1)
    rounding = _MIXING * torch.finfo(precision).eps / 2 / size**0.5
    wrong = outside + _mixing(all_values, paired[:rank], rank, first, rounding)
    product = float((2 * (kept * wrong).sum() / energy) ** 0.5)
    angle = float(wrong[roots[:rank] > _SMALL * roots[0]].mean() ** 0.5)
    # The norm is known to 1e-7: what is left of it may be nothing.
    tail = norm**2 - energy if norm**2 - energy > 16 * EPS * norm**2 else (EPS * norm) ** 2
    # A Ritz value errs by no more than its residual, however close the unseen part is.
    most = np.minimum(np.sqrt(squares), kept)
    missed = float(np.minimum(squares * (first - inverse).clip(min=0), most).sum())
    rounded = ROUNDING**2 * energy
    excess = (missed + rounded) / (2 * tail)
    return Estimate(min(product + ROUNDING, 2**0.5), excess, unique, angle)


def rounded(values: Tensor, couplings: Tensor) -> tuple[Tensor, Tensor]:
    """What the arithmetic of a float32 process leaves of what it believes.

    Args:
        values: λ (l,), descending, float64.
        couplings: ρᵀρ (l, l).

    Returns:
        values, zero where float32 cannot tell them from it; couplings with the residuals that
        rounding leaves on the diagonal.
    """
    values = values.masked_fill(values <= _FLOOR * EPS * values[0], 0)
    return values, couplings + torch.diag((_FLOOR * EPS) ** 2 * values[0] * values)


def _resolvent(values: Array, unseen: Unseen) -> tuple[Array, Array]:
    """The resolvent of the unseen part at λ, and its negated derivative; huge inside of it."""
    distance = values - unseen.center
    under = distance**2 - 4 * unseen.spread**2
    outside = (distance > 0) & (under > 0)
    root = np.sqrt(np.where(outside, under, 1.0))
    # Not (d − root)/(2·spread²), which cancels where the spread is small.
    first = 2 / np.where(outside, distance + root, 1.0)
    # The derivative the larger of the two, as everywhere near the edge: of two that are equal the
    # difference, which the angles are made of, is negative for λ < 1.5.
    return np.where(outside, first, _HUGE), np.where(outside, first / root, _HUGE**2)


def _mixing(values: Array, couplings: Array, rank: int, resolvent: Array, rounding: float) -> Array:
    """Squared angles by which kept triplets are mixed with guards, but for those of a cluster.

    They are orthogonal within the basis; what mixes them is the way through the unseen part, and
    the rounding of the products.
    """
    roots = np.sqrt(values.clip(min=0))
    gaps = (values[:rank, None] - values[None, rank:]).clip(min=1e-300)
    apart = (roots[:rank, None] - roots[None, rank:]).clip(min=1e-300)
    moved = rounding * (roots[:rank, None] + _OUTLIER * roots[0])
    through = (couplings[:, rank:] / gaps) * resolvent[:, None]
    angles = (through**2 + (moved / apart) ** 2).clip(max=1)
    angles = np.where(apart <= CLUSTER * roots[0], 0.0, angles)
    mixed: Array = angles.sum(axis=1).clip(max=1)
    return mixed
