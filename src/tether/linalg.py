"""Decompositions of one weight: leading and trailing singular triplets, leading QR.

Everything is computed in float64 and returned in float32, so that a weight in bfloat16 and
the same weight in float32 give the same anchor, and so that small singular values survive.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.errors import ConvergenceError, NonFiniteError, RankTooLargeError


@dataclass(frozen=True, slots=True, eq=False)
class TruncatedSVD:
    """Some singular triplets of a matrix (m, n), and how good they are.

    Attributes:
        u: left singular vectors (m, r), float32, orthonormal columns.
        s: singular values (r,), float32, descending.
        vt: right singular vectors (r, n), float32, orthonormal rows; in each row the entry of
            largest magnitude is positive, which fixes the sign of the pair.
        backward_error: the triplets are exact for a matrix W + E with
            |E|_F <= backward_error·|s|_2; of `bottom_svd`, W·v = u·s and
            |WᵀW·v − v·s²|_F = backward_error·|W|_F². Measured in float64, before rounding.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    backward_error: float


@dataclass(frozen=True, slots=True)
class Certificate:
    """How good a truncated SVD is, as estimated with it.

    Attributes:
        route: "lanczos", "gram" or "dense".
        product_error: estimated |U·S·Vt − W_r|_F / |W_r|_F.
        excess: estimated |W − U·S·Vt|_F / |W − W_r|_F − 1.
        unique: False if the cut lies inside a cluster of singular values.
        fallback: why a faster route was given up, or "".
    """

    route: str
    product_error: float
    excess: float
    unique: bool
    fallback: str = ""


def check_rank(weight: Tensor, rank: int) -> None:
    """Raise RankTooLargeError unless 1 <= rank <= min(weight.shape).

    Args:
        weight: a matrix (m, n).
        rank: how many directions are asked of it.

    Raises:
        RankTooLargeError: naming both values.
    """
    smaller = min(weight.shape)
    if not 1 <= rank <= smaller:
        shape = tuple(weight.shape)
        raise RankTooLargeError(
            f"rank {rank} is not between 1 and min(shape) {smaller} of matrix {shape}."
        )


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise NonFiniteError if `tensor` holds NaN or Inf.

    Args:
        tensor: any shape, any floating dtype.
        name: what to call it in the message.

    Raises:
        NonFiniteError: with the number of bad values and the place of the first.
    """
    # One NaN or Inf makes the sum so. A sum may also overflow: then every value is looked at.
    if math.isfinite(float(tensor.detach().sum())):
        return
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    first = tuple(int(i) for i in bad[0])
    value = float(tensor[first])
    raise NonFiniteError(
        f"{name}: {len(bad)} of {tensor.numel()} values are NaN or Inf, the first {value} at "
        f"{first}. Repair or reload these weights."
    )


@torch.no_grad()
def top_svd(weight: Tensor, rank: int, tolerance: float = 1e-5) -> TruncatedSVD:
    """The `rank` largest singular triplets.

    Gram matrix of the smaller side in float64, its eigenvectors, then Rayleigh-Ritz on the
    weight itself, which recovers what squaring lost.

    Args:
        weight: (m, n), any floating dtype, finite; read, never written.
        rank: 1 <= rank <= min(m, n).
        tolerance: largest backward error accepted, relative to |s|_2.

    Returns:
        TruncatedSVD; |W - u·diag(s)·vt|_2 = sigma_{rank+1} up to the backward error.

    Raises:
        ConvergenceError: the backward error exceeds `tolerance`.
    """
    check_rank(weight, rank)
    wide = weight.shape[0] < weight.shape[1]
    matrix = (weight.T if wide else weight).double()
    vectors = _gram_eigenvectors(matrix)[:, -rank:]
    basis = torch.linalg.qr(matrix @ vectors)[0]
    left, s, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    u = basis @ left
    residual = torch.cat([matrix @ right.T - u * s, (u.T @ matrix - s[:, None] * right).T])
    error = _backward_error(residual, s, matrix.shape, tolerance)
    return _finish((u, s, right), wide, error)


@torch.no_grad()
def bottom_svd(weight: Tensor, rank: int, tolerance: float = 1e-5) -> TruncatedSVD:
    """The `rank` smallest of the min(m, n) singular triplets.

    A float32 SVD loses them: its absolute error is about 1e-7 of the largest singular value.
    The float64 Gram matrix of the smaller side keeps them to 1e-8 of it, or better.

    Args:
        weight: (m, n), any floating dtype, finite; read, never written.
        rank: 1 <= rank <= min(m, n).
        tolerance: largest backward error accepted.

    Returns:
        TruncatedSVD; a weight of deficient rank gives singular values of zero (up to rounding),
        and its left vectors there are any orthonormal completion.

    Raises:
        ConvergenceError: the backward error exceeds `tolerance`.
    """
    check_rank(weight, rank)
    wide = weight.shape[0] < weight.shape[1]
    matrix = (weight.T if wide else weight).double()
    vectors = _gram_eigenvectors(matrix)[:, :rank]
    image = matrix @ vectors
    basis = torch.linalg.qr(image)[0]
    # Two-sided projection: where W·v is zero, qr returns arbitrary columns, and a one-sided
    # projection basisᵀ·W would pick up the large singular values through them.
    left, s, right = torch.linalg.svd(basis.T @ image)
    u, vt = basis @ left, right @ vectors.T
    # Not |Wᵀ·u − σ·v|: where σ is zero, u is no singular vector and need not be one.
    residual = matrix.T @ (u * s) - vt.T * s.square()
    error = _backward_error(residual, matrix.norm() * matrix, matrix.shape, tolerance)
    return _finish((u, s, vt), wide, error)


@torch.no_grad()
def leading_qr(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` columns of Q and rows of R of the Householder QR of `weight`.

    The first r reflectors depend on the first r columns only, so Q is the QR of those columns
    and R = Qᵀ·W: the full factorisation's own values, signs included, at r/n of its price.

    Args:
        weight: (m, n), any floating dtype, finite; read, never written.
        rank: 1 <= rank <= min(m, n).

    Returns:
        Q (m, rank) with orthonormal columns and R (rank, n), both float32.
    """
    check_rank(weight, rank)
    matrix = weight.double()
    q = torch.linalg.qr(matrix[:, :rank])[0]
    return q.float().contiguous(), (q.T @ matrix).float().contiguous()


