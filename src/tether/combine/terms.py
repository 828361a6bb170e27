"""What is combined: weights and adapters checked against each other, and their terms by site."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tether.errors import (
    BaseMismatchError,
    ConfigError,
    ShapeMismatchError,
    UnsupportedAdapterError,
)
from tether.linalg import check_finite
from tether.provenance import Fingerprint
from tether.value import Adapter, LayerAdapter, Layout, Trained

Value = TypeVar("Value")
_MATRICES = ("linear", "transposed")


@dataclass(frozen=True, slots=True, eq=False)
class Term(Generic[Value]):
    """One adapter's part of a sum.

    Attributes:
        index: of the adapter in the list.
        weight: w, not zero.
        value: what it multiplies.
    """

    index: int
    weight: float
    value: Value


def check(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> tuple[float, ...]:
    """Raise unless these adapters can be combined; else the weights.

    Args:
        adapters: one or more.
        weights: one for each, finite; None for 1 each.

    Returns:
        the weights as floats.

    Raises:
        ConfigError: no adapter, or weights that do not fit or are not finite.
        UnsupportedAdapterError: DoRA, a parameter trained whole whose start is unknown, or a
            module that one adapter trains whole and another adapts.
        ShapeMismatchError: a site has two shapes.
        BaseMismatchError: the adapters were made on different bases.
        NonFiniteError: a value is NaN or Inf.
    """
    if isinstance(adapters, Adapter) or not all(isinstance(a, Adapter) for a in adapters):
        raise ConfigError("combine takes a list of adapters; of a handle give handle.snapshot().")
    if not adapters:
        raise ConfigError("there is no adapter to combine; give one or more.")
    chosen = _weights(weights, len(adapters))
    for adapter in adapters:
        for path, layer in adapter.layers.items():
            _check_layer(path, layer)
        for name, trained in adapter.trained_whole:
            _check_trained(name, trained)
    _check_sites(adapters)
    _check_whole(adapters)
    return chosen


def layouts(adapters: Sequence[Adapter]) -> dict[str, Layout]:
    """Every site of any of the adapters, in order of first appearance.

    Args:
        adapters: checked.

    Returns:
        site path -> layout; not `common` where one adapter knows that it is not.
    """
    found: dict[str, Layout] = {}
    for adapter in adapters:
        for path, layer in adapter.layers.items():
            if path not in found or not layer.layout.common:
                found[path] = layer.layout
    return found


def site_terms(
    adapters: Sequence[Adapter], weights: Sequence[float], path: str
) -> list[Term[LayerAdapter]]:
    """The adapters' parts at one site; an adapter without it, or of weight 0, has none.

    Args:
        adapters: checked.
        weights: one for each.
        path: of the site.

    Returns:
        none or more terms.
    """
    return [
        Term(index, weight, adapter.layers[path])
        for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
        if weight != 0 and path in adapter.layers
    ]


def whole_terms(
    parameters: Sequence[Mapping[str, Trained]], weights: Sequence[float], name: str
) -> list[Term[Tensor]]:
    """The adapters' displacements of one parameter that is trained whole, float32 at least.

    Args:
        parameters: of each adapter, parameter name -> parameter.
        weights: one for each.
        name: of the parameter.

    Returns:
        none or more terms.
    """
    terms = []
    for index, (own, weight) in enumerate(zip(parameters, weights, strict=True)):
        if weight != 0 and name in own:
            moved = own[name].trainable
            wide = torch.promote_types(moved.dtype, torch.float32)
            terms.append(Term(index, weight, moved.to(wide)))
    return terms


def _weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise ConfigError(
            f"{len(weights)} weights for {count} adapters; give one weight for each, or none."
        )
    for weight in weights:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight)):
            raise ConfigError(f"weight {weight!r} is not a finite number.")
    return tuple(float(weight) for weight in weights)


def _check_layer(path: str, layer: LayerAdapter) -> None:
    if layer.magnitude is not None:
        raise UnsupportedAdapterError(
            f"site {path!r}: DoRA rescales the rows of the base weight, so its change is no matrix "
            "that the adapter alone can tell. Combine adapters without DoRA."
        )
    for name, factor in _named_factors(layer):
        check_finite(factor, f"site {path!r}: factor {name}")


def _named_factors(layer: LayerAdapter) -> Iterator[tuple[str, Tensor]]:
    if layer.anchor is None:
        yield from (("A", layer.trainable.A), ("B", layer.trainable.B))
    else:
        yield from (("dA", layer.trainable.A), ("dB", layer.trainable.B))
        yield from (("A0", layer.anchor.A), ("B0", layer.anchor.B))


def _check_trained(name: str, trained: Trained) -> None:
    if trained.anchor is None:
        raise UnsupportedAdapterError(
            f"{name!r} is trained whole, and the adapter does not say what it was in the base; its "
            "change cannot be told. Combine adapters that tether trained, or leave it out."
        )
    check_finite(trained.trainable, f"{name!r}")


def _check_sites(adapters: Sequence[Adapter]) -> None:
    layers: dict[str, LayerAdapter] = {}
    prints: dict[str, Fingerprint] = {}
    for adapter in adapters:
        for path, layer in adapter.layers.items():
            _check_layouts(path, layers.setdefault(path, layer).layout, layer.layout)
        for path, found in adapter.provenance.fingerprints.items():
            first = prints.setdefault(path, found)
            if not _same_tensor(first, found):
                raise BaseMismatchError(
                    f"site {path!r}: one adapter was made on {first.dtype} {first.shape} sha256 "
                    f"{first.sha256[:12]}…, another on {found.dtype} {found.shape} sha256 "
                    f"{found.sha256[:12]}…. Only adapters of the same base can be combined."
                )


def _check_layouts(path: str, one: Layout, other: Layout) -> None:
    # Files of other libraries do not always tell a Linear from a transposed Conv1D: there it is
    # the (out, in) view that must agree, which is what the factors act on.
    alike = one.kind == other.kind or {one.kind, other.kind} <= set(_MATRICES)
    same_shape = one.shape == other.shape or one.kind != other.kind
    views = [(layout.out_features, layout.in_features) for layout in (one, other)]
    if not (alike and same_shape and views[0] == views[1]):
        raise ShapeMismatchError(
            f"site {path!r}: one adapter changes {one.kind!r} {one.shape}, another {other.kind!r} "
            f"{other.shape}. Only adapters of the same base can be combined."
        )


def _same_tensor(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two fingerprints are of one checkpoint, loaded in one precision or in two."""
    rounded = one.dtype != other.dtype and (
        one.sha256_bfloat16 == other.sha256_bfloat16 or one.sha256_float16 == other.sha256_float16
    )
    return one.shape == other.shape and (one.sha256 == other.sha256 or rounded)


