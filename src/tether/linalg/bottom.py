"""The smallest singular triplets, and all of them where that is the way to the largest."""

import torch
from torch import Tensor

from tether.errors import ConvergenceError
from tether.linalg.checks import check_rank
from tether.linalg.triplets import TruncatedSVD, finish


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
    vectors = gram_eigenvectors(matrix)[:, :rank]
    image = matrix @ vectors
    basis = torch.linalg.qr(image)[0]
    # Two-sided projection: where W·v is zero, qr returns arbitrary columns, and a one-sided
    # projection basisᵀ·W would pick up the large singular values through them.
    left, s, right = torch.linalg.svd(basis.T @ image)
    u, vt = basis @ left, right @ vectors.T
    # Not |Wᵀ·u − σ·v|: where σ is zero, u is no singular vector and need not be one.
    residual = matrix.T @ (u * s) - vt.T * s.square()
    error = backward_error(residual, matrix.norm() * matrix, weight.shape, tolerance)
    return finish((u, s, vt), wide, error)


def gram_eigenvectors(matrix: Tensor) -> Tensor:
    """Eigenvectors of matrixᵀ·matrix.

    Args:
        matrix: (m, n), float64.

    Returns:
        (n, n), columns, eigenvalues ascending.
    """
    # Scaled first: the squares of float64 copies of very large or small weights stay in range.
    scale = matrix.abs().max()
    scaled = matrix / scale if float(scale) > 0 else matrix
    vectors: Tensor = torch.linalg.eigh(scaled.T @ scaled)[1]
    return vectors


def backward_error(residual: Tensor, scale: Tensor, shape: torch.Size, tolerance: float) -> float:
    """The size of a residual beside that of `scale`.

    Args:
        residual: what should be zero.
        scale: what it is measured against.
        shape: of the matrix, for the message.
        tolerance: largest ratio accepted.

    Returns:
        the ratio.

    Raises:
        ConvergenceError: it is above the tolerance.
    """
    error, size = (float(torch.linalg.vector_norm(t)) for t in (residual, scale))
    # Not error / size > tolerance: the zero matrix has an exact decomposition of norm zero.
    if error > tolerance * size:
        raise ConvergenceError(
            f"singular triplets of matrix {tuple(shape)}: backward error {error:.2e} "
            f"exceeds tolerance {tolerance:.2e} of norm {size:.2e}. Raise the tolerance."
        )
    return error / size if size > 0 else 0.0
