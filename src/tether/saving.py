"""An adapter that FSDP2 sharded: all ranks give their parts, rank 0 holds the whole and writes."""

import os
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from tether import formats, offload
from tether.layers import layers_of
from tether.layers.record import to_first
from tether.ranks import is_sharded, on_first, reshard
from tether.value import Adapter

T = TypeVar("T")
_LOST = "nothing was written"


def sharded(model: nn.Module, name: str) -> bool:
    """Whether the ranks hold only parts of an adapter.

    Args:
        model: that carries it.
        name: of the adapter.

    Returns:
        True if reading it needs all ranks.
    """
    reshard(model)
    tensors = (t for layer in layers_of(model)[name].values() for t in layer.own().values())
    return any(map(is_sharded, tensors))


def gather(model: nn.Module, name: str) -> Adapter:
    """An adapter's values on rank 0. All ranks must call it.

    Tensor by tensor: the others hold no more than one at a time.

    Args:
        model: that carries it.
        name: of the adapter.

    Returns:
        the adapter; on the other ranks one of the same shapes, of zeros that take no memory.
    """
    return offload.snapshot(model, name, to_first)


def save(model: nn.Module, name: str, path: str | os.PathLike[str]) -> None:
    """Write an adapter to a native file; of a sharded one all ranks must call it.

    Args:
        model: that carries it.
        name: of the adapter.
        path: of the file; replaced in one rename.

    Raises:
        WriteError: it cannot be written.
        DistributedError: rank 0 could not write it, on the others.
    """
    if not sharded(model, name):
        formats.save(offload.snapshot(model, name), path)
        return
    adapter = gather(model, name)
    written(lambda: formats.save(adapter, path))


def written(write: Callable[[], T]) -> T:
    """Let rank 0 write. All ranks must call it.

    Args:
        write: of rank 0.

    Returns:
        what rank 0's returned, on every rank.

    Raises:
        DistributedError: rank 0 could not write, on the others.
    """
    return on_first(write, _LOST)
