"""compare: how far two adapters of one base are apart. Pure; no model is needed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from tether import algebra
from tether.errors import NonFiniteError, ShapeMismatchError
from tether.value import Adapter, Json, LayerAdapter, Trained

Part = TypeVar("Part", LayerAdapter, Trained)


@dataclass(frozen=True, slots=True)
class Difference:
    """One change in both adapters: of a site's weight, or of a parameter trained whole.

    Attributes:
        norm_a: |Δa|_F.
        norm_b: |Δb|_F.
        error: |Δa − Δb|_F / |Δa|_F; 0 if both are zero, inf if only Δa is.
        cosine: <Δa, Δb> / (|Δa|·|Δb|), in [−1, 1]; None where one of them is zero.
    """

    norm_a: float
    norm_b: float
    error: float
    cosine: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` measured, in float64.

    Attributes:
        sites: site path -> difference of its ΔW (with DoRA: of its low-rank part).
        wholes: name of a bias, a DoRA magnitude or a parameter of a module trained whole -> the
            difference of the two displacements.
        only_a: sites and names that only the first adapter has.
        only_b: sites and names that only the second has.
    """

    sites: Mapping[str, Difference]
    wholes: Mapping[str, Difference]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def norm_a(self) -> float:
        """|Δa|_F of all sites taken together."""
        return math.hypot(*(site.norm_a for site in self.sites.values()))

    @property
    def norm_b(self) -> float:
        """|Δb|_F of all sites taken together."""
        return math.hypot(*(site.norm_b for site in self.sites.values()))

    @property
    def error(self) -> float:
        """|Δa − Δb|_F / |Δa|_F of all sites taken together; `wholes` are not in it."""
        apart = math.hypot(*(_distance(site) for site in self.sites.values()))
        return _ratio(apart, self.norm_a)

    @property
    def cosine(self) -> float | None:
        """<Δa, Δb> / (|Δa|·|Δb|) of all sites taken together; None where one of them is zero."""
        a, b = self.norm_a, self.norm_b
        if a == 0 or b == 0:
            return None
        shares = ((s.cosine or 0.0) * (s.norm_a / a) * (s.norm_b / b) for s in self.sites.values())
        return _clamped(math.fsum(shares))

    def to_dict(self) -> dict[str, Json]:
        """The comparison as JSON values.

        Returns:
            norm_a, norm_b, error and cosine of all sites, and of each site and whole; only_a and
            only_b. An infinite error is None.
        """
        overall = Difference(self.norm_a, self.norm_b, self.error, self.cosine)
        values: dict[str, Json] = dict(_json(overall))
        values["sites"] = {path: _json(site) for path, site in self.sites.items()}
        values["wholes"] = {name: _json(whole) for name, whole in self.wholes.items()}
        values["only_a"], values["only_b"] = list(self.only_a), list(self.only_b)
        return values

    def __str__(self) -> str:
        """A few lines for a person: all sites together, the one furthest apart, the rest."""
        overall = Difference(self.norm_a, self.norm_b, self.error, self.cosine)
        lines = [f"{len(self.sites)} sites: {_line(overall)}"]
        for kind, differences in (("site", self.sites), ("trained whole", self.wholes)):
            if differences:
                worst = max(differences, key=lambda name: differences[name].error)
                lines.append(f"furthest apart, {kind}: {worst}: {_line(differences[worst])}")
        for which, names in (("first", self.only_a), ("second", self.only_b)):
            if names:
                more = f" and {len(names) - 3} others" if len(names) > 3 else ""
                lines.append(f"only in the {which}: {', '.join(names[:3])}{more}")
        return "\n".join(lines)


@torch.no_grad()
def compare(a: Adapter, b: Adapter) -> Comparison:
    """How far two adapters of one base are apart, site by site and all together.

    From the factors alone: no ΔW is formed, so a difference far below the norms is still exact,
    and it takes no more memory than the adapters. The cosine is that of the two changes scaled to
    length 1, 1 − |Δa/|Δa| − Δb/|Δb||²/2, which keeps its digits near 1 and near 0.

    Args:
        a: the reference; anchored or plain, any rank.
        b: likewise; the ranks may differ.

    Returns:
        the comparison. Parameters trained whole are compared by what moved away from the base; a
        file of another library holds no more than their values, then the other adapter's anchor
        is taken for both, or, where that has none, the values themselves. What only one adapter
        trains counts as a change of zero in the other.

    Raises:
        ShapeMismatchError: a site or a parameter has another shape; they are of different models.
        NonFiniteError: a value is NaN or Inf.
    """
    wholes_a, wholes_b = dict(_wholes(a)), dict(_wholes(b))
    return Comparison(
        sites=_each(a.layers, b.layers, _between_layers),
        wholes=_each(wholes_a, wholes_b, _between_wholes),
        only_a=(*_missing(a.layers, b.layers), *_missing(wholes_a, wholes_b)),
        only_b=(*_missing(b.layers, a.layers), *_missing(wholes_b, wholes_a)),
    )


