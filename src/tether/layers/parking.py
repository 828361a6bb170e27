"""Moving an adapter's tensors off the model and back. The tensors stay the same objects.

A parked tensor is empty where it was: same object, dtype and device, so that an optimizer's
parameters and a model moved meanwhile stay right. Its values lie beside it in CPU memory, or in a
file; its gradient lies in CPU memory.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from tether.layers.record import Holder, Layer
from tether.layers.site import Anchor, SiteLayer
from tether.layers.whole import ModuleLayer
from tether.value import CHILD, Adapter

_BUDGET = "_tether_budget"  # the attribute of a model that has one


class Budget(Protocol):
    """What keeps a model's adapters within a number of bytes."""

    def bring(self, model: nn.Module, name: str) -> None:
        """Put an adapter back that this budget offloaded.

        Args:
            model: that carries it.
            name: of the adapter.
        """

    def keep(self, model: nn.Module) -> list[str]:
        """Offload what exceeds the budget.

        Args:
            model: with adapters.

        Returns:
            names of the adapters offloaded.
        """


def set_budget(model: nn.Module, budget: Budget | None) -> None:
    """Put a budget on a model, in the place of any other in it.

    Args:
        model: any module.
        budget: None for none.
    """
    for module, _ in budgets_of(model):
        delattr(module, _BUDGET)
    if budget is not None:
        setattr(model, _BUDGET, budget)


def budgets_of(model: nn.Module) -> list[tuple[nn.Module, Budget]]:
    """The budgets on a model or in it, found on the modules themselves: copies have their own.

    Args:
        model: any module.

    Returns:
        (the module that a budget is for, the budget).
    """
    return [(m, vars(m)[_BUDGET]) for m in model.modules() if _BUDGET in vars(m)]


def park(holders: Iterable[tuple[Holder, bool]]) -> None:
    """Move tensors off the model: all of them, or none on an error.

    Args:
        holders: (module, whether to keep its values in CPU memory). Gradients are always kept.
    """
    plan = []
    for holder, keep in holders:
        own = holder.own()
        values = {name: tensor.detach().to("cpu") for name, tensor in own.items()} if keep else {}
        gradients = {
            name: tensor.grad.detach().to("cpu")
            for name, tensor in own.items()
            if tensor.grad is not None
        }
        plan.append((holder, values, gradients))
    for holder, values, gradients in plan:
        holder.parked, holder.gradients, holder.away = values, gradients, True
        for tensor in holder.own().values():
            tensor.grad = None
            tensor.data = tensor.data.new_empty(0)


def bring_back(layers: Iterable[Layer], adapter: Adapter | None) -> None:
    """Put values and gradients where they were: all of them, or none on an error.

    Args:
        layers: of one adapter; their anchors come too.
        adapter: the values that are not in CPU memory, in a dtype that holds them exactly; None
            where all are.
    """
    plan: list[tuple[Tensor, Tensor, Tensor | None]] = []
    found = []
    for layer in layers:
        stored = {} if adapter is None else _stored(layer, adapter)
        for holder in filter(lambda holder: holder.away, _holders(layer)):
            found.append(holder)
            for name, tensor in holder.own().items():
                value = (holder.parked or stored)[name]
                # The device and dtype of now: the model may have been moved meanwhile.
                gradient = holder.gradients.get(name)
                plan.append((tensor, value.to(tensor), None if gradient is None else gradient))
    for tensor, value, gradient in plan:
        tensor.data = value
        if gradient is not None:
            tensor.grad = gradient.to(tensor)
    for holder in found:
        holder.away, holder.parked, holder.gradients = False, {}, {}


def share_anchors(modules: Iterable[nn.Module], name: str) -> None:
    """Hold an adapter's anchors once with those of adapters attached while it was away.

    Args:
        modules: that carry the adapter.
        name: of the adapter.
    """
    for module in modules:
        layers = list(getattr(module, CHILD).values())
        mine = getattr(getattr(module, CHILD)[name], "anchor", None)
        for other in (getattr(layer, "anchor", None) for layer in layers):
            if mine is None or not isinstance(other, Anchor) or other is mine or other.away:
                continue
            if _equal(mine, other):
                for layer in layers:
                    if getattr(layer, "anchor", None) is mine:
                        layer.anchor = other
                break


def _equal(one: Anchor, other: Anchor) -> bool:
    pairs = ((one.A0, other.A0), (one.B0, other.B0))
    return all(
        (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and torch.equal(a, b)
        for a, b in pairs
    )


def _holders(layer: Layer) -> Iterator[Holder]:
    yield layer
    if isinstance(layer, SiteLayer) and layer.anchor is not None:
        yield layer.anchor


def _stored(layer: Layer, adapter: Adapter) -> dict[str, Tensor]:
    """A layer's tensors, and its anchor's, by their live names, from a value."""
    if isinstance(layer, ModuleLayer):
        state = adapter.modules[layer.path]
        names = zip(layer.keys, layer.own(), strict=True)
        return {name: state[key].trainable for key, name in names}
    tensors: dict[str, Tensor | None] = {}
    if isinstance(layer, SiteLayer):
        site = adapter.layers[layer.path]
        tensors |= zip(layer.names, (site.trainable.A, site.trainable.B), strict=True)
        if site.anchor is not None:
            tensors |= {"A0": site.anchor.A, "B0": site.anchor.B}
        if site.magnitude is not None:
            tensors |= {"dm": site.magnitude.trainable, "m0": site.magnitude.anchor}
    if (bias := adapter.biases.get(layer.path)) is not None:
        tensors |= {"db": bias.trainable, "b0": bias.anchor}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
