"""Rules that look at every entry of ΔW: one site at a time is formed, combined, and cut to a rank.

They are not applied to the factors: B·A = (B·M)·(M⁻¹·A) for any invertible M, so an entry of a
factor, its size and its sign say nothing about the change.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tether import algebra, linalg
from tether.combine.build import Combined, Result, build
from tether.combine.terms import Term
from tether.errors import ConfigError, UnknownNameError, nearest
from tether.value import Adapter, Factors, Json, LayerAdapter, Layout, Progress

Rule = Callable[[str, Sequence[Term[Tensor]]], Tensor]


def build_dense(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    recipe: dict[str, Json],
    rule: Rule,
    rank: int,
    progress: Progress | None,
) -> Combined:
    """Apply an elementwise rule to the changes themselves.

    Args:
        adapters: read, never changed.
        weights: one for each, or None for 1 each.
        recipe: the method's name as "combine", and its settings without the rank.
        rule: (name, terms) -> the combined change, of the terms' shape.
        rank: largest rank of any site.
        progress: called with (sites done, sites in all).

    Returns:
        the combination, float32, with the measured error of cutting it.

    Raises:
        ConfigError: a rank below 1.
        TetherError: as of `build`.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank {rank!r} must be a whole number, at least 1.")

    def on_site(path: str, layout: Layout, parts: Sequence[Term[LayerAdapter]]) -> Result:
        device = parts[0].value.trainable.A.device
        changes = [Term(t.index, t.weight, algebra.delta(t.value).to(device)) for t in parts]
        return _cut(rule(path, changes), layout, rank)

    return build(adapters, weights, recipe | {"rank": rank}, on_site, rule, progress)


def check_density(density: float) -> None:
    """Raise unless a density can be meant.

    Args:
        density: part of the entries to keep.

    Raises:
        ConfigError: it is not in (0, 1].
    """
    number = isinstance(density, int | float) and not isinstance(density, bool)
    if not (number and 0 < density <= 1):
        raise ConfigError(f"density {density!r} must be above 0 and at most 1.")


def check_choice(field: str, value: str, valid: Sequence[str]) -> None:
    """Raise unless a setting is one of its names.

    Args:
        field: of the setting.
        value: given.
        valid: names.

    Raises:
        UnknownNameError: with the nearest.
    """
    if value not in valid:
        raise UnknownNameError(f"{field} {value!r} is not one. {nearest(str(value), valid)}")


def _cut(change: Tensor, layout: Layout, rank: int) -> Result:
    """The best approximation of a dense change, and its error."""
    linalg.check_finite(change, "the combined change")
    found = linalg.top_svd(change, min(rank, *change.shape))
    root = found.s.sqrt()
    factors = Factors(A=root[:, None] * found.vt, B=found.u * root)
    exact = change.double()
    size = float(torch.linalg.matrix_norm(exact))
    lost = float(torch.linalg.matrix_norm(exact - factors.B.double() @ factors.A.double()))
    # Not lost / size: the zero matrix is met exactly.
    return Result(LayerAdapter(factors, None, 1.0, layout), size, lost / size if size > 0 else 0.0)