def _each(
    a: Mapping[str, Part],
    b: Mapping[str, Part],
    between: Callable[[str, Part | None, Part | None], Difference],
) -> dict[str, Difference]:
    """The difference of every name that either has, in the first one's order."""
    return {name: between(name, a.get(name), b.get(name)) for name in dict.fromkeys((*a, *b))}


def _missing(a: Iterable[str], b: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(name for name in a if name not in b)


def _between_layers(path: str, a: LayerAdapter | None, b: LayerAdapter | None) -> Difference:
    if a is not None and b is not None and a.trainable.shape != b.trainable.shape:
        _refuse(f"site {path!r}", a.trainable.shape, b.trainable.shape)
    norm_a, norm_b = (0.0 if layer is None else algebra.norm(layer) for layer in (a, b))
    _check_finite(f"site {path!r}", norm_a, norm_b)
    if a is None or b is None or norm_a == 0 or norm_b == 0:
        return _one_sided(norm_a, norm_b)
    # At length 1 the distance tells the angle, whatever the lengths.
    angle = algebra.relative_error(
        replace(a, scaling=a.scaling / norm_a), replace(b, scaling=b.scaling / norm_b)
    )
    error = algebra.relative_error(a, b)
    return Difference(norm_a, norm_b, error, _clamped(1 - angle**2 / 2))


def _between_wholes(name: str, a: Trained | None, b: Trained | None) -> Difference:
    if a is not None and b is not None and a.trainable.shape != b.trainable.shape:
        _refuse(name, a.trainable.shape, b.trainable.shape)
    moved_a, moved_b = _moved(a, b), _moved(b, a)
    norm_a, norm_b = (float(torch.linalg.vector_norm(moved)) for moved in (moved_a, moved_b))
    _check_finite(name, norm_a, norm_b)
    if norm_a == 0 or norm_b == 0:
        return _one_sided(norm_a, norm_b)
    apart = float(torch.linalg.vector_norm(moved_a - moved_b))
    angle = float(torch.linalg.vector_norm(moved_a / norm_a - moved_b / norm_b))
    return Difference(norm_a, norm_b, apart / norm_a, _clamped(1 - angle**2 / 2))


def _moved(value: Trained | None, other: Trained | None) -> Tensor:
    """What a parameter moved by, in float64 on the CPU; zero if it is not trained."""
    if value is None:
        return torch.zeros((), dtype=torch.float64)
    trained = value.trainable.to("cpu", torch.float64)
    if value.anchor is not None or other is None or other.anchor is None:
        return trained
    return trained - other.anchor.to("cpu", torch.float64)


def _wholes(adapter: Adapter) -> Iterator[tuple[str, Trained]]:
    for path, layer in adapter.layers.items():
        if layer.magnitude is not None:
            yield f"{path}.magnitude", layer.magnitude
    yield from adapter.trained_whole


def _one_sided(norm_a: float, norm_b: float) -> Difference:
    """A change against none."""
    return Difference(norm_a, norm_b, _ratio(max(norm_a, norm_b), norm_a), None)


def _distance(difference: Difference) -> float:
    """|Δa − Δb|_F."""
    if difference.norm_a == 0:
        return difference.norm_b
    return difference.error * difference.norm_a


def _ratio(apart: float, size: float) -> float:
    if size == 0:
        return 0.0 if apart == 0 else math.inf
    return apart / size


def _clamped(cosine: float) -> float:
    """Rounding may leave it just outside."""
    return max(-1.0, min(1.0, cosine))


def _refuse(where: str, a: Iterable[int], b: Iterable[int]) -> None:
    raise ShapeMismatchError(
        f"{where}: {tuple(a)} in the first adapter, {tuple(b)} in the second. Compare adapters of "
        "one base model."
    )


def _check_finite(where: str, *norms: float) -> None:
    if not all(map(math.isfinite, norms)):
        raise NonFiniteError(
            f"{where}: the changes have norms {norms[0]} and {norms[1]}: NaN or Inf in a factor. "
            "Load an earlier checkpoint."
        )


def _json(difference: Difference) -> dict[str, Json]:
    error = difference.error if math.isfinite(difference.error) else None
    return {
        "norm_a": difference.norm_a,
        "norm_b": difference.norm_b,
        "error": error,
        "cosine": difference.cosine,
    }


def _line(difference: Difference) -> str:
    cosine = "none" if difference.cosine is None else f"{difference.cosine:.6f}"
    return (
        f"|ΔW| {difference.norm_a:.4g} and {difference.norm_b:.4g}, relative error "
        f"{difference.error:.2e}, cosine {cosine}"
    )
