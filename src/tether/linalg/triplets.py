"""Singular triplets, and how good they are."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Certificate:
    """How good a truncated SVD is, as estimated with it; P = u·diag(s)·vt, W_r the best of rank r.

    Attributes:
        route: how it was found: "lanczos" (block Lanczos on the weight), "bfloat16" (the same by
            bfloat16 products, where a processor has them and the tolerance is wide), "gram" (block
            Lanczos on WᵀW) or "dense" (all eigenvectors of WᵀW, in float64).
        product_error: estimate of |P − W_r|_F / |W_r|_F. Where the cut is unique and the truth
            below 2e-2, it was never seen below a third of the truth on weights of a real
            spectrum. It is an upper bound, not the truth, where it is 4e-7 (rounding) or all
            of a narrow gap's rounding; gaps of 1e-5 of the largest value at the cut are
            underrated where little accuracy was asked for.
        excess: estimate of |W − P|_F / |W − W_r|_F − 1. Of a weight whose best residual is
            rounding, 1e-3 of its norm and less, it is far too large.
        unique: False where the cut lies inside a cluster of singular values, s_r − s_{r+1} below
            the precision of the weight itself. Then many W_r are equally good, P is close to one
            of them, and `product_error` means nothing.
        fallback: why a faster route was given up, or "".
    """

    route: str
    product_error: float
    excess: float
    unique: bool
    fallback: str = ""


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
            |WᵀW·v − v·s²|_F = backward_error·|W|_F². Measured, before rounding.
        certificate: of `top_svd`; None of `bottom_svd`.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    backward_error: float
    certificate: Certificate | None = None


def finish(
    triplets: tuple[Tensor, Tensor, Tensor],
    wide: bool,
    backward_error: float,
    certificate: Certificate | None = None,
) -> TruncatedSVD:
    """Undo the transposition, fix the signs, round.

    Args:
        triplets: u (m, r), s (r,), vt (r, n) of a tall matrix, float64.
        wide: whether the weight is the transposed of that matrix.
        backward_error: of the triplets.
        certificate: of the triplets.

    Returns:
        the triplets of the weight, float32.
    """
    u, s, vt = triplets
    if wide:
        u, vt = vt.T, u.T
    pivot = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(pivot < 0, -1.0, 1.0).to(vt.dtype)
    return TruncatedSVD(
        u=(u * sign.T).float().contiguous(),
        s=s.float(),
        vt=(vt * sign).float().contiguous(),
        backward_error=backward_error,
        certificate=certificate,
    )
