"""Merged weights: W + ΔW in the place of W, which stays beside it, untouched.

The base's own parameter becomes a buffer of its module while a merged one is in its place: there it
follows the model to another device or dtype and into a deep copy, outside the state dict.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tether.errors import MergedError, ShardedWeightError
from tether.layers.dora import stretch
from tether.layers.hooks import carriers, records_of
from tether.layers.record import Layer, Record
from tether.layers.site import SiteLayer
from tether.layers.whole import ModuleLayer
from tether.linalg import check_finite
from tether.value import CHILD, KEPT

Target = tuple[nn.Module, str]  # a module of the base and the name of one of its own parameters
Change = Callable[[Tensor], Tensor]  # the parameter, in the precision to compute in -> −its change
_BESIDE = "_tether_beside"  # the attribute of a parameter in place: the one that is kept


@contextmanager
def originals(model: nn.Module) -> Iterator[None]:
    """The base's own parameters within the block; the merged adapters are live ones there.

    Args:
        model: with or without merged adapters.

    Yields:
        nothing; the merged parameters are put back afterwards.
    """
    merged = [record for record in records_of(model) if record.merged]
    if not merged:
        yield
        return
    places = kept(model)
    for owner, name in places:
        _check_local(owner, name)
    for owner, name in places:
        _exchange(owner, name)
    for record in merged:
        record.merged = False
    try:
        yield
    finally:
        for owner, name in places:
            _exchange(owner, name)
        for record in merged:
            record.merged = True


def check_in_place(model: nn.Module) -> None:
    """Raise within a block that leaves merged adapters out.

    Args:
        model: any module.

    Raises:
        MergedError: the merged weights will be put back at the end of such a block.
    """
    if kept(model) and not any(record.merged for record in records_of(model)):
        raise MergedError(
            "in this block (tether.only, reference, rows or disabled) merged weights are left out "
            "for a while; adapters can be neither merged, un-merged nor detached in it. Do so "
            "outside of the block."
        )


def kept(model: nn.Module) -> list[Target]:
    """The parameters of a model whose own tensor is kept beside a merged one.

    Args:
        model: any module.

    Returns:
        in the model's order.
    """
    return [
        (module, name.removeprefix(KEPT))
        for module in model.modules()
        for name in module._buffers
        if name.startswith(KEPT)
    ]


def targets(model: nn.Module, name: str) -> dict[Target, Change]:
    """The parameters of the base that an adapter changes, and how.

    Args:
        model: that carries it.
        name: of the adapter.

    Returns:
        (module, parameter's name) -> what gives the change.
    """
    found: dict[Target, Change] = {}
    for module in carriers(model, name):
        found |= _targets_of(getattr(module, CHILD)[name], module)
    return found


def own(owner: nn.Module, name: str) -> Tensor:
    """The base's own parameter, whether or not a merged one is in its place.

    Args:
        owner: the module that holds it.
        name: of the parameter.

    Returns:
        its values, not a copy.
    """
    tensor = owner._buffers.get(KEPT + name)
    return owner.get_parameter(name).detach() if tensor is None else tensor.detach()


@torch.no_grad()
def rewrite(model: nn.Module, name: str, merged: Sequence[str]) -> None:
    """Write the parameters that one adapter changes anew: W + Σ ΔW of all merged adapters.

    Always from the base's own parameters, in float32 (float64 where a weight or factor is), rounded
    once. All or nothing.

    Args:
        model: that carries the adapters.
        name: of the adapter that is merged or un-merged.
        merged: names of the adapters that are merged from now on, in the order of attaching.

    Raises:
        NonFiniteError: a merged weight does not fit its dtype.
        ShardedWeightError: FSDP sharded the model meanwhile.
    """
    changes = {other: targets(model, other) for other in {*merged, name}}
    plan: list[tuple[nn.Module, str, Tensor | None]] = []
    for owner, parameter in changes[name]:
        _check_local(owner, parameter)
        mine = [changes[other].get((owner, parameter)) for other in merged]
        here = [change for change in mine if change is not None]
        tensor = _sum(owner, parameter, here) if here else None
        plan.append((owner, parameter, tensor))
    for owner, parameter, tensor in plan:
        _put(owner, parameter, tensor)


def withdraw(model: nn.Module, record: Record) -> None:
    """Take a merged adapter's change out of the weights again; it is live afterwards.

    Args:
        model: that carries it.
        record: of the adapter, merged.
    """
    rewrite(model, record.name, merged_beside(model, record))
    record.merged = False


def merged_beside(model: nn.Module, record: Record) -> list[str]:
    """The other adapters that are merged.

    Args:
        model: with the adapters.
        record: of the one.

    Returns:
        their names, in the order of attaching.
    """
    return [other.name for other in records_of(model) if other.merged and other is not record]


def check_dora(model: nn.Module, live: Sequence[str], merged: Sequence[str]) -> None:
    """Raise if a live adapter with DoRA sits on a merged weight: it needs the lengths of W's rows.

    Args:
        model: with the adapters.
        live: names of the adapters that will be live.
        merged: names of the adapters that will be merged.

    Raises:
        MergedError: naming the site and both.
    """
    written = {target: name for name in merged for target in targets(model, name)}
    for name in live:
        for module in carriers(model, name):
            layer = getattr(module, CHILD)[name]
            other = written.get((module, "weight"))
            if other is not None and isinstance(layer, SiteLayer) and layer.dora:
                raise MergedError(
                    f"site {layer.path!r}: adapter {name!r} has DoRA, and cannot be live while "
                    f"{other!r} is merged into the same weight. Merge {name!r} first and un-merge "
                    "it last, or do not merge."
                )


def _targets_of(layer: Layer, module: nn.Module) -> Iterator[tuple[Target, Change]]:
    if isinstance(layer, ModuleLayer):
        for path, moved in layer.trained():
            parent, _, name = path.rpartition(".")
            yield (module.get_submodule(parent), name), _constant(moved, layer)
        return
    if isinstance(layer, SiteLayer):
        yield (module, "weight"), _weight_change(layer)
    db = layer._parameters.get("db")
    if db is not None:
        yield (module, "bias"), _constant(db, layer)


def _constant(moved: Tensor, layer: Layer) -> Change:
    return lambda _: -layer.record.weight * moved


def _weight_change(layer: SiteLayer) -> Change:
    def change(start: Tensor) -> Tensor:
        wide = torch.promote_types(start.dtype, getattr(layer, layer.names[0]).dtype)
        left, right = layer.plain(wide)
        result = -layer.scaling * (left @ right)
        if layer.dora:
            # g·(W + ΔW) − W = (g − 1)·W + g·ΔW, as its negative.
            excess = stretch(layer, start).to(wide)[:, None]
            result = (1 + excess) * result - excess * layer.layout.matrix(start)
        return layer.layout.stored(layer.record.weight * result)

    return change


def _sum(owner: nn.Module, name: str, changes: Sequence[Change]) -> Tensor:
    start = own(owner, name)
    # Autocast would multiply in half precision.
    with torch.autocast(start.device.type, enabled=False):
        wide = start.to(torch.promote_types(start.dtype, torch.float32))
        total = sum((change(wide) for change in changes[1:]), changes[0](wide))
    # Strides as the base's; the sign of zeros as in SiteLayer.forward: a change of zero leaves
    # every bit.
    result = torch.empty_like(start).copy_(wide - (total + 0.0))
    check_finite(result, f"merged {name} {tuple(result.shape)} in {result.dtype}")
    return result


def _put(owner: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Put a merged tensor in a parameter's place, or the base's own parameter back."""
    if KEPT + name in owner._buffers:
        origin = _beside(owner, name)
        delattr(owner, KEPT + name)
        setattr(owner, name, origin)
    if tensor is not None:
        origin = owner.get_parameter(name)
        merged = nn.Parameter(tensor, requires_grad=origin.requires_grad)
        setattr(merged, _BESIDE, origin)
        owner.register_buffer(KEPT + name, origin, persistent=False)
        setattr(owner, name, merged)


def _exchange(owner: nn.Module, name: str) -> None:
    """Let a parameter and the one kept beside it change places.

    The objects, not their data: what autograd has saved keeps the values that it was computed with.
    """
    current, other = owner.get_parameter(name), _beside(owner, name)
    current.__dict__.pop(_BESIDE, None)
    setattr(other, _BESIDE, current)
    owner._buffers[KEPT + name] = current
    setattr(owner, name, other)


def _beside(owner: nn.Module, name: str) -> nn.Parameter:
    """The parameter that is kept: the same object, also after the model was moved."""
    tensor = owner._buffers[KEPT + name]
    assert tensor is not None
    if isinstance(tensor, nn.Parameter):
        return tensor
    # Moving a model makes new tensors of its buffers, which this one is for the time being.
    current = owner.get_parameter(name)
    other = getattr(current, _BESIDE, None)
    if not isinstance(other, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=current.requires_grad)
    other.data = tensor
    return other


def _check_local(owner: nn.Module, name: str) -> None:
    parameter = owner.get_parameter(name)
    if any(cls.__name__ == "DTensor" for cls in type(parameter).__mro__):
        raise ShardedWeightError(
            f"{name} {tuple(parameter.shape)} of a {type(owner).__name__} is a DTensor: an adapter "
            "was merged before fully_shard, and cannot be left out or un-merged now. Un-merge "
            "first, then shard the model."
        )
