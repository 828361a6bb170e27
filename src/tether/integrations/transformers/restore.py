"""An adapter of a file back into the live one, bit for bit; refused before anything is changed."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tether.errors import (
    BaseMismatchError,
    ConfigError,
    MergedError,
    OffloadedError,
    ShapeMismatchError,
)
from tether.fingerprints import check_fingerprint
from tether.formats import load, native
from tether.handle import Handle
from tether.layers import Anchor, SiteLayer, layers_of
from tether.value import Adapter, Json, LayerAdapter

_ANCHORS = ("A0", "B0")


def put_in_place(handle: Handle, path: Path) -> None:
    """Give a live adapter the values of a native file. No decomposition; parameters stay theirs.

    Args:
        handle: of the adapter on the model.
        path: of the file.

    Raises:
        FormatError: the file is missing or damaged.
        BaseMismatchError: it was made on another base.
        ShapeMismatchError: its sites, or one of their shapes or ranks, are others.
        ConfigError: its settings are others.
        OffloadedError: the live adapter is offloaded.
        MergedError: it is merged. After any error nothing has changed.
    """
    stored = load(path)
    if handle.offloaded:
        raise OffloadedError(f"adapter {handle.name!r} is offloaded. Call handle.restore() first.")
    if handle.merged:
        raise MergedError(
            f"adapter {handle.name!r} is merged into the weights. Call "
            f"tether.unmerge(model, {handle.name!r}) first."
        )
    check_same(handle, stored, path)
    values = dict(_trained(stored))
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            parameter.copy_(values[name])
        for site, layer in layers_of(handle.model)[handle.name].items():
            if isinstance(layer, SiteLayer):
                _place_frozen(site, layer, stored.layers[site])
    handle.record.provenance = stored.provenance


def check_same(handle: Handle, stored: Adapter, path: Path) -> None:
    """Raise unless an adapter is another state of the live one.

    Args:
        handle: of the live adapter.
        stored: the other state.
        path: of its file, for the message.

    Raises:
        BaseMismatchError: it was made on another base.
        ShapeMismatchError: its sites, or one of their shapes or ranks, are others.
        ConfigError: its settings are others.
    """
    live = handle.source().about
    _check_layers(live, stored, path)
    _check_settings(live, stored, path)
    for site, expected in stored.provenance.fingerprints.items():
        here = live.provenance.fingerprints.get(site)
        if here is not None:
            check_fingerprint(site, here, expected)
    _check_wholes(handle, stored, path)


def _check_layers(live: Adapter, stored: Adapter, path: Path) -> None:
    odd = sorted(set(live.layers) ^ set(stored.layers))
    if odd:
        where = "the live adapter" if odd[0] in live.layers else "the file"
        raise ShapeMismatchError(
            f"{path}: site {odd[0]!r} is only in {where}: {len(stored.layers)} sites in the file, "
            f"{len(live.layers)} here. Attach with the settings of the checkpoint."
        )
    for site, layer in live.layers.items():
        here, there = _facts(layer), _facts(stored.layers[site])
        for fact, value in here.items():
            if there[fact] != value:
                raise ShapeMismatchError(
                    f"{path}: site {site!r}: {fact} is {there[fact]} in the file, {value} here. "
                    "Attach with the settings of the checkpoint."
                )


def _facts(layer: LayerAdapter) -> dict[str, object]:
    """What must agree for two layers to be states of one."""
    return {
        "layout": layer.layout,
        "rank": layer.rank,
        "scaling": layer.scaling,
        "dropout": layer.dropout,
        "anchored": layer.anchor is not None,
        "DoRA": layer.magnitude is not None,
        "dtype": layer.dtype,
    }


def _check_settings(live: Adapter, stored: Adapter, path: Path) -> None:
    pairs: list[tuple[str, Json, Json]] = [
        (name, stored.config.get(name), live.config.get(name))
        for name in dict.fromkeys((*live.config, *stored.config))
        if name != "after_save"  # says nothing of the adapter itself
    ]
    pairs.insert(0, ("method", stored.provenance.method, live.provenance.method))
    for name, there, here in pairs:
        if there != here:
            raise ConfigError(
                f"{path}: {name} is {there!r} in the file, {here!r} here. Attach with the "
                "settings of the checkpoint."
            )


def _check_wholes(handle: Handle, stored: Adapter, path: Path) -> None:
    """What is trained whole has its anchor in the base: its values must agree."""
    source = handle.source()
    mine, theirs = (
        {name: value.trainable.shape for name, value in adapter.trained_whole}
        for adapter in (source.about, stored)
    )
    if mine != theirs:
        odd = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))[0]
        raise ShapeMismatchError(
            f"{path}: {odd!r} is trained whole as {theirs.get(odd)} in the file, as "
            f"{mine.get(odd)} here. Attach with the settings of the checkpoint."
        )
    pairs = [(f"{p}.bias", source.bias(p), value) for p, value in stored.biases.items()]
    for p, state in stored.modules.items():
        pairs += [(f"{p}.{name}", source.module(p, name), value) for name, value in state.items()]
    for name, live, value in pairs:
        if live.anchor is None or value.anchor is None:
            continue
        if not torch.equal(live.anchor.to(value.anchor), value.anchor):
            raise BaseMismatchError(
                f"{path}: {name} of the base that the checkpoint was made on has other values "
                "than here. Load the base model of the checkpoint."
            )


def _trained(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """What is trained, under the names of `Handle.named_parameters`."""
    for site, layer in adapter.layers.items():
        for name, tensor in native.layer_tensors(layer).items():
            if name not in _ANCHORS:
                yield f"{site}.{name}", tensor
        if layer.magnitude is not None:
            yield f"{site}.dm", layer.magnitude.trainable
    for path, bias in adapter.biases.items():
        yield f"{path}.db", bias.trainable
    for path, state in adapter.modules.items():
        yield from ((f"{path}.{name}", value.trainable) for name, value in state.items())


def _place_frozen(site: str, layer: SiteLayer, stored: LayerAdapter) -> None:
    """The anchor, and the lengths that DoRA started from."""
    if stored.magnitude is not None and stored.magnitude.anchor is not None:
        layer.m0.copy_(stored.magnitude.anchor)
    if layer.anchor is None or stored.anchor is None or layer.anchor.equals(stored.anchor):
        return
    # A new one: other adapters of the site may hold the old one too.
    old: nn.Module = layer.anchor
    device, dtype = layer.anchor.A0.device, layer.anchor.A0.dtype
    layer.anchor = Anchor(site, stored.anchor, dtype).to(device).train(old.training)
