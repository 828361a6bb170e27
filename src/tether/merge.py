"""merge and unmerge: an adapter's change in the base's weights, because the user asked for it."""

from collections.abc import Iterator

from torch import Tensor, nn

from tether import sites
from tether.errors import (
    ConfigError,
    MergedError,
    OffloadedError,
    TiedWeightError,
    UnsupportedModuleError,
)
from tether.layers import (
    check_dora,
    check_in_place,
    merged_beside,
    records_of,
    rewrite,
    targets,
    withdraw,
)
from tether.start import original
from tether.switch import find
from tether.value import KEPT


def merge(model: nn.Module, name: str) -> None:
    """Put W + w·ΔW of an active adapter in the place of W, so that it costs no time any more.

    The base's own parameters stay beside the merged ones, untouched: memory for the adapted weights
    twice, until `unmerge` puts back the same objects. The adapter stays attached and may be saved;
    `tether.reference`, `only`, `rows` and `handle.disabled` still leave it out, exactly. Several
    adapters may be merged: their changes add, always from the base's own weights. What is written
    into a merged parameter (a state dict loaded, training) is gone after `unmerge`.

    Computed in float32 (float64 where a weight or factor is), rounded once to the weight's dtype.
    All or nothing: on an error the model is as it was.

    Args:
        model: with the adapter attached; unsharded, unquantised weights.
        name: of an adapter that takes part; its weight w is merged with it.

    Raises:
        UnknownNameError: no adapter of that name; the nearest are offered.
        ConfigError: it does not take part now.
        MergedError: it is merged already, or another adapter with DoRA is live on its weights.
        OffloadedError: it is offloaded.
        TiedWeightError: a weight that another module holds too.
        UnsupportedModuleError: a weight that is quantised, or computed from others.
        MetaTensorError, ShardedWeightError: a weight without values here.
        NonFiniteError: a merged weight does not fit its dtype.
    """
    base = original(model)
    (record,) = find(base, (name,))
    check_in_place(base)
    if record.merged:
        raise MergedError(f"adapter {name!r} is merged already.")
    if record.parked is not None:
        raise OffloadedError(
            f"adapter {name!r} is offloaded to {record.parked.path or 'cpu'}. Call "
            f"tether.handles(model)[{name!r}].restore() first."
        )
    if not record.active or record.rows is not None:
        raise ConfigError(
            f"adapter {name!r} does not take part for all rows now. Activate it first: "
            f"tether.activate(model, {name!r})."
        )
    _check_weights(base, name)
    records = records_of(base)
    merged = [other.name for other in records if other.merged or other is record]
    check_dora(base, [o.name for o in records if o.active and o.name not in merged], merged)
    rewrite(base, name, merged)
    record.merged = True


def unmerge(model: nn.Module, name: str) -> None:
    """Undo `merge`: the base's own parameters are back, the same objects, and the adapter is live.

    Where other adapters stay merged into the same weights, those are computed anew without this
    one. All or nothing.

    Args:
        model: with the adapter merged.
        name: of the adapter.

    Raises:
        UnknownNameError: no adapter of that name; the nearest are offered.
        MergedError: it is not merged; or it has DoRA, and another is merged into its weights.
        ShardedWeightError: the model was sharded after merging.
    """
    base = original(model)
    (record,) = find(base, (name,))
    check_in_place(base)
    if not record.merged:
        raise MergedError(f"adapter {name!r} is not merged.")
    check_dora(base, (name,), merged_beside(base, record))
    withdraw(base, record)


def _check_weights(model: nn.Module, name: str) -> None:
    """Every parameter that the adapter changes can be replaced, and is one module's alone."""
    paths = {module: path for path, module in sites.base_modules(model)}
    places = list(_places(paths))
    for owner, parameter in targets(model, name):
        label = f"site {paths[owner]!r}: {parameter}"
        tensor = owner._parameters.get(parameter)
        if tensor is None:
            raise UnsupportedModuleError(
                f"{label} is no parameter of its {type(owner).__name__} but computed from others. "
                "Remove the parametrization, or leave the adapter live."
            )
        sites.check_readable(label, tensor, owner)
        if type(tensor.data) is not Tensor:
            raise UnsupportedModuleError(
                f"{label} is a {type(tensor.data).__name__}, not a plain tensor. Load the base "
                "unquantised, or leave the adapter live."
            )
        here = next(span for holder, n, span in places if (holder, n) == (owner, parameter))
        for holder, other, span in places:
            same = span[0] == here[0] and span[1] < here[2] and here[1] < span[2]
            if same and (holder, other) != (owner, parameter):
                raise TiedWeightError(
                    f"{label} is also {paths[holder]}.{other}: merging would change both. Leave "
                    "the adapter live, or give each its own tensor first."
                )


def _places(
    paths: dict[nn.Module, str],
) -> Iterator[tuple[nn.Module, str, tuple[int, int, int]]]:
    """Where the parameters and buffers of a model lie: (module, name, (storage, start, end))."""
    for module in paths:
        for name, tensor in {**module._buffers, **module._parameters}.items():
            if tensor is None or name.startswith(KEPT) or not tensor.numel():
                continue
            if type(tensor.data) is Tensor and not tensor.is_meta:
                size = tensor.element_size()
                start = tensor.storage_offset() * size
                length = sum(
                    (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
                )
                storage = tensor.untyped_storage().data_ptr()
                yield module, name, (storage, start, start + (length + 1) * size)
