"""Slots: a fixed place for adapters that are swapped while a compiled model runs.

A slot is plain factors of one rank with nothing else in them: scaling 1, zero rows to fill up. So
every adapter of at most that rank has the same shapes and constants there, and compiled code stays
valid.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from tether import algebra, sites
from tether.attach import attach
from tether.errors import (
    ConfigError,
    MergedError,
    OffloadedError,
    ShapeMismatchError,
    ShardedWeightError,
    UnknownNameError,
    nearest,
)
from tether.fingerprints import check_fingerprint, fingerprint_tensor
from tether.handle import Handle
from tether.layers import Layer, SiteLayer, check_in_place, layers_of, originals
from tether.linalg import check_finite
from tether.provenance import Fingerprint, Provenance
from tether.quantized import Quantized
from tether.start import original
from tether.value import Adapter, Factors, LayerAdapter, Layout

# Weight -> (where its values lie and their version, fingerprint): a server swaps often, and
# hashing a large base takes a minute.
_State = tuple[tuple[int, int], ...]
_PRINTS: MutableMapping[Tensor, tuple[_State, Fingerprint]] = WeakTensorKeyDictionary()


def slot(
    model: nn.Module,
    adapter: Adapter | None = None,
    *,
    rank: int,
    target_modules: str | Sequence[str] | None = None,
    name: str = "slot",
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
) -> Handle:
    """Attach a place for adapters of at most one rank, to be filled by `swap`. Not trained.

    Make it before or after `torch.compile`; swapping compiles nothing anew.

    Args:
        model: any module; as for `attach`.
        adapter: the first to be in it; None for an empty one, which is the base bit for bit.
        rank: of the slot. An anchored adapter of rank r needs 2r, or `to_lora(adapter, rank=…)`.
        target_modules: sites of the slot, as in `LoraConfig`; None for those of `adapter`, or for
            all linear layers where that is None too.
        name: by which the adapter is found.
        dtype: of the factors.
        verify: check the base's fingerprints against the adapter's.

    Returns:
        the handle.

    Raises:
        ConfigError: the rank is none, or an adapter that does not fit the slot; see `swap`.
        AttachError: as for `attach`.
    """
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"slot: rank {rank!r} must be a whole number, at least 1.")
    base = original(model)
    if target_modules is None and adapter is not None:
        layouts = {path: layer.layout for path, layer in adapter.layers.items()}
    else:
        found = sites.find(base, sites.ALL_LINEAR if target_modules is None else target_modules)
        layouts = {site.path: site.layout for site in found}
    layers = {path: _empty(layout, rank) for path, layout in layouts.items()}
    if adapter is not None:
        layers |= {
            path: replace(layers[path], trainable=factors)
            for path, factors in _fitted(adapter, layers, name, dtype).items()
        }
    targets, excluded = sites.short_targets(base, list(layers))
    value = Adapter(
        layers=layers,
        provenance=Provenance("unknown") if adapter is None else adapter.provenance,
        config={} if adapter is None else adapter.config,
        targets=targets,
        excluded=excluded,
    )
    return attach(model, value, name, trainable=False, dtype=dtype, verify=verify)


@torch.no_grad()
def swap(handle: Handle, adapter: Adapter, *, verify: bool = True) -> Adapter:
    """Put another adapter into a slot, in place: compiled code stays valid.

    All or nothing: on an error the slot is as it was.

    Args:
        handle: of a slot.
        adapter: anchored or plain; zero at sites of the slot that it does not have.
        verify: check the base's fingerprints against the adapter's. They are remembered until a
            weight is written.

    Returns:
        the adapter that was there, as plain factors of the slot's rank.

    Raises:
        ConfigError: the handle is no slot; the adapter has DoRA, trained biases or modules trained
            whole, or a larger rank at a site.
        UnknownNameError: a site that the slot does not have.
        ShapeMismatchError: a site has another shape.
        BaseMismatchError: a base weight is not the one the adapter was made on.
        NonFiniteError: a factor does not fit the slot's dtype.
        MergedError, OffloadedError, DetachedError: the slot is not live on the model.
    """
    previous = handle.snapshot()
    model = original(handle.model)
    layers = _slot_layers(handle, layers_of(model)[handle.name])
    check_in_place(model)
    dtype = next(iter(layers.values())).A.dtype
    fitted = _fitted(adapter, previous.layers, handle.name, dtype)
    if verify:
        with originals(model):
            _check_base(model, adapter)
    try:
        _fill(layers, fitted)
    except BaseException:
        _fill(layers, {path: layer.trainable for path, layer in previous.layers.items()})
        raise
    handle.record.provenance, handle.record.config = adapter.provenance, dict(adapter.config)
    return previous


def _empty(layout: Layout, rank: int) -> LayerAdapter:
    factors = Factors(torch.zeros(rank, layout.in_features), torch.zeros(layout.out_features, rank))
    return LayerAdapter(factors, None, 1.0, layout)


def _fitted(
    adapter: Adapter, places: Mapping[str, LayerAdapter], name: str, dtype: torch.dtype
) -> dict[str, Factors]:
    """An adapter's factors as a slot holds them: scaling folded in, filled up with zeros."""
    for label, _ in adapter.trained_whole:
        raise ConfigError(
            f"{label}: the adapter trains it whole, and slot {name!r} holds factors only. Attach "
            "the adapter with tether.attach."
        )
    fitted = {}
    for path, layer in adapter.layers.items():
        _check_fits(path, layer, places, name)
        factors = algebra.balanced(layer)
        more = places[path].rank - factors.rank
        if more < 0:
            anchored = f" (rank {layer.rank}, anchored)" if layer.anchor is not None else ""
            raise ConfigError(
                f"site {path!r}: the adapter needs rank {factors.rank}{anchored}, slot {name!r} "
                f"has {places[path].rank}. Make the slot with rank={factors.rank}, or reduce the "
                f"adapter with tether.to_lora(adapter, rank={places[path].rank})."
            )
        padded = Factors(pad(factors.A, (0, 0, 0, more)), pad(factors.B, (0, more))).to(dtype)
        check_finite(padded.A, f"site {path!r}: factor A in {dtype}")
        check_finite(padded.B, f"site {path!r}: factor B in {dtype}")
        fitted[path] = padded
    return fitted


