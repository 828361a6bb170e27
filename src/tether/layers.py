"""The trainable part of one site: a child module of the base module, reached by a forward hook.

The base module stays what it was: its class, its weight, its keys. The hook is one function for
all sites and finds the factors through the module it is called on, so that `copy.deepcopy` and
pickling keep each copy with its own factors.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from tether.linalg import check_finite
from tether.provenance import Provenance
from tether.value import CHILD, Factors, Json, LayerAdapter, Layout


@dataclass(eq=False)
class Record:
    """What the layers of one adapter on one model share.

    Attributes:
        name: of the adapter.
        provenance: where it came from.
        config: the settings it was made with.
        targets: names that select its sites.
        excluded: names to leave out of them.
        trainable: whether its factors are trained.
        order: grows with every adapter attached to the model.
        active: whether its layers take part in the forward pass.
        frozen: base parameters that attaching stopped from training.
        enabled_input_grads: whether attaching switched on the model's input gradients.
    """

    name: str
    provenance: Provenance
    config: dict[str, Json]
    targets: tuple[str, ...]
    excluded: tuple[str, ...]
    trainable: bool
    order: int
    active: bool = True
    frozen: list[nn.Parameter] = field(default_factory=list)
    enabled_input_grads: bool = False


class SiteLayer(nn.Module):
    """One adapter's factors at one site; trains (dA, dB) or, without an anchor, (A, B)."""

    A: Tensor
    B: Tensor
    dA: Tensor
    dB: Tensor
    A0: Tensor
    B0: Tensor

    def __init__(
        self, path: str, layer: LayerAdapter, layout: Layout, record: Record, dtype: torch.dtype
    ) -> None:
        """Copy a layer's factors.

        Args:
            path: of the site.
            layer: the value; copied.
            layout: of the live module.
            record: shared by the adapter's layers.
            dtype: of the factors.
        """
        super().__init__()
        self.path, self.layout, self.record = path, layout, record
        self.scaling, self.dropout = layer.scaling, layer.dropout
        a, b = _copied(path, layer.trainable, dtype)
        self.names = ("A", "B") if layer.anchor is None else ("dA", "dB")
        self.register_parameter(self.names[0], nn.Parameter(a, requires_grad=record.trainable))
        self.register_parameter(self.names[1], nn.Parameter(b, requires_grad=record.trainable))
        if layer.anchor is not None:
            anchor_a, anchor_b = _copied(path, layer.anchor, dtype)
            self.register_buffer("A0", anchor_a)
            self.register_buffer("B0", anchor_b)

    def value(self) -> LayerAdapter:
        """The layer now, as a value: float32 (or float64) copies on the CPU.

        Returns:
            a layer that shares nothing with the model.
        """
        trainable = _to_value(getattr(self, self.names[0]), getattr(self, self.names[1]))
        anchor = None if self.names[0] == "A" else _to_value(self.A0, self.B0)
        return LayerAdapter(trainable, anchor, self.scaling, self.layout, self.dropout)

    def forward(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The base's output with this adapter's change added.

        Args:
            module: the base module.
            x: its input.
            output: its output so far.

        Returns:
            output + s·(B0·(dA·x) + dB·((A0 + dA)·x)), rounded once to the output's dtype.
        """
        if self.layout.kind != "embedding":
            x = functional.dropout(x, self.dropout, self.training) if self.dropout else x
        if self.names[0] == "A":
            change = self._up(module, self._down(module, x, self.A), self.B)
        else:
            moved = self._down(module, x, self.dA)
            # B·(dA·x) + dB·(A0·x) with B = B0 + dB, regrouped: no sum of a large and a small
            # *weight*, in which half precision would lose a small displacement.
            change = self._up(module, moved, self.B0)
            change = change + self._up(module, moved + self._down(module, x, self.A0), self.dB)
        # A change of zero leaves every bit of the base's output: `change` is the negative, so it
        # is subtracted, and + 0.0 makes its zeros positive: −0.0 − 0.0 is −0.0.
        return (output - (change + 0.0)).to(output.dtype)

    def _down(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        """A·x."""
        match self.layout.kind:
            case "embedding":
                return functional.embedding(x, a.T, module.padding_idx)  # type: ignore[arg-type]
            case "conv":
                kernel = a.view(a.shape[0], *self.layout.shape[1:])
                result: Tensor = module._conv_forward(x.to(a.dtype), kernel, None)  # type: ignore[operator]
                return result
        return functional.linear(x.to(a.dtype), a)

    def _up(self, module: nn.Module, hidden: Tensor, b: Tensor) -> Tensor:
        """−s·B·hidden."""
        hidden = hidden * -self.scaling
        if self.layout.kind == "conv":
            spatial = len(self.layout.shape) - 2
            convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[spatial - 1]
            return convolve(hidden, b.view(*b.shape, *[1] * spatial))
        change = functional.linear(hidden, b)
        if self.layout.kind == "embedding":
            scale = getattr(module, "embed_scale", None)  # Gemma and others scale the lookup
            return change if scale is None else change * scale
        return change


class SiteAdapters(nn.ModuleDict):
    """All adapters at one site, by name."""


def apply_adapters(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
) -> Tensor:
    """The forward hook of every site.

    Args:
        module: the base module.
        args: its positional inputs.
        kwargs: its named inputs.
        output: its output.

    Returns:
        the output with every active adapter's change; the output itself if none is active.
    """
    x = args[0] if args else next(iter(kwargs.values()))
    for layer in getattr(module, CHILD).values():
        if layer.record.active:
            output = layer(module, x, output)
    return output


def hang(module: nn.Module, name: str, layer: SiteLayer) -> None:
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


def layers_of(model: nn.Module) -> dict[str, dict[str, SiteLayer]]:
    """The adapters that hang on a model, found on the model itself.

    Args:
        model: any module.

    Returns:
        adapter name -> site path -> layer, in the order of attaching.
    """
    found: dict[str, dict[str, SiteLayer]] = {}
    for module in model.modules():
        for name, layer in module.items() if isinstance(module, SiteAdapters) else ():
            assert isinstance(layer, SiteLayer)
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


def _copied(path: str, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Contiguous copies: FSDP2 shards only contiguous parameters."""
    contiguous = torch.contiguous_format
    a = factors.A.detach().to(dtype, copy=True, memory_format=contiguous)
    b = factors.B.detach().to(dtype, copy=True, memory_format=contiguous)
    for name, factor in (("A", a), ("B", b)):
        check_finite(factor, f"site {path!r}: factor {name} in {dtype}")
    return a, b


def _to_value(a: Tensor, b: Tensor) -> Factors:
    wide = torch.promote_types(a.dtype, torch.float32)
    return Factors(_whole(a).to("cpu", wide, copy=True), _whole(b).to("cpu", wide, copy=True))


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 may have sharded."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    return whole.detach()
