"""Different adapters for the rows of one batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from tether.errors import ConfigError, RowsError
from tether.layers import Rows, layers_of, originals, records_of
from tether.switch import Share, find, set_active, set_shares

BASE = "base"


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Let each row of every batch within the block have its own adapter.

    Rows of the base keep every bit that the base gives them in this batch; the others are what
    their adapter alone gives. Gradients reach each adapter from its own rows. The first dimension
    of what every adapted module gets and gives must be the batch: a model that puts another first
    (nn.Transformer without batch_first) must not be used so. Where activations are recomputed
    (checkpointing), call `backward` in the block too.

    Args:
        model: with adapters attached.
        names: an adapter for each row; "base" or None for no adapter. Where `generate` expands the
            batch (num_beams, num_return_sequences), every name that many times, one after another.

    Yields:
        nothing; what was active is restored afterwards.

    Raises:
        UnknownNameError: no adapter of that name; the nearest are offered.
        ConfigError: no names, one string, or "base" where an adapter has that name.
        RowsError: an adapter in a mixture of experts, now; a batch of another size, or a module
            that runs once for all rows, in the forward pass.
        OffloadedError: the adapter is offloaded.
    """
    wanted = _checked(model, names)
    chosen = {name: _rows_of(name, wanted) for name in wanted if name is not None}
    states = {record: record.name in chosen for record in records_of(model)}
    shares = {record: Share(rows=chosen.get(record.name)) for record in states}
    with originals(model), set_active(model, states), set_shares(shares):
        yield


def _checked(model: nn.Module, names: Sequence[str | None]) -> list[str | None]:
    if isinstance(names, str) or not len(names):
        raise ConfigError(f"rows: {names!r} must be a list with a name for every row of the batch.")
    found = layers_of(model)
    if BASE in found and BASE in names:
        raise ConfigError(
            f"rows: {BASE!r} means no adapter, and the model has an adapter of that name. Write "
            "None for no adapter, and attach that adapter under another name."
        )
    wanted = [None if name == BASE else name for name in names]
    given = [name for name in dict.fromkeys(wanted) if name is not None]
    find(model, given)
    for name, path in [(given_name, path) for given_name in given for path in found[given_name]]:
        if "experts" in path.split("."):
            raise RowsError(
                f"site {path!r} of adapter {name!r}: experts get single tokens, not rows of the "
                "batch. Exclude it, or run the adapters one after the other, with tether.only."
            )
    return wanted


def _rows_of(name: str, wanted: Sequence[str | None]) -> Rows:
    return Rows(len(wanted), torch.tensor([i for i, n in enumerate(wanted) if n == name]))
