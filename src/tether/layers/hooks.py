"""The forward hook, and putting layers on modules and taking them off."""

from torch import Tensor, nn

from tether.errors import ConfigError, RowsError
from tether.layers.record import Layer, Record, Rows
from tether.layers.site import SiteLayer
from tether.layers.whole import ModuleLayer
from tether.value import CHILD


class SiteAdapters(nn.ModuleDict):
    """All adapters at one module, by name."""

    def forward(self, x: Tensor) -> Tensor:
        """Do nothing: a Sequential calls all its children, of which this may be one.

        Args:
            x: any.

        Returns:
            the same.
        """
        return x


def apply_adapters(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
) -> Tensor:
    """The forward hook of every module that carries adapters.

    Args:
        module: the base module.
        args: its positional inputs.
        kwargs: its named inputs.
        output: its output.

    Returns:
        the output with every active adapter's change; the output itself if none is active.
    """
    base = output
    for layer in getattr(module, CHILD).values():
        if layer.record.active and not layer.record.merged:
            rows = layer.record.rows
            if rows is None:
                if isinstance(layer, ModuleLayer) and output is not base:
                    raise ConfigError(
                        f"module {layer.path!r} is trained whole by adapter {layer.record.name!r}, "
                        "and would replace what another active adapter changes there. Let one of "
                        "them take part at a time, with tether.activate or tether.only."
                    )
                output = _apply(layer, module, args, kwargs, output, base)
            else:
                output = _apply_to_rows(layer, module, args, kwargs, output, base, rows)
    return output


def _apply(
    layer: nn.Module,
    module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    output: Tensor,
    base: Tensor,
) -> Tensor:
    result: Tensor
    if isinstance(layer, SiteLayer):
        x = args[0] if args else next(iter(kwargs.values()))
        result = layer(module, x, output, base)
    elif isinstance(layer, ModuleLayer):
        result = layer(module, args, kwargs)
    else:
        result = layer(module, output)
    return result


def _apply_to_rows(
    layer: Layer,
    module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    output: Tensor,
    base: Tensor,
    rows: Rows,
) -> Tensor:
    """Apply a layer to some rows; the others keep every bit."""
    inputs = [*args, *kwargs.values()]
    if isinstance(layer, ModuleLayer) and len(inputs) != 1:
        raise RowsError(
            f"module {layer.path!r}: {len(inputs)} inputs; rows can be told apart in one only. Run "
            "the adapters one after the other, with tether.only."
        )
    # The input too: a table of positions may be looked up once for all rows of the batch.
    for tensor in (inputs[0], output):
        here = tensor.shape[0] if isinstance(tensor, Tensor) and tensor.dim() else 0
        if here != rows.total:
            raise RowsError(
                f"site {layer.path!r}: {here} rows here, {rows.total} names given to tether.rows. "
                "Give one name per row. Where generation expands the batch (num_beams, "
                "num_return_sequences), repeat every name as often. Where the module runs once "
                "for all rows, like a table of positions, pass an input for each row "
                "(position_ids). Or run the adapters one after the other, with tether.only."
            )
    index = rows.index.to(output.device)
    if not len(index):
        return output
    changed = _apply(layer, module, (inputs[0][index],), {}, output[index], base[index])
    return output.index_copy(0, index, changed)


def hang(module: nn.Module, name: str, layer: Layer) -> None:
    """Put a layer on its base module.

    Args:
        module: the base module.
        name: of the adapter.
        layer: its factors, on the module's device.
    """
    if getattr(module, CHILD, None) is None:
        module.add_module(CHILD, SiteAdapters())
        module.register_forward_hook(apply_adapters, with_kwargs=True)
    adapters = getattr(module, CHILD)
    adapters[name] = layer
    if isinstance(layer, ModuleLayer):
        layer.bind(module)
    adapters.train(module.training)


def take_off(module: nn.Module, name: str) -> None:
    """Take a layer off its base module, and the hook with the last one.

    Args:
        module: the base module.
        name: of the adapter.
    """
    adapters = getattr(module, CHILD)
    del adapters[name]
    if len(adapters):
        return
    delattr(module, CHILD)
    for key, hook in list(module._forward_hooks.items()):
        if hook is apply_adapters:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


def layers_of(model: nn.Module) -> dict[str, dict[str, Layer]]:
    """The adapters that hang on a model, found on the model itself.

    Args:
        model: any module.

    Returns:
        adapter name -> module path -> layer, in the order of attaching.
    """
    found: dict[str, dict[str, Layer]] = {}
    for module in model.modules():
        for name, layer in module.items() if isinstance(module, SiteAdapters) else ():
            assert isinstance(layer, Layer)
            found.setdefault(name, {})[layer.path] = layer
    return dict(sorted(found.items(), key=lambda item: next(iter(item[1].values())).record.order))


def records_of(model: nn.Module) -> list[Record]:
    """The records of the adapters that hang on a model.

    Args:
        model: any module.

    Returns:
        in the order of attaching.
    """
    return [next(iter(layers.values())).record for layers in layers_of(model).values()]


def carriers(model: nn.Module, name: str) -> list[nn.Module]:
    """The base modules that carry an adapter, whatever wrapper lies around them.

    Args:
        model: any module.
        name: of the adapter.

    Returns:
        modules, in the model's order.
    """
    adapters = ((module, module._modules.get(CHILD)) for module in model.modules())
    return [
        module for module, child in adapters if isinstance(child, SiteAdapters) and name in child
    ]
