"""The part of a weight that an anchor took, P = s·B0·A0, and the factors of it nearest to B, A.

B0 and A0 are determined by P only up to an invertible (r, r) matrix G: (B0·G)(G⁻¹·A0) is the same
product. ΔW = s·(B·dA + dB·A0) holds for every G, but for most of them dA and dB are as large as
the factors, and the two terms cancel. The G of `nearest` is the one that puts (B0, A0) closest to
the trained (B, A); then dA and dB are no larger than training moved the factors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.errors import ConvergenceError
from tether.value import Factors

_BLOCK = 1 << 20  # values of a weight in float64 at a time: 8 MiB
_EXTRA = 8  # directions searched besides the rank
_ROUNDS = 12
_STEPS = 60


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A matrix of low rank, u·diag(s)·vt, in float64.

    Attributes:
        u: (out, k), orthonormal columns.
        s: (k,), descending, positive; k may be 0.
        vt: (k, in), orthonormal rows.
        left_over: |P − u·diag(s)·vt|_F of the matrix it was cut from.
        noise: what rounding may have left over, in the same norm.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    left_over: float = 0.0
    noise: float = 0.0

    @property
    def norm(self) -> float:
        """|u·diag(s)·vt|_F."""
        return float(torch.linalg.vector_norm(self.s))


def of_factors(factors: Factors, scaling: float) -> Product:
    """scaling·B·A as a product.

    Args:
        factors: B (out, r), A (r, in).
        scaling: s.

    Returns:
        the product; directions below 1e-12 of the largest are left out as rounding.
    """
    left, upper = torch.linalg.qr(factors.B.double())
    right, lower = torch.linalg.qr(factors.A.double().T)
    u, s, vt = torch.linalg.svd(scaling * (upper @ lower.T))
    keep = int((s > 1e-12 * s[0]).sum())
    return Product(left @ u[:, :keep], s[:keep], vt[:keep] @ right.T)


@torch.no_grad()
def of_difference(base: Tensor, residual: Tensor, trained: Factors) -> Product:
    """The difference of two weights, cut to the rank of the trained factors.

    Subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4) that
    starts from the trained A, whose rows lie near those of A0, and a few random directions. The
    difference is formed block by block, in float64. Directions no larger than those of random
    rounding with the same left-over are left out too: they say nothing about the anchor.

    Args:
        base: (out, in), any floating dtype and strides; read, never written.
        residual: likewise.
        trained: the trained factors; they only help to find the directions.

    Returns:
        the product. `noise` is u·|residual|_F with u the unit roundoff of the coarser of the two
        dtypes, twice: once for each rounding of a residual to that dtype.
    """
    rows, columns = base.shape
    wanted = min(trained.rank + _EXTRA, rows, columns)
    random = torch.Generator().manual_seed(0)
    fill = torch.randn(columns, wanted, generator=random, dtype=torch.float64)
    start = torch.cat([trained.A.double().T, fill], dim=1)[:, : max(wanted, trained.rank)]
    vectors = torch.linalg.qr(start)[0][:, :wanted]
    u, s, vt = fill[:0], fill[0, :0], fill[:0]
    for _ in range(_ROUNDS):
        image = torch.cat([block @ vectors for _, block in _blocks(base, residual)])
        if len(s) and _converged(image, u, s, trained.rank):
            break
        left = torch.linalg.qr(image)[0]
        folded = torch.zeros(left.shape[1], columns, dtype=torch.float64)
        for start_row, block in _blocks(base, residual):
            folded += left[start_row : start_row + len(block)].T @ block
        inner, s, vt = torch.linalg.svd(folded, full_matrices=False)
        u, vectors = left @ inner, vt.T
    return _cut(base, residual, (u, s, vt), trained.rank)


def _converged(image: Tensor, u: Tensor, s: Tensor, rank: int) -> bool:
    """Whether P·v = u·s for the leading triplets, against the largest."""
    error = image[:, :rank] - u[:, :rank] * s[:rank]
    return float(torch.linalg.vector_norm(error)) <= 1e-12 * float(s[0])


def _cut(
    base: Tensor, residual: Tensor, triplets: tuple[Tensor, Tensor, Tensor], rank: int
) -> Product:
    u, s, vt = triplets[0][:, :rank], triplets[1][:rank], triplets[2][:rank]
    left = size = 0.0
    for start, block in _blocks(base, residual):
        part = u[start : start + len(block)] * s
        left += float((block - part @ vt).square().sum())
        size += float(residual[start : start + len(block)].float().square().sum())
    keep = len(s)
    while keep and float(s[keep - 1]) <= _edge(left, keep, base.shape):
        keep -= 1
        left += float(s[keep]) ** 2
    unit = max(torch.finfo(t.dtype).eps for t in (base, residual)) / 2
    noise = 2 * unit * math.sqrt(size)
    return Product(u[:, :keep], s[:keep], vt[:keep], math.sqrt(left), noise)


def _edge(square: float, rank: int, shape: torch.Size) -> float:
    """Twice the largest singular value of white noise (Marchenko-Pastur's edge).

    `square` is the squared norm of the noise outside of `rank` directions. Twice, for rounding is
    not quite white; a direction below this is not told from noise.
    """
    rows, columns = shape
    outside = max((rows - rank) * (columns - rank), 1)
    return 2 * math.sqrt(square / outside) * (math.sqrt(rows) + math.sqrt(columns))


def _blocks(base: Tensor, residual: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The difference in float64, some rows at a time, with the number of the first."""
    rows = max(1, _BLOCK // base.shape[1])
    for start in range(0, base.shape[0], rows):
        chosen = slice(start, start + rows)
        yield start, base[chosen].double() - residual[chosen].double()


@torch.no_grad()
def nearest(product: Product, trained: Factors, scaling: float) -> Factors:
    """B0 and A0 with scaling·B0·A0 = product, as near to the trained factors as they can be.

    B0 = u·C and A0 = D·vt with C·D = M = diag(s)/scaling, all inside the anchor's own row and
    column spaces. From C = uᵀ·B, D = A·v on, each step is the smallest (c, d) that solves
    C·d + c·D = M − C·D: d = Cᵀ·Λ and c = Λ·Dᵀ, where C·Cᵀ·Λ + Λ·Dᵀ·D = M − C·D. It converges
    quadratically, to the nearest point up to the second order of the distance.

    Args:
        product: of rank k <= r.
        trained: A (r, in), B (out, r).
        scaling: s.

    Returns:
        A0 (r, in), B0 (out, r), float64.

    Raises:
        ConvergenceError: the trained factors lie too far away to tell which is nearest.
    """
    wanted = torch.diag(product.s / scaling)
    c, d = product.u.T @ trained.B.double(), trained.A.double() @ product.vt.T
    size = float(torch.linalg.matrix_norm(wanted)) if len(product.s) else 0.0
    missing, before = wanted - c @ d, math.inf
    for _ in range(_STEPS):
        error = float(torch.linalg.vector_norm(missing))
        # Not only the first: rounding may stop the error above it.
        if error <= 1e-14 * size or (error <= 1e-10 * size and error > before / 2):
            break
        before = error
        step = _solve(c @ c.T, d.T @ d, missing)
        c, d = c + step @ d.T, d + c.T @ step
        missing = wanted - c @ d
    else:
        raise ConvergenceError(
            f"trained factors {trained.shape} lie too far from their start to place it; relative "
            f"error {error / size:.1e} after {_STEPS} steps."
        )
    return Factors(A=d @ product.vt, B=product.u @ c)


def _solve(left: Tensor, right: Tensor, wanted: Tensor) -> Tensor:
    """X with left·X + X·right = wanted, both positive semidefinite."""
    first, p = torch.linalg.eigh(left)
    second, q = torch.linalg.eigh(right)
    sums = first[:, None] + second[None, :]
    # Where both factors vanish no step helps; 1e-15 keeps it finite.
    sums = sums.clamp(min=max(1e-15 * float(sums.abs().max()), 1e-300))
    solution: Tensor = p @ ((p.T @ wanted @ q) / sums) @ q.T
    return solution
