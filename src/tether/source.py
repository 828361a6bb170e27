"""An adapter read site by site, so that none has to be in memory whole."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from tether.value import Adapter, Factors, LayerAdapter, Trained


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Where an adapter's values come from, one site at a time.

    Attributes:
        about: the adapter with every tensor's dtype and shape but not its values (see `sketch`).
        layer: site path -> its adapter.
        bias: module path -> its trained bias.
        module: module path, parameter name -> the parameter trained whole.
    """

    about: Adapter
    layer: Callable[[str], LayerAdapter]
    bias: Callable[[str], Trained]
    module: Callable[[str, str], Trained]


def of_adapter(adapter: Adapter) -> Source:
    """A value as a source.

    Args:
        adapter: in memory.

    Returns:
        a source over it.
    """
    return Source(
        about=adapter,
        layer=adapter.layers.__getitem__,
        bias=adapter.biases.__getitem__,
        module=lambda path, name: adapter.modules[path][name],
    )


def sketch(layer: LayerAdapter, rank: int | None = None) -> LayerAdapter:
    """A layer's shapes without its memory: every tensor is one zero, seen many times.

    Args:
        layer: anchored or plain.
        rank: of a plain layer to sketch instead; None for the layer as it is.

    Returns:
        a layer of the same shapes.
    """
    factors = sketch_factors(layer.trainable, rank)
    anchor = layer.anchor if rank is None else None
    return replace(
        layer,
        trainable=factors,
        anchor=None if anchor is None else sketch_factors(anchor),
        magnitude=None if layer.magnitude is None else sketch_trained(layer.magnitude),
    )


def sketch_factors(factors: Factors, rank: int | None = None) -> Factors:
    """The shapes of factors without their memory.

    Args:
        factors: of any rank.
        rank: of the sketch; None for their own.

    Returns:
        factors of zeros that take no memory.
    """
    out_features, in_features = factors.shape
    rank = factors.rank if rank is None else rank
    return Factors(_zeros(factors.A, rank, in_features), _zeros(factors.B, out_features, rank))


def sketch_trained(value: Trained) -> Trained:
    """The shape of a parameter trained whole without its memory.

    Args:
        value: with or without an anchor.

    Returns:
        zeros that take no memory.
    """
    anchor = None if value.anchor is None else _zeros(value.anchor, *value.anchor.shape)
    return Trained(_zeros(value.trainable, *value.trainable.shape), anchor)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return like.new_zeros((), device="cpu").expand(shape)
