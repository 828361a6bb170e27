"""attach: put an adapter on a model. The base is never written."""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from tether import freeze, quantized, sites, whole
from tether.config import LoraConfig
from tether.errors import (
    ConfigError,
    NameTakenError,
    ShapeMismatchError,
    UnknownNameError,
    UnsupportedModuleError,
    nearest,
)
from tether.handle import Handle
from tether.layers import (
    Anchor,
    BiasLayer,
    Layer,
    ModuleLayer,
    Record,
    SiteAdapters,
    SiteLayer,
    carriers,
    hang,
    layers_of,
    records_of,
    take_off,
)
from tether.ranks import check_unwrapped
from tether.start import init, original
from tether.switch import check_together, settle
from tether.value import CHILD, Adapter, LayerAdapter, Layout, Trained

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attach(
    model: nn.Module,
    adapter: Adapter | LoraConfig | None = None,
    name: str = "default",
    trainable: bool = True,
    *,
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
) -> Handle:
    """Put an adapter on a model. The base's tensors are only read.

    The output is y = W·x + s·(B·(dA·x) + dB·(A0·x)): at the start, bit for bit the base's. With
    `trainable`, the base's own parameters stop requiring gradients until the last adapter is
    detached. All or nothing: on an error the model is as it was.

    Re-entrant activation checkpointing needs a model input that requires gradients. Where it is on
    already this is arranged; where you switch it on later, call the model's
    `enable_input_require_grads()` too.

    Args:
        model: any module; its weights at the sites floating point, or quantised by bitsandbytes
            (nf4, fp4, int8) or torchao (int8). Not yet sharded (FSDP) or in
            DistributedDataParallel: attach first, then wrap.
        adapter: a value, copied; or a configuration, from which one is made; None for PiSSA.
        name: letters, digits, "_" and "-"; by it the adapter is found again.
        trainable: whether its factors require gradients.
        dtype: of the factors; float32 keeps small updates whatever the base's dtype is.
        verify: check the fingerprint of every adapted base weight against the adapter's.

    Returns:
        the handle.

    Raises:
        BaseMismatchError: a base weight is not the one the adapter was made on.
        ShapeMismatchError: a site has another shape.
        UnknownNameError: a site that the model does not have.
        NameTakenError: an adapter of that name is attached.
        ConfigError: a bad name or dtype, a configuration that does not fit the model, or an active
            adapter that would replace its change.
        MergedError: an adapter is merged into the model.
        DistributedError: the model is in DistributedDataParallel already.
        ShardedWeightError: it is sharded already.
    """
    _check_arguments(model, name, dtype)
    base = original(model)
    sites.check_unmerged(base)
    check_unwrapped(base)
    if isinstance(adapter, Adapter):
        value = adapter
    else:
        value, verify = init(base, adapter), False
    order = 1 + max((record.order for record in records_of(base)), default=-1)
    record = Record(
        name=name,
        provenance=value.provenance,
        config=dict(value.config),
        targets=value.targets,
        excluded=value.excluded,
        trainable=trainable,
        order=order,
    )
    named = dict(base.named_modules())
    modules = {path: _find(named, path, value, verify) for path in value.layers}
    layers = _make_layers(value, modules, named, record, dtype, verify)
    others = {other.name for other in records_of(base) if other.active}
    check_together({n: o for n, o in layers_of(base).items() if n in others} | {name: layers})
    try:
        for path, layer in layers.items():
            hang(named[path], name, layer)
        if trainable:
            freeze.freeze(base, record)
    except BaseException:
        for module in carriers(base, name):
            take_off(module, name)
        freeze.unfreeze(record)
        raise
    freeze.reset_compiler()
    settle(base)
    return Handle(model, name, layers)


