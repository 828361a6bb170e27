"""attach: put an adapter on a model. The base is never written."""

import re
from collections.abc import Mapping

import torch
from torch import nn

from tether import freeze, sites
from tether.config import LoraConfig
from tether.errors import (
    ConfigError,
    NameTakenError,
    ShapeMismatchError,
    UnknownNameError,
    UnsupportedModuleError,
    nearest,
)
from tether.fingerprints import check_fingerprint
from tether.handle import Handle
from tether.layers import (
    Record,
    SiteAdapters,
    SiteLayer,
    carriers,
    hang,
    layers_of,
    records_of,
    take_off,
)
from tether.start import init, original
from tether.value import CHILD, Adapter, Layout

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
        model: any module; floating-point weights at the sites. Not yet sharded (FSDP).
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
        ConfigError: a bad name or dtype, or a configuration that does not fit the model.
    """
    _check_arguments(model, name, dtype)
    base = original(model)
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
    layers = {}
    for path, (module, layout) in modules.items():
        device = sites.base_weight(path, module).device
        layers[path] = SiteLayer(path, value.layers[path], layout, record, dtype).to(device)
    try:
        for path, layer in layers.items():
            hang(modules[path][0], name, layer)
        if trainable:
            freeze.freeze(base, record)
    except BaseException:
        for module in carriers(base, name):
            take_off(module, name)
        freeze.unfreeze(record)
        raise
    freeze.reset_compiler()
    return Handle(model, name, layers)


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
    if path not in modules:
        raise UnknownNameError(
            f"the adapter changes {path!r}, which the model does not have. {nearest(path, modules)}"
        )
    layout = sites.layout_of(path, modules[path])
    here, wanted = (layout.out_features, layout.in_features), value.layers[path].trainable.shape
    if here != wanted:
        raise ShapeMismatchError(
            f"site {path!r}: the weight here is {here}, the adapter changes one of {wanted}. "
            "Load the base model that the adapter was made on."
        )
    part = modules[path]._modules.get(CHILD)
    if part is not None and not isinstance(part, SiteAdapters):
        raise UnsupportedModuleError(
            f"site {path!r}: {type(modules[path]).__name__} has a part of its own named {CHILD!r}, "
            "where adapters would hang. Exclude it, or rename the part."
        )
    weight = sites.base_weight(path, modules[path])
    expected = value.provenance.fingerprints.get(path)
    if verify and expected is not None:
        check_fingerprint(path, weight, expected)
    return modules[path], layout
