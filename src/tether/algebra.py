"""What can be computed from an adapter alone: ΔW, plain LoRA, smaller rank. Pure functions."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tether.errors import ConfigError, NonFiniteError
from tether.linalg import check_finite
from tether.value import Adapter, Factors, LayerAdapter


def delta(layer: LayerAdapter, weight: Tensor | None = None) -> Tensor:
    """The change of one site's weight, s·(B·dA + dB·A0).

    Args:
        layer: factors in any floating dtype; computed in float32 or better.
        weight: (out, in) view of the base weight, which only a site with DoRA needs: its change
            is m·(W + ΔW)/|W + ΔW| − W, the lengths taken row by row.

    Returns:
        (out, in), float32 (float64 if the factors are).

    Raises:
        ConfigError: the site has DoRA and no weight is given.
    """
    product = _plain(layer, layer.dtype)
    change = layer.scaling * (product.B @ product.A)
    if layer.magnitude is None:
        return change
    if weight is None:
        raise ConfigError("with DoRA the change of a weight depends on it; give the weight.")
    moved = weight.to(change) + change
    lengths = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    # A row of zeros has no direction to stretch.
    safe = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    return moved * (layer.magnitude.current.to(change)[:, None] / safe) - weight.to(change)


def to_lora(adapter: Adapter, rank: int | None = None, tolerance: float | None = None) -> Adapter:
    """The adapter as a plain LoRA: no anchor, the same ΔW on the same base.

    Without `rank` and `tolerance` the factors are concatenated, B' = [B, dB] and A' = [dA; A0],
    of rank 2r: no large halves that cancel, so they survive rounding to half precision. Sites
    without an anchor stay as they are.

    Args:
        adapter: read, never changed.
        rank: largest rank of any site; the best approximation of that rank is returned.
        tolerance: largest |ΔW − ΔW'|_F / |ΔW|_F of any site; the smallest rank that meets it.

    Returns:
        a new adapter, float32 (float64 if the factors are); every anchor is None.

    Raises:
        ConfigError: rank < 1, tolerance not in (0, 1), or both and they exclude each other.
    """
    layers = {}
    for path, layer in adapter.layers.items():
        try:
            layers[path] = compress(layer, rank, tolerance).layer
        except (ConfigError, NonFiniteError) as error:
            raise type(error)(f"site {path!r}: {error}") from None
    return replace(adapter, layers=layers)


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """A plain layer and what making it cost.

    Attributes:
        layer: without an anchor.
        error: |ΔW − ΔW'|_F / |ΔW|_F, measured on the factors returned (0 for ΔW = 0).
    """

    layer: LayerAdapter
    error: float


@torch.no_grad()
def compress(
    layer: LayerAdapter,
    rank: int | None = None,
    tolerance: float | None = None,
    dtype: torch.dtype | None = None,
) -> Compressed:
    """One site as plain factors, of smaller rank if asked.

    QR of both factors and the SVD of the small (2r, 2r) core give the SVD of ΔW without forming
    it; cutting that is the best approximation (Eckart-Young).

    Args:
        layer: anchored or plain.
        rank: largest rank; None for no limit.
        tolerance: largest relative Frobenius error; None for exact.
        dtype: of the result; None for the layer's own, float32 at least.

    Returns:
        Compressed; with neither limit the exact concatenation and its error, which is rounding.

    Raises:
        ConfigError: rank < 1, tolerance not in (0, 1), or `rank` cannot meet `tolerance`.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank {rank} must be at least 1.")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ConfigError(f"tolerance {tolerance} must be between 0 and 1.")
    dtype = layer.dtype if dtype is None else dtype
    plain = _plain(layer, dtype)
    for factor in (plain.A, plain.B):
        check_finite(factor, "the change")
    if (rank is not None and rank < plain.rank) or tolerance is not None:
        plain, error = _truncate(_plain(layer, torch.float64), rank, tolerance, dtype)
        result = replace(layer, trainable=plain, anchor=None)
    else:
        result = replace(layer, trainable=plain, anchor=None)
        error = relative_error(layer, result)
    if tolerance is not None and error > tolerance:
        raise ConfigError(
            f"rank {plain.rank} leaves a relative error of {error:.3g}, above tolerance "
            f"{tolerance:.3g}. Raise one of them."
        )
    return Compressed(result, error)


@torch.no_grad()
def balanced(layer: LayerAdapter) -> Factors:
    """ΔW as two plain factors: the scaling folded into B, then each pair's size evened out.

    Small displacements would fall into float16's subnormal numbers; powers of two are exact.

    Args:
        layer: anchored or plain.

    Returns:
        factors whose product is ΔW, float32 (float64 if the factors are).
    """
    plain = _plain(layer, layer.dtype)
    a, b = plain.A, layer.scaling * plain.B
    size_a, size_b = a.abs().amax(dim=1), b.abs().amax(dim=0)
    live = (size_a > 0) & (size_b > 0)
    exponent = torch.where(live, (size_b.log2() - size_a.log2()) / 2, torch.zeros_like(size_a))
    shift = exponent.round().clamp(-60, 60)
    return Factors(torch.ldexp(a, shift[:, None]), torch.ldexp(b, -shift))


def smallest_rank(layer: LayerAdapter, tolerance: float) -> int:
    """The smallest rank whose best approximation of ΔW is within a tolerance.

    Args:
        layer: anchored or plain.
        tolerance: largest |ΔW − ΔW'|_F / |ΔW|_F.

    Returns:
        1 or more, counted on singular values in float64.
    """
    return _smallest_rank(singular_values(layer), tolerance)


