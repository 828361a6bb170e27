"""compare: how far two adapters of one base are apart. Pure; no model is needed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from tether import algebra
from tether.compare.subspace import Directions, Overlap, directions, least_error, overlap
from tether.compare.values import Comparison, Difference, SiteDifference, ratio
from tether.errors import NonFiniteError, ShapeMismatchError
from tether.value import Adapter, LayerAdapter, Progress, Trained

Part = TypeVar("Part", LayerAdapter, Trained)
Found = TypeVar("Found", bound=Difference)


@torch.no_grad()
def compare(a: Adapter, b: Adapter, progress: Progress | None = None) -> Comparison:
    """How far two adapters of one base are apart, site by site and all together.

    From the factors alone: no ΔW is formed, so a difference far below the norms is still exact,
    and it takes no more memory than the adapters. The cosine is that of the two changes scaled to
    length 1, 1 − |Δa/|Δa| − Δb/|Δb||²/2, which keeps its digits near 1 and near 0.

    Args:
        a: the reference; anchored or plain, any rank.
        b: likewise; the ranks may differ.
        progress: called after each site.

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
        sites=_each(a.layers, b.layers, _between_layers, progress),
        wholes=_each(wholes_a, wholes_b, _between_wholes),
        only_a=(*_missing(a.layers, b.layers), *_missing(wholes_a, wholes_b)),
        only_b=(*_missing(b.layers, a.layers), *_missing(wholes_b, wholes_a)),
        bytes_a=_bytes(a),
        bytes_b=_bytes(b),
    )


def _each(
    a: Mapping[str, Part],
    b: Mapping[str, Part],
    between: Callable[[str, Part | None, Part | None], Found],
    progress: Progress | None = None,
) -> dict[str, Found]:
    """The difference of every name that either has, in the first one's order."""
    found: dict[str, Found] = {}
    names = dict.fromkeys((*a, *b))
    for name in names:
        found[name] = between(name, a.get(name), b.get(name))
        if progress is not None:
            progress(len(found), len(names))
    return found


def _missing(a: Iterable[str], b: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(name for name in a if name not in b)


def _between_layers(path: str, a: LayerAdapter | None, b: LayerAdapter | None) -> SiteDifference:
    if a is not None and b is not None and a.trainable.shape != b.trainable.shape:
        _refuse(f"site {path!r}", a.trainable.shape, b.trainable.shape)
    ways_a, ways_b = (_directions(path, layer) for layer in (a, b))
    norm_a, norm_b = (0.0 if ways is None else ways.norm for ways in (ways_a, ways_b))
    count_b = 0 if ways_b is None else ways_b.rank
    error, cosine = _apart(a, b, norm_a, norm_b)
    return SiteDifference(
        norm_a,
        norm_b,
        error,
        cosine,
        error,
        rank_a=0 if a is None else a.rank,
        rank_b=0 if b is None else b.rank,
        directions_a=0 if ways_a is None else ways_a.rank,
        directions_b=count_b,
        overlap=_shared(ways_a, ways_b),
        least=0.0 if ways_a is None else least_error(ways_a, count_b),
    )


def _directions(path: str, layer: LayerAdapter | None) -> Directions | None:
    if layer is None:
        return None
    try:
        return directions(layer)
    except NonFiniteError as error:
        raise NonFiniteError(f"site {path!r}: {error}") from None


def _apart(
    a: LayerAdapter | None, b: LayerAdapter | None, norm_a: float, norm_b: float
) -> tuple[float, float | None]:
    """Relative error and cosine of two changes of these norms."""
    if a is None or b is None or norm_a == 0 or norm_b == 0:
        return ratio(max(norm_a, norm_b), norm_a), None
    # At length 1 the distance tells the angle, whatever the lengths.
    angle = algebra.relative_error(
        replace(a, scaling=a.scaling / norm_a), replace(b, scaling=b.scaling / norm_b)
    )
    return algebra.relative_error(a, b), _clamped(1 - angle**2 / 2)


def _between_wholes(name: str, a: Trained | None, b: Trained | None) -> Difference:
    if a is not None and b is not None and a.trainable.shape != b.trainable.shape:
        _refuse(name, a.trainable.shape, b.trainable.shape)
    moved_a, moved_b = _moved(a, b), _moved(b, a)
    norm_a, norm_b = (float(torch.linalg.vector_norm(moved)) for moved in (moved_a, moved_b))
    _check_finite(name, norm_a, norm_b)
    if norm_a == 0 or norm_b == 0:
        apart, cosine = max(norm_a, norm_b), None
    else:
        apart = float(torch.linalg.vector_norm(moved_a - moved_b))
        angle = float(torch.linalg.vector_norm(moved_a / norm_a - moved_b / norm_b))
        cosine = _clamped(1 - angle**2 / 2)
    size = max(norm_a, *(_size(value) for value in (a, b)))
    return Difference(norm_a, norm_b, ratio(apart, norm_a), cosine, ratio(apart, size))


def _size(value: Trained | None) -> float:
    """The norm of what is held of a parameter: its displacement, or its value itself."""
    if value is None:
        return 0.0
    return float(torch.linalg.vector_norm(value.trainable.to("cpu", torch.float64)))


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
            f"{where}: the changes have norms {norms[0]} and {norms[1]}: NaN or Inf in a value. "
            "Load an earlier checkpoint."
        )


def _bytes(adapter: Adapter) -> int:
    """What the tensors of an adapter take."""
    tensors = [value for _, whole in _wholes(adapter) for value in (whole.trainable, whole.anchor)]
    for layer in adapter.layers.values():
        for factors in (layer.trainable, layer.anchor):
            tensors += [] if factors is None else [factors.A, factors.B]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _shared(a: Directions | None, b: Directions | None) -> Overlap | None:
    return None if a is None or b is None else overlap(a, b)