def _make_layers(
    value: Adapter,
    modules: Mapping[str, tuple[nn.Module, Layout]],
    named: Mapping[str, nn.Module],
    record: Record,
    dtype: torch.dtype,
    verify: bool,
) -> dict[str, Layer]:
    """Every live part of the adapter, made but not yet on the model."""
    biases = {
        path: _bind(named, path, {"bias": bias}, verify)["bias"]
        for path, bias in value.biases.items()
    }
    layers: dict[str, Layer] = {}
    for path, (module, layout) in modules.items():
        factors = _measured(path, value.layers[path], module, layout)
        anchor = _shared_anchor(module, factors, dtype)
        layers[path] = SiteLayer(path, factors, layout, record, dtype, anchor, biases.get(path))
    for path, bias in biases.items():
        if path not in layers:
            layers[path] = BiasLayer(path, bias, record, dtype)
    for path, state in value.modules.items():
        twice = next((p for p in layers if f"{p}.".startswith(f"{path}.")), None)
        if twice is not None:
            raise ShapeMismatchError(f"module {path!r} is trained whole, and {twice!r} by itself.")
        layers[path] = ModuleLayer(path, _bind(named, path, state, verify), record, dtype)
    for path, layer in layers.items():
        layer.to(next(named[path].parameters()).device)
    return layers


def _measured(path: str, layer: LayerAdapter, module: nn.Module, layout: Layout) -> LayerAdapter:
    """A layer whose DoRA magnitude has its anchor; files of other libraries hold only the sum."""
    if layer.magnitude is None:
        return layer
    weight = quantized.dense(sites.stored_weight(path, module))
    start = whole.row_lengths(layout.matrix(weight))
    # The weight itself has been checked; lengths summed in another order differ in the last bit.
    magnitude = whole.bind(f"{path}: magnitude", layer.magnitude, start, verify=False)
    return replace(layer, magnitude=magnitude)


def _shared_anchor(module: nn.Module, layer: LayerAdapter, dtype: torch.dtype) -> Anchor | None:
    """The anchor of another adapter of this module, if it is the same one."""
    if layer.anchor is None:
        return None
    for other in (module._modules.get(CHILD) or {}).values():  # type: ignore[operator]
        anchor = getattr(other, "anchor", None)
        if isinstance(anchor, Anchor) and anchor.A0.dtype == dtype and anchor.equals(layer.anchor):
            return anchor
    return None


def _bind(
    named: Mapping[str, nn.Module], path: str, state: Mapping[str, Trained], verify: bool
) -> dict[str, Trained]:
    """Parameters trained whole, against the base's own."""
    _check_known(path, named)
    own = dict(named[path].named_parameters())
    for name in state:
        if name not in own:
            raise UnknownNameError(
                f"the adapter changes {path}.{name}, which the model does not have. "
                f"{nearest(name, own)}"
            )
    bound = {}
    for name, value in state.items():
        label = f"{path}.{name}"
        bound[name] = whole.bind(label, value, whole.start(label, own[name]), verify)
    return bound


def _check_known(path: str, modules: Mapping[str, nn.Module]) -> None:
    if path not in modules:
        raise UnknownNameError(
            f"the adapter changes {path!r}, which the model does not have. {nearest(path, modules)}"
        )
    part = modules[path]._modules.get(CHILD)
    if part is not None and not isinstance(part, SiteAdapters):
        raise UnsupportedModuleError(
            f"site {path!r}: {type(modules[path]).__name__} has a part of its own named {CHILD!r}, "
            "where adapters would hang. Exclude it, or rename the part."
        )


def _check_arguments(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", name):
        raise ConfigError(f"name {name!r} must be letters, digits, '_' and '-'.")
    if hasattr(SiteAdapters(), name):
        raise ConfigError(f"name {name!r} is an attribute of torch modules. Choose another.")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype} is none of {', '.join(map(str, _DTYPES))}.")
    if name in layers_of(model):
        raise NameTakenError(
            f"the model already has an adapter {name!r}. Choose another name, or detach it first: "
            f"tether.handles(model)[{name!r}].detach()."
        )


def _find(
    modules: Mapping[str, nn.Module], path: str, value: Adapter, verify: bool
) -> tuple[nn.Module, Layout]:
    """The module of one site, checked against the adapter."""
    _check_known(path, modules)
    layout = sites.layout_of(path, modules[path])
    here, wanted = (layout.out_features, layout.in_features), value.layers[path].trainable.shape
    if here != wanted:
        raise ShapeMismatchError(
            f"site {path!r}: the weight here is {here}, the adapter changes one of {wanted}. "
            "Load the base model that the adapter was made on."
        )
    weight = sites.stored_weight(path, modules[path])
    expected = value.provenance.fingerprints.get(path)
    if verify and expected is not None:
        quantized.check(path, weight, expected)
    return modules[path], layout