@torch.no_grad()
def factors(layer: LayerAdapter) -> Factors:
    """ΔW as one product B·A, the scaling folded into B.

    Args:
        layer: anchored or plain.

    Returns:
        float64; [s·B, s·dB]·[dA; A0] of rank 2r for an anchored site, s·B and A for a plain one.
    """
    plain = _plain(layer, torch.float64)
    return Factors(plain.A, layer.scaling * plain.B)


@torch.no_grad()
def norm(layer: LayerAdapter) -> float:
    """|ΔW|_F of one site, from the factors alone, in float64.

    Args:
        layer: anchored or plain.

    Returns:
        the Frobenius norm.
    """
    plain = _plain(layer, torch.float64)
    return layer.scaling * _product_norm(plain.B, plain.A)


@torch.no_grad()
def singular_values(layer: LayerAdapter) -> Tensor:
    """The singular values of one site's ΔW (with DoRA: of its low-rank part), in float64.

    Args:
        layer: anchored or plain.

    Returns:
        (k,), descending, k the rank of the plain form or the smaller side of the weight.
    """
    plain = _plain(layer, torch.float64)
    values: Tensor = torch.linalg.svdvals(_core(plain.B, plain.A)[1])
    return layer.scaling * values


@torch.no_grad()
def anchor_norm(layer: LayerAdapter) -> float:
    """|s·B0·A0|_F: how much of the weight the anchor took up.

    Args:
        layer: anchored or plain.

    Returns:
        the Frobenius norm; 0 without an anchor.
    """
    if layer.anchor is None:
        return 0.0
    anchor = layer.anchor.to(torch.float64)
    return layer.scaling * _product_norm(anchor.B, anchor.A)


@torch.no_grad()
def relative_error(layer: LayerAdapter, other: LayerAdapter) -> float:
    """|ΔW − ΔW'|_F / |ΔW|_F between two forms of one site, in float64.

    Computed from the stacked factors, so that a difference far below the norms is still exact.

    Args:
        layer: the reference.
        other: the same shape, any rank.

    Returns:
        the relative error; 0 if both are zero, inf if only the reference is.
    """
    mine, theirs = _plain(layer, torch.float64), _plain(other, torch.float64)
    b = torch.cat([layer.scaling * mine.B, -other.scaling * theirs.B.to(mine.B.device)], dim=1)
    a = torch.cat([mine.A, theirs.A.to(mine.A.device)])
    difference, size = _product_norm(b, a), norm(layer)
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


def _plain(layer: LayerAdapter, dtype: torch.dtype) -> Factors:
    """[B, dB]·[dA; A0] in `dtype`: ΔW without s."""
    moved = layer.trainable.to(dtype)
    if layer.anchor is None:
        return moved
    anchor = layer.anchor.to(dtype)
    return Factors(
        A=torch.cat([moved.A, anchor.A]), B=torch.cat([anchor.B + moved.B, moved.B], dim=1)
    )


def _core(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal bases and the small matrix between them: b·a = left·core·right."""
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    return left, upper @ lower.T, right.T


def _product_norm(b: Tensor, a: Tensor) -> float:
    """|b·a|_F: that of the small matrix between orthonormal bases, which need not be formed."""
    upper, lower = (torch.linalg.qr(factor, mode="r")[1] for factor in (b, a.T))
    return float(torch.linalg.matrix_norm(upper @ lower.T))


def _truncate(
    plain: Factors, rank: int | None, tolerance: float | None, dtype: torch.dtype
) -> tuple[Factors, float]:
    """Best approximation, its singular values shared between the factors; its relative error."""
    left, core, right = _core(plain.B, plain.A)
    u, s, vt = torch.linalg.svd(core)
    keep = _smallest_rank(s, tolerance) if tolerance is not None else len(s)
    keep = min(keep, rank if rank is not None else keep, len(s))
    root = s[:keep].sqrt()
    best = Factors(A=(root[:, None] * vt[:keep]) @ right, B=left @ (u[:, :keep] * root)).to(dtype)
    size = float(s.norm())
    return best, _distance(left, core, right, best.to(torch.float64)) / size if size > 0 else 0.0


def _distance(left: Tensor, core: Tensor, right: Tensor, other: Factors) -> float:
    """|left·core·right − B·A|_F, exact also where it is far below the norms.

    With B = left·X + E and A = Y·right + F, the parts E and F being orthogonal to the bases, the
    difference falls into four orthogonal parts, whose squares add up:
    |core − X·Y|² + |X·F|² + |E·Y|² + |E·F|².
    """
    x, y = left.T @ other.B, other.A @ right.T
    e, f = other.B - left @ x, other.A - y @ right
    ee, ff = e.T @ e, f @ f.T
    parts = (x.T @ x) * ff + ee * (y @ y.T) + ee * ff
    return math.sqrt(float((core - x @ y).square().sum() + parts.sum()))


def _smallest_rank(s: Tensor, tolerance: float) -> int:
    """The smallest k >= 1 whose tail |s[k:]| is within tolerance·|s|."""
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()
    # A margin for rounding to float32: the error is measured again on the rounded factors.
    allowed = tolerance * tails[0] * (1 - 1e-3)
    return max(1, int((tails > allowed).sum()))
