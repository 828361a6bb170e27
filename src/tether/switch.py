"""Which adapters take part in the forward pass, and evaluating without leaving a trace."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from math import isfinite

import torch
from torch import nn

from tether.errors import (
    ConfigError,
    MergedError,
    OffloadedError,
    UnknownNameError,
    nearest,
)
from tether.layers import (
    Layer,
    ModuleLayer,
    Record,
    Rows,
    budgets_of,
    check_in_place,
    layers_of,
    originals,
    records_of,
)


@dataclass(frozen=True, slots=True)
class Share:
    """How much of an adapter takes part where it is active.

    Attributes:
        weight: by which its change is multiplied.
        rows: of the batch in which it takes part; None for all.
    """

    weight: float = 1.0
    rows: Rows | None = None


def activate(model: nn.Module, *names: str, weights: Sequence[float] | None = None) -> None:
    """Let the named adapters take part in the forward pass from now on, and no others.

    Their changes are added: y = W·x + Σ wᵢ·ΔWᵢ·x. A compiled model compiles anew for weights that
    it has not seen.

    Args:
        model: with adapters attached.
        *names: of the adapters; none for the base alone, bit for bit.
        weights: one finite number for each name; None for 1, which leaves an adapter as it is.

    Raises:
        UnknownNameError: no adapter of that name; the nearest are offered.
        ConfigError: a name twice, weights that do not fit, or two adapters that would replace each
            other's change.
        MergedError: an adapter is merged into the weights.
        OffloadedError: the adapter is offloaded.
    """
    chosen = _chosen(model, names, weights)
    records = records_of(model)
    check_in_place(model)
    for record in records:
        if record.merged:
            raise MergedError(
                f"adapter {record.name!r} is merged into the weights and takes part until it is "
                f"un-merged: tether.unmerge(model, {record.name!r}). For a block use tether.only."
            )
    wake(model, (record for record in records if record.name in chosen))
    switch(model, {record: record.name in chosen for record in records})
    for record in records:
        record.weight, record.rows = chosen.get(record.name, 1.0), None
    settle(model)


@contextmanager
def only(model: nn.Module, *names: str, weights: Sequence[float] | None = None) -> Iterator[None]:
    """Let only the named adapters take part in the forward pass within the block.

    Merged adapters too are left out, or are live, unless just these are named with their weights.
    Where activations are recomputed (checkpointing), call `backward` in the block too.

    Args:
        model: with adapters attached.
        *names: of the adapters; none for the base alone.
        weights: one finite number for each name, as for `activate`.

    Yields:
        nothing; which adapters were active, and how, is restored afterwards.

    Raises:
        UnknownNameError: no adapter of that name; the nearest are offered.
        ConfigError: a name twice, weights that do not fit, or two adapters that would replace each
            other's change.
        OffloadedError: the adapter is offloaded.
    """
    chosen = _chosen(model, names, weights)
    records = records_of(model)
    merged = {record.name: record.weight for record in records if record.merged}
    with ExitStack() as stack:
        if merged != chosen:
            stack.enter_context(originals(model))
        states = {record: record.name in chosen for record in records}
        shares = {record: Share(chosen.get(record.name, 1.0)) for record in records}
        stack.enter_context(set_active(model, states))
        stack.enter_context(set_shares(shares))
        yield


@contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """The base model within the block, bit for bit, while adapters stay attached or merged.

    Args:
        model: with or without adapters.

    Yields:
        nothing.
    """
    with only(model):
        yield


def find(model: nn.Module, names: Sequence[str]) -> list[Record]:
    """The records of named adapters.

    Args:
        model: with adapters attached.
        names: of the adapters.

    Returns:
        one for each name.

    Raises:
        UnknownNameError: no adapter of that name; the nearest are offered.
    """
    records = {record.name: record for record in records_of(model)}
    for name in names:
        if name not in records:
            known = nearest(str(name), records) if records else "The model has no adapters."
            raise UnknownNameError(f"there is no adapter {name!r} on the model. {known}")
    return [records[name] for name in names]


def check_together(layers: Mapping[str, Mapping[str, Layer]]) -> None:
    """Raise if adapters that shall take part together would replace each other's change.

    Args:
        layers: adapter name -> module path -> layer.

    Raises:
        ConfigError: one trains a module whole in which another changes something.
    """
    for name, mine in layers.items():
        whole = [path for path, layer in mine.items() if isinstance(layer, ModuleLayer)]
        for path, other in product(whole, layers.keys() - {name}):
            inside = next((p for p in layers[other] if f"{p}.".startswith(f"{path}.")), None)
            if inside is not None:
                raise ConfigError(
                    f"module {path!r} is trained whole by adapter {name!r}, and {other!r} changes "
                    f"{inside!r} too: one would replace the other. Let one of them take part at a "
                    "time, with tether.activate or tether.only."
                )


@contextmanager
def set_shares(shares: Mapping[Record, Share]) -> Iterator[None]:
    """Set weights and rows of adapters within the block.

    Args:
        shares: record -> how much of it takes part.

    Yields:
        nothing; what was before is restored.
    """
    before = {record: Share(record.weight, record.rows) for record in shares}
    _share(shares)
    try:
        yield
    finally:
        _share(before)


@contextmanager
def set_active(model: nn.Module, states: Mapping[Record, bool]) -> Iterator[None]:
    """Switch adapters on and off within the block.

    Args:
        model: with the adapters.
        states: record -> whether it takes part.

    Yields:
        nothing; the states before are restored.

    Raises:
        OffloadedError: one that shall take part is offloaded.
    """
    before = {record: _wanted(record) for record in states}
    wake(model, (record for record, state in states.items() if state))
    switch(model, states)
    # What this block only interrupts is not worth offloading.
    interrupted = [record for record, state in before.items() if state]
    for record in interrupted:
        record.pins += 1
    try:
        settle(model)
        yield
    finally:
        for record in interrupted:
            record.pins -= 1
        switch(model, before)
        settle(model)


def wake(model: nn.Module, records: Iterable[Record]) -> None:
    """Bring back adapters that a limit offloaded, before they take part.

    Args:
        model: with the adapters.
        records: of those that shall take part.

    Raises:
        OffloadedError: one that the user offloaded.
    """
    for record in records:
        if record.parked is not None and record.parked.by_limit:
            for module, budget in budgets_of(model):
                if record in records_of(module):
                    budget.bring(module, record.name)
        if record.parked is not None:
            raise OffloadedError(
                f"adapter {record.name!r} is offloaded to {record.parked.path or 'cpu'} and cannot "
                f"take part. Call tether.handles(model)[{record.name!r}].restore() first."
            )


def switch(model: nn.Module, states: Mapping[Record, bool]) -> None:
    """Say which adapters take part; an offloaded one, once it is restored.

    Args:
        model: with the adapters.
        states: record -> whether it takes part.
    """
    now = 1 + max((record.used for record in records_of(model)), default=0)
    for record, state in states.items():
        if record.active and not state:
            record.used = now
        if record.parked is None:
            record.active = state
        else:
            record.parked.active = state


def settle(model: nn.Module) -> None:
    """Let the limits on a model offload what is not used now.

    Args:
        model: with or without a limit.
    """
    for module, budget in budgets_of(model):
        budget.keep(module)


def _wanted(record: Record) -> bool:
    return record.active if record.parked is None else record.parked.active


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluate within the block: eval mode, no gradients.

    Args:
        model: every module's own mode is restored afterwards, and so is the random state.

    Yields:
        nothing.
    """
    modes = {module: module.training for module in model.modules()}
    # Only the model's own GPUs: torch warns where it must save the state of many.
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _share(shares: Mapping[Record, Share]) -> None:
    for record, share in shares.items():
        record.weight, record.rows = share.weight, share.rows


def _chosen(
    model: nn.Module, names: Sequence[str], weights: Sequence[float] | None
) -> dict[str, float]:
    """Name -> weight, checked."""
    find(model, names)
    numbers = [1.0] * len(names) if weights is None else list(weights)
    if len(numbers) != len(names):
        raise ConfigError(
            f"{len(numbers)} weights {numbers} for {len(names)} adapters {list(names)}. Give one "
            "for each."
        )
    for name, number in zip(names, numbers, strict=True):
        if isinstance(number, bool) or not isinstance(number, int | float) or not isfinite(number):
            raise ConfigError(f"weight {number!r} of adapter {name!r} must be a finite number.")
        if names.count(name) > 1:
            raise ConfigError(f"adapter {name!r} is named {names.count(name)} times. Name it once.")
    check_together({n: layers for n, layers in layers_of(model).items() if n in names})
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}