def _check_fits(
    path: str, layer: LayerAdapter, places: Mapping[str, LayerAdapter], name: str
) -> None:
    if path not in places:
        raise UnknownNameError(
            f"site {path!r}: slot {name!r} does not have it. {nearest(path, places)} Make the slot "
            "with target_modules that select it too."
        )
    if layer.magnitude is not None:
        raise ConfigError(
            f"site {path!r}: the adapter has DoRA, and slot {name!r} holds factors only. Attach "
            "the adapter with tether.attach."
        )
    here, wanted = places[path].layout, layer.layout
    if here.shape != wanted.shape or here.kind != wanted.kind:
        raise ShapeMismatchError(
            f"site {path!r}: the slot's weight is {here.kind} {here.shape}, the adapter's "
            f"{wanted.kind} {wanted.shape}. Load the base model that the adapter was made on."
        )


def _slot_layers(handle: Handle, layers: Mapping[str, Layer]) -> dict[str, SiteLayer]:
    """The layers of a handle, if it is a slot whose factors are on the model."""
    record = handle.record
    if record.merged:
        raise MergedError(f"slot {handle.name!r} is merged. Un-merge it first, with unmerge.")
    if record.parked is not None:
        raise OffloadedError(f"slot {handle.name!r} is offloaded. Call handle.restore() first.")
    found = {}
    for path, layer in layers.items():
        if not isinstance(layer, SiteLayer) or record.trainable or not _is_plain(layer):
            raise ConfigError(
                f"adapter {handle.name!r} is no slot: at {path!r} it is trainable or anchored, or "
                "has a scaling, dropout, DoRA or a bias. Make one with tether.slot."
            )
        if type(layer.A.data) is not Tensor:
            raise ShardedWeightError(
                f"site {path!r}: the slot's factors are a {type(layer.A.data).__name__}, and "
                "cannot be replaced in place. Use a slot on a model that is not sharded."
            )
        found[path] = layer
    return found


def _is_plain(layer: SiteLayer) -> bool:
    special = layer.anchor is not None or layer.dora or layer.biased
    return not special and layer.scaling == 1 and layer.dropout == 0


def _fill(layers: Mapping[str, SiteLayer], factors: Mapping[str, Factors]) -> None:
    for path, layer in layers.items():
        if path in factors:
            layer.A.copy_(factors[path].A)
            layer.B.copy_(factors[path].B)
        else:
            layer.A.zero_()
            layer.B.zero_()


def _check_base(model: nn.Module, adapter: Adapter) -> None:
    for path, expected in adapter.provenance.fingerprints.items():
        if path in adapter.layers:
            module = model.get_submodule(path)
            stored = sites.stored_weight(path, module)
            check_fingerprint(path, _known_print(module, stored), expected)


def _known_print(module: nn.Module, stored: Tensor | Quantized) -> Fingerprint:
    parts = stored.parts.values() if isinstance(stored, Quantized) else (stored,)
    state = tuple((part.data_ptr(), part._version) for part in parts)
    weight = module.weight  # what a quantised one holds may be other objects each time
    assert isinstance(weight, Tensor)
    known = _PRINTS.get(weight)
    if known is None or known[0] != state:
        known = _PRINTS[weight] = (
            state,
            stored.fingerprint() if isinstance(stored, Quantized) else fingerprint_tensor(stored),
        )
    return known[1]
