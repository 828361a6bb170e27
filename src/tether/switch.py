"""Which adapters take part in the forward pass, and evaluating without leaving a trace."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from tether.errors import UnknownNameError, nearest
from tether.layers import Record, records_of


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
    """
    records = {record.name: record for record in records_of(model)}
    for name in names:
        if name not in records:
            known = nearest(name, records) if records else "The model has no adapters."
            raise UnknownNameError(f"there is no adapter {name!r} on the model. {known}")
    with set_active({record: name in names for name, record in records.items()}):
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
def set_active(states: Mapping[Record, bool]) -> Iterator[None]:
    """Switch adapters on and off within the block.

    Args:
        states: record -> whether it takes part.

    Yields:
        nothing; the states before are restored.
    """
    before = {record: record.active for record in states}
    for record, state in states.items():
        record.active = state
    try:
        yield
    finally:
        for record, state in before.items():
            record.active = state


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
