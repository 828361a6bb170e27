"""Which adapters take part in the forward pass, and evaluating without leaving a trace."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from tether.errors import OffloadedError, UnknownNameError, nearest
from tether.layers import Record, budgets_of, records_of


@contextmanager
def only(model: nn.Module, *names: str) -> Iterator[None]:
    """Let only the named adapters take part in the forward pass within the block.

    Args:
        model: with adapters attached.
        *names: of the adapters; none for the base alone.

    Yields:
        nothing; which adapters were active is restored afterwards.

    Raises:
        UnknownNameError: no adapter of that name; the nearest are offered.
        OffloadedError: the adapter is offloaded.
    """
    records = {record.name: record for record in records_of(model)}
    for name in names:
        if name not in records:
            known = nearest(name, records) if records else "The model has no adapters."
            raise UnknownNameError(f"there is no adapter {name!r} on the model. {known}")
    with set_active(model, {record: name in names for name, record in records.items()}):
        yield


@contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """The base model within the block, bit for bit, while adapters stay attached.

    Args:
        model: with or without adapters.

    Yields:
        nothing.
    """
    with only(model):
        yield


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
