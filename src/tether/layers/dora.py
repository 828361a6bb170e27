"""DoRA: the ratio of trained to present row lengths.

Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3 (the lengths of W + ΔW count as
constants in the gradient).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tether.layers.site import SiteLayer


def stretch(layer: "SiteLayer", weight: Tensor) -> Tensor:
    """m/|W + ΔW| − 1 for every row of the matrix view, exactly 0 at the start.

    |w + δ|² = |w|² + 2·w·δ + |δ|² with the row lengths |w| at hand as the magnitude's anchor m0:
    no dense W + ΔW is formed, and where ΔW = 0 the root of m0² is m0.

    Args:
        layer: a site with DoRA.
        weight: of the base module, as stored; read only.

    Returns:
        (out,), in the magnitude's dtype; gradients reach m only.
    """
    length = lengths(layer, layer.layout.matrix(weight.detach()))
    safe = torch.where(length > 0, length, torch.ones_like(length))
    excess = (layer.m0 - length + layer.dm) / safe
    # A row of zeros has no direction to stretch.
    return torch.where(length > 0, excess, torch.zeros_like(excess))


@torch.no_grad()
def lengths(layer: "SiteLayer", matrix: Tensor) -> Tensor:
    """|W + ΔW| of every row.

    Args:
        layer: a site with DoRA.
        matrix: the weight's (out, in) view.

    Returns:
        (out,), in the magnitude's dtype.
    """
    dtype = layer.m0.dtype
    left, right = layer.plain(dtype)
    left = layer.scaling * left
    # Wᵀ's own precision for the product with W: no wide copy of a half-precision weight.
    cross = (matrix @ right.T.to(matrix.dtype)).to(dtype)
    # In units of |w|: its square may leave the range of float32.
    live = layer.m0 > 0
    unit = torch.where(live, layer.m0, torch.ones_like(layer.m0))
    left, cross = left / unit[:, None], cross / unit[:, None]
    square = live.to(dtype) + (left * (2 * cross + left @ (right @ right.T))).sum(dim=1)
    return unit * square.clamp_min(0).sqrt()
