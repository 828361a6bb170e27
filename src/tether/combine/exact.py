"""Weighted sums of changes, Σ wᵢ·ΔWᵢ: concatenated, without loss at the smallest rank, or cut.

Task arithmetic: Ilharco et al. 2023, arXiv:2212.04089, section 2. A low-rank change is the product
of its factors, so a sum is their concatenation, and QR with a small SVD is its best approximation
(Eckart-Young): no dense matrix is formed.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from tether import algebra
from tether.combine.build import Combined, Result, build, nothing
from tether.combine.terms import Term
from tether.errors import ConfigError
from tether.value import Adapter, Factors, LayerAdapter, Layout, Progress

# A sum below this part of its terms is what rounding left of terms that cancel.
_CANCELLED = 1e-13


def cat(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    progress: Progress | None = None,
) -> Combined:
    """Σ wᵢ·ΔWᵢ by concatenation: B = [w₁·s₁·B₁, w₂·s₂·B₂, …], A = [A₁; A₂; …].

    The factors stay what they were; ranks add up (an anchored adapter counts twice its rank).
    Source: arXiv:2212.04089, section 2; the same numbers as peft's `combination_type="cat"`.

    Args:
        adapters: one or more of the same base, anchored or plain; read, never changed.
        weights: one for each, of either sign; None for 1 each.
        progress: called with (sites done, sites in all).

    Returns:
        the combination, exact up to rounding to the factors' dtype (float32 at least).

    Raises:
        ConfigError: no adapter, or weights that do not fit.
        UnsupportedAdapterError: DoRA, or a parameter trained whole whose start is unknown.
        ShapeMismatchError: a site has two shapes.
        BaseMismatchError: the adapters were made on different bases.
        NonFiniteError: a value is NaN or Inf.
    """

    def on_site(path: str, layout: Layout, parts: Sequence[Term[LayerAdapter]]) -> Result:
        del path
        exact, size = _stacked(parts, layout)
        found = algebra.compress(exact, dtype=_dtype(parts))
        return Result(found.layer, size, found.error)

    return build(adapters, weights, {"combine": "cat"}, on_site, weighted_sum, progress)


def linear(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    progress: Progress | None = None,
) -> Combined:
    """Task arithmetic: Σ wᵢ·ΔWᵢ without loss, at the smallest rank that holds it.

    Source: arXiv:2212.04089, section 2. Adapters that share an anchor share half of their factors:
    k of them need rank (k+1)·r here, 2·k·r in `cat`. peft's `combination_type="linear"` is
    another thing: it adds the factors, (Σ √wᵢ·Bᵢ)·(Σ √wᵢ·Aᵢ), whose cross terms Bᵢ·Aⱼ belong to
    no adapter.

    Args:
        adapters: one or more of the same base, anchored or plain; read, never changed.
        weights: one for each, of either sign; None for 1 each.
        progress: called with (sites done, sites in all).

    Returns:
        the combination; what is left out of each site is below rounding in the factors' dtype.

    Raises:
        ConfigError: no adapter, or weights that do not fit.
        UnsupportedAdapterError: DoRA, or a parameter trained whole whose start is unknown.
        ShapeMismatchError: a site has two shapes.
        BaseMismatchError: the adapters were made on different bases.
        NonFiniteError: a value is NaN or Inf.
    """

    def on_site(path: str, layout: Layout, parts: Sequence[Term[LayerAdapter]]) -> Result:
        del path
        exact, size = _stacked(parts, layout)
        rank = algebra.smallest_rank(exact, torch.finfo(_dtype(parts)).eps)
        found = algebra.compress(exact, rank, dtype=_dtype(parts))
        return Result(found.layer, size, found.error)

    return build(adapters, weights, {"combine": "linear"}, on_site, weighted_sum, progress)


def svd(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Combined:
    """The best approximation of Σ wᵢ·ΔWᵢ of a smaller rank, with its exact error.

    Source: task arithmetic, arXiv:2212.04089, section 2, cut by Eckart-Young; what peft's
    `combination_type="svd"` finds from the dense matrix.

    Args:
        adapters: one or more of the same base, anchored or plain; read, never changed.
        weights: one for each, of either sign; None for 1 each.
        rank: largest rank of any site.
        tolerance: largest |ΔW − ΔW'|_F / |ΔW|_F of any site; the smallest rank that meets it.
        progress: called with (sites done, sites in all).

    Returns:
        the combination; no other factors of that rank are closer.

    Raises:
        ConfigError: no adapter, weights that do not fit, neither rank nor tolerance, values of
            them that cannot be meant or that exclude each other.
        UnsupportedAdapterError: DoRA, or a parameter trained whole whose start is unknown.
        ShapeMismatchError: a site has two shapes.
        BaseMismatchError: the adapters were made on different bases.
        NonFiniteError: a value is NaN or Inf.
    """
    if rank is None and tolerance is None:
        raise ConfigError("svd needs a rank or a tolerance; for the exact sum use linear or cat.")
    recipe = {"combine": "svd", "rank": rank, "tolerance": tolerance}

    def on_site(path: str, layout: Layout, parts: Sequence[Term[LayerAdapter]]) -> Result:
        del path
        exact, size = _stacked(parts, layout)
        found = algebra.compress(exact, rank, tolerance, _dtype(parts))
        return Result(found.layer, size, found.error)

    return build(adapters, weights, recipe, on_site, weighted_sum, progress)


def weighted_sum(name: str, parts: Sequence[Term[Tensor]]) -> Tensor:
    """Σ wᵢ·xᵢ.

    Args:
        name: unused; a rule takes it.
        parts: one or more, of one shape.

    Returns:
        the sum.
    """
    del name
    return reduce(torch.add, (part.weight * part.value for part in parts))


def _stacked(parts: Sequence[Term[LayerAdapter]], layout: Layout) -> tuple[LayerAdapter, float]:
    """The exact sum as one plain layer in float64, and its norm."""
    device = parts[0].value.trainable.A.device
    pairs = [(part.weight, algebra.factors(part.value)) for part in parts]
    stacked = Factors(
        A=torch.cat([pair.A.to(device) for _, pair in pairs]),
        B=torch.cat([weight * pair.B.to(device) for weight, pair in pairs], dim=1),
    )
    exact = LayerAdapter(stacked, None, 1.0, layout)
    size = algebra.norm(exact)
    # Not >, or NaN from an overflow in float64 passes.
    if not size < torch.finfo(_dtype(parts)).max:
        raise ConfigError("the weighted sum overflows. Use smaller weights.")
    if size <= _CANCELLED * sum(abs(p.weight) * algebra.norm(p.value) for p in parts):
        return nothing(layout, torch.float64).layer, 0.0
    return exact, size


def _dtype(parts: Sequence[Term[LayerAdapter]]) -> torch.dtype:
    return reduce(torch.promote_types, (part.value.dtype for part in parts))
