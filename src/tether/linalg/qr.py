"""The leading columns of a QR factorisation."""

import torch
from torch import Tensor

from tether.linalg.checks import check_rank
from tether.linalg.tall import panels


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
    q = torch.linalg.qr(weight[:, :rank].double())[0].float().contiguous()
    r = torch.zeros(rank, weight.shape[1], device=weight.device)
    start = 0
    for panel in panels(weight):  # of rows: a weight in half precision is never copied whole
        r.addmm_(q[start : start + len(panel)].T, panel)
        start += len(panel)
    return q, r
