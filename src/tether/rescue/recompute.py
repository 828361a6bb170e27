"""A start that the base model alone determines, computed again; and how sure that is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tether import methods
from tether.checkpoint import Checkpoint
from tether.errors import RescueError, TetherError
from tether.fingerprints import fingerprint_tensor
from tether.linalg import Certificate
from tether.methods import Context
from tether.rescue import product
from tether.rescue.sources import Found, read_weight
from tether.value import Factors, LayerAdapter

_FLOAT32 = 2.0**-24
# Float32 decompositions of real weights differ from the exact one by up to twice the first-order
# estimate of the perturbation that one rounding of every weight causes.
_SAFETY = 2.0
_TOLERANCE = 1e-6  # of our own decomposition: below that uncertainty


@dataclass(frozen=True, slots=True)
class Recomputed:
    """The base model, by a start that it alone determines.

    Attributes:
        base: the model that training started from, the same numbers.
        method: "pissa" or "olora".
    """

    base: Checkpoint
    method: str

    def find(self, site: str, layer: LayerAdapter) -> Found:
        """The start, computed again, turned to lie nearest to the trained factors.

        Args:
            site: its path.
            layer: its trained factors.

        Returns:
            what was found; `error` estimates by how much the start that was trained from, in
            float32 (https://www.netlib.org/lapack/lug/node97.html), differs from this one.

        Raises:
            RescueError: the weight does not determine the start.
        """
        weight = read_weight(self.base, site, layer.layout)
        matrix = layer.layout.matrix(weight).float()
        find = _pissa if self.method == "pissa" else _olora
        try:
            start, gap, error = find(matrix, layer)
        except TetherError as problem:
            raise type(problem)(f"site {site!r}: {problem}") from problem
        part = product.of_factors(start, layer.scaling)
        anchor = product.nearest(part, layer.trainable, layer.scaling)
        print_ = fingerprint_tensor(weight)
        return Found(anchor, part, gap=gap, error=error, fingerprint=print_)


def _pissa(matrix: Tensor, layer: LayerAdapter) -> tuple[Factors, float, float]:
    """Start, gap, error: turning triplet r into r + 1 costs little where σ_r ≈ σ_{r+1}."""
    rank, smaller = layer.rank, min(matrix.shape)
    certificates: list[Certificate] = []
    context = Context("", layer.scaling, torch.Generator(), certificates.append)
    method = methods.get("pissa", {"tolerance": _TOLERANCE})
    more = method.start(matrix, min(rank + 1, smaller), context)
    s = layer.scaling * more.B.double().square().sum(0)
    # A last value of zero leaves nothing to turn.
    unsure = rank < smaller and float(s[rank - 1]) > 0
    gap = 1 - float(s[rank] / s[rank - 1]) if unsure else 1.0
    start = Factors(more.A[:rank], more.B[:, :rank])
    # First order in one rounding: |E|·(√(2r) + 2·σ_r/(σ_r − σ_{r+1})), at most the triplet itself.
    turned = min(2 * _FLOAT32 * float(s[0]) / max(gap, 1e-300), 2 * float(s[rank - 1]))
    error = _FLOAT32 * float(s[0]) * math.sqrt(2 * rank) + turned
    ours = certificates[-1].product_error * float(s.norm())
    return start, gap, _SAFETY * (error + ours)


def _olora(matrix: Tensor, layer: LayerAdapter) -> tuple[Factors, float, float]:
    """Start, gap, error: the span of the leading columns is as sure as they are independent."""
    context = Context("", layer.scaling, torch.Generator())
    start = methods.get("olora").start(matrix, layer.rank, context)
    leading = torch.linalg.svdvals(start.A[:, : layer.rank].double())
    size = float(torch.linalg.matrix_norm(start.A.double()))
    gap = float(leading[-1] / leading[0]) if float(leading[0]) > 0 else 1.0
    if gap < 1e-7 and size > 0:
        raise RescueError(
            f"the first {layer.rank} columns of its weight {tuple(matrix.shape)} are linearly "
            "dependent, so they do not determine an OLoRA start. Give the adapter saved before "
            "training (anchor), or the residual model (residual)."
        )
    rest = math.sqrt(max(float(matrix.double().square().sum()) - size**2, 0.0))
    spread = float(torch.linalg.vector_norm(leading)) / max(float(leading[-1]), 1e-300)
    error = layer.scaling * _FLOAT32 * (size + spread * rest) if size > 0 else 0.0
    return start, gap, _SAFETY * error