def _gram_eigenvectors(matrix: Tensor) -> Tensor:
    """Eigenvectors of matrixᵀ·matrix (n, n) as columns, eigenvalues ascending."""
    # Scaled first: the squares of float64 copies of very large or small weights stay in range.
    scale = matrix.abs().max()
    scaled = matrix / scale if float(scale) > 0 else matrix
    vectors: Tensor = torch.linalg.eigh(scaled.T @ scaled)[1]
    return vectors


def _finish(
    triplets: tuple[Tensor, Tensor, Tensor], wide: bool, backward_error: float
) -> TruncatedSVD:
    """Undo the transposition, fix the signs, round."""
    u, s, vt = triplets
    if wide:
        u, vt = vt.T, u.T
    pivot = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(pivot < 0, -1.0, 1.0)
    return TruncatedSVD(
        u=(u * sign.T).float().contiguous(),
        s=s.float(),
        vt=(vt * sign).float().contiguous(),
        backward_error=backward_error,
    )


def _backward_error(residual: Tensor, scale: Tensor, shape: torch.Size, tolerance: float) -> float:
    """The size of a residual beside that of `scale`; raise if it is above the tolerance."""
    error, size = (float(torch.linalg.vector_norm(t)) for t in (residual, scale))
    # Not error / size > tolerance: the zero matrix has an exact decomposition of norm zero.
    if error > tolerance * size:
        raise ConvergenceError(
            f"singular triplets of matrix {tuple(shape)}: backward error {error:.2e} "
            f"exceeds tolerance {tolerance:.2e} of norm {size:.2e}. Raise the tolerance."
        )
    return error / size if size > 0 else 0.0