def _check_whole(adapters: Sequence[Adapter]) -> None:
    starts: dict[str, Tensor] = {}
    for adapter in adapters:
        for name, trained in adapter.trained_whole:
            assert trained.anchor is not None
            first, found = starts.setdefault(name, trained.anchor), trained.anchor
            if first.shape != found.shape:
                raise ShapeMismatchError(
                    f"{name!r}: it is {tuple(first.shape)} in one adapter, {tuple(found.shape)} in "
                    "another. Only adapters of the same base can be combined."
                )
            if not bool((first.double() == found.double()).all()):
                apart = float((first.double() - found.double()).abs().max())
                raise BaseMismatchError(
                    f"{name!r}: the adapters' starts differ by up to {apart:.3g}. Only adapters of "
                    "the same base, loaded in the same precision, can be combined."
                )
    owned = {path for adapter in adapters for path in adapter.modules}
    adapted = {path for adapter in adapters for path in (*adapter.layers, *adapter.biases)}
    for module in owned:
        for path in sorted(adapted | owned - {module}):
            if path == module or path.startswith(module + "."):
                raise UnsupportedAdapterError(
                    f"{module!r} is trained whole, and {path!r} in it is adapted besides: no "
                    "adapter can hold both. Combine adapters that treat it alike."
                )
