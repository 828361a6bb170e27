"""DARE: drop entries at random and rescale the rest, before combining.

Source: Yu et al. 2024, arXiv:2311.03099, section 3.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from tether.combine import dense
from tether.combine.build import Combined
from tether.combine.exact import weighted_sum
from tether.combine.terms import Term
from tether.combine.ties import elect
from tether.errors import ConfigError
from tether.value import Adapter, Json, Progress

THEN = ("linear", "ties")


def dare(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    density: float,
    rank: int,
    seed: int = 0,
    then: str = "linear",
    progress: Progress | None = None,
) -> Combined:
    """Drop and rescale the changes at random, combine them, and cut to a rank.

    Source: arXiv:2311.03099, section 3, with p = 1 − density: each entry of ΔWᵢ is kept with
    probability `density` and divided by it, so that its expectation stays. Then Σ wᵢ·ΔWᵢ, or the
    sign election of TIES (arXiv:2306.01708) without its trimming, which dropping takes the place
    of. (The expectation is that of the combination before it is cut.)

    Args:
        adapters: one or more of the same base, anchored or plain; read, never changed.
        weights: one for each, of either sign; None for 1 each.
        density: part of the entries to keep, in (0, 1]; 1 drops nothing.
        rank: largest rank of any site: the result is no low-rank matrix, and is cut to this.
        seed: of the random numbers. What is dropped depends on the seed, the adapter's place in
            the list and the site, on nothing else: the same seed gives the same bits.
        then: "linear" or "ties".
        progress: called with (sites done, sites in all).

    Returns:
        the combination, float32; each site's error is what cutting to `rank` left out. One dense
        site for each adapter is in memory at a time.

    Raises:
        ConfigError: no adapter, weights that do not fit, a density, rank or seed that cannot be
            meant.
        UnknownNameError: another `then`.
        UnsupportedAdapterError: DoRA, or a parameter trained whole whose start is unknown.
        ShapeMismatchError: a site has two shapes.
        BaseMismatchError: the adapters were made on different bases.
        NonFiniteError: a value is NaN or Inf.
    """
    dense.check_density(density)
    dense.check_choice("then", then, THEN)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed {seed!r} must be a whole number, at least 0.")

    def rule(name: str, parts: Sequence[Term[Tensor]]) -> Tensor:
        dropped = []
        for part in parts:
            generator = _generator(seed, part.index, name)
            kept = drop(part.value, density, generator)
            dropped.append(Term(part.index, part.weight, kept))
        if then == "linear":
            return weighted_sum(name, dropped)
        return elect([part.weight * part.value for part in dropped])

    recipe: dict[str, Json] = {"combine": "dare", "density": density, "seed": seed, "then": then}
    return dense.build_dense(adapters, weights, recipe, rule, rank, progress)


def drop(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with a probability, and divide by it.

    Args:
        change: any shape, floating.
        density: the probability, in (0, 1].
        generator: on the CPU, so that every device drops the same.

    Returns:
        of the same shape; its expectation is `change`.
    """
    kept = torch.rand(change.shape, generator=generator) < density
    return torch.where(kept.to(change.device), change / density, 0)


def _generator(seed: int, index: int, name: str) -> torch.Generator:
    """Random numbers of one adapter at one site, that do not depend on the others."""
    digest = hashlib.sha256(f"{seed}:{index}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
