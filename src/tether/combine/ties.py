"""TIES: trim, elect a sign, average what agrees.

Source: Yadav et al. 2023, arXiv:2306.01708, algorithm 1.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from tether.combine import dense
from tether.combine.build import Combined
from tether.combine.terms import Term
from tether.value import Adapter, Json, Progress

MAJORITIES = ("total", "frequency")


def ties(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    density: float,
    rank: int,
    majority: str = "total",
    progress: Progress | None = None,
) -> Combined:
    """TIES-merging of the changes, cut to a rank.

    Source: arXiv:2306.01708, algorithm 1. For each entry of ΔW: keep it in the adapters where it
    is among the `density` largest of its site (trim); elect the sign of Σ wᵢ·ΔWᵢ; average
    wᵢ·ΔWᵢ over the adapters whose entry has that sign. With 1 as all weights this is the
    algorithm with λ = 1, with λ as all weights that with λ; a negative weight votes for the
    opposite sign. The paper trims over the whole model at once, here as in other libraries each
    site by itself. (peft's "ties_svd" elects before it weighs, so the two agree where all weights
    are equal and positive; peft's "ties" works on the factors.)

    Args:
        adapters: one or more of the same base, anchored or plain; read, never changed.
        weights: one for each, of either sign; None for 1 each.
        density: part of each site's entries that trimming keeps, in (0, 1]; the paper's is 0.2.
        rank: largest rank of any site: the result is no low-rank matrix, and is cut to this.
        majority: the sign is that of the sum ("total", the paper's), or the one most adapters
            have ("frequency"; an equal vote goes to the sum's).
        progress: called with (sites done, sites in all).

    Returns:
        the combination, float32; each site's error is what cutting to `rank` left out. One dense
        site for each adapter is in memory at a time.

    Raises:
        ConfigError: no adapter, weights that do not fit, a density or rank that cannot be meant.
        UnknownNameError: another majority.
        UnsupportedAdapterError: DoRA, or a parameter trained whole whose start is unknown.
        ShapeMismatchError: a site has two shapes.
        BaseMismatchError: the adapters were made on different bases.
        NonFiniteError: a value is NaN or Inf.
    """
    dense.check_density(density)
    dense.check_choice("majority", majority, MAJORITIES)

    def rule(name: str, parts: Sequence[Term[Tensor]]) -> Tensor:
        del name
        return elect([part.weight * trim(part.value, density) for part in parts], majority)

    recipe: dict[str, Json] = {"combine": "ties", "density": density, "majority": majority}
    return dense.build_dense(adapters, weights, recipe, rule, rank, progress)


def trim(change: Tensor, density: float) -> Tensor:
    """Keep the entries of largest magnitude, the others zero.

    Args:
        change: any shape, floating.
        density: part to keep, in (0, 1]; one entry at least. Entries as large as the smallest
            that is kept are kept too, so that the result does not depend on their order.

    Returns:
        of the same shape.
    """
    sizes = change.abs().flatten()
    keep = max(1, int(density * sizes.numel()))
    smallest = torch.kthvalue(sizes, sizes.numel() - keep + 1).values
    return torch.where(change.abs() >= smallest, change, 0)


def elect(changes: Sequence[Tensor], majority: str = "total") -> Tensor:
    """Elect each entry's sign, and average the entries that have it.

    Args:
        changes: one or more, weighted, of one shape. A zero takes no part.
        majority: one of MAJORITIES.

    Returns:
        of that shape; zero where no sign is elected.
    """
    sign = _sum(changes).sign()
    if majority == "frequency":
        votes = _sum([change.sign() for change in changes]).sign()
        sign = torch.where(votes != 0, votes, sign)
    agree = [change.sign() == sign for change in changes]
    kept = _sum([torch.where(same, c, 0) for same, c in zip(agree, changes, strict=True)])
    return kept / _sum([same.to(kept.dtype) for same in agree]).clamp(min=1)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)
