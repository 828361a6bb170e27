"""The ranks of torch.distributed: how many, what is sharded, and errors that reach all of them."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, distributed, nn

from tether.errors import DistributedError, ShardedWeightError

T = TypeVar("T")


def world_size() -> int:
    """How many ranks there are.

    Returns:
        1 without torch.distributed.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def launched() -> int:
    """How many processes a launcher such as torchrun has started together.

    Returns:
        1 without a launcher.
    """
    said = os.environ.get("WORLD_SIZE", "")
    return max(world_size(), int(said) if said.isdecimal() else 1)


def is_first() -> bool:
    """Whether this rank is the one that writes.

    Returns:
        True on rank 0, and without torch.distributed.
    """
    return world_size() == 1 or distributed.get_rank() == 0


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Do some work of this rank, so that a failure can be told to the others.

    Args:
        work: may raise.

    Returns:
        its result and None, or None and what it raised.
    """
    try:
        return work(), None
    except Exception as caught:  # noqa: BLE001  the other ranks must not wait for ever
        return None, caught


def gather(value: T, error: Exception | None, lost: str) -> list[T]:
    """The value of every rank. All ranks must call it.

    Args:
        value: of this rank.
        error: what this rank failed with, if it did.
        lost: what a failure of another rank means for this one, for the message.

    Returns:
        one for each rank, in their order.

    Raises:
        DistributedError: another rank failed.
        Exception: this rank's own error.
    """
    failure = None if error is None else f"{type(error).__name__}: {error}"
    gathered: list[tuple[T, str | None]] = [(value, None)] * distributed.get_world_size()
    distributed.all_gather_object(gathered, (value, failure))
    if error is not None:
        raise error
    for other, (_, reason) in enumerate(gathered):
        if reason is not None:
            raise DistributedError(f"rank {other} failed, so {lost}: {reason}")
    return [each for each, _ in gathered]


def on_first(work: Callable[[], T], lost: str) -> T:
    """Let rank 0 work while the others wait. All ranks must call it.

    Args:
        work: of rank 0.
        lost: what its failure means for the others, for the message.

    Returns:
        what rank 0 found, on every rank.

    Raises:
        DistributedError: rank 0 failed, on the others.
        Exception: rank 0's own error, on rank 0.
    """
    done: tuple[T | None, Exception | None] = attempt(work) if is_first() else (None, None)
    first: T | None = gather(*done, lost)[0]
    return first  # type: ignore[return-value]  # work's own result


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold only a part of a tensor.

    Args:
        tensor: any.

    Returns:
        True for a DTensor.
    """
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def reshard(model: nn.Module) -> None:
    """Give back to FSDP2 what the last forward pass left gathered.

    After a pass without a backward the root's parameters stay gathered, in the lower precision of
    a MixedPrecisionPolicy: no values to save.

    Args:
        model: sharded or not.
    """
    sharding = sys.modules.get("torch.distributed.fsdp")
    if sharding is None:  # then nobody can have sharded it
        return
    for module in model.modules():
        if isinstance(module, sharding.FSDPModule):
            module.reshard()


def check_unwrapped(model: nn.Module) -> None:
    """Raise for a model in which an adapter would be passed over by what has wrapped it.

    Args:
        model: to attach to, or to take anchors from.

    Raises:
        DistributedError: it is in DistributedDataParallel, which would not average its gradients.
        ShardedWeightError: FSDP or DeepSpeed's ZeRO-3 has sharded it.
    """
    sharding = sys.modules.get("torch.distributed.fsdp")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ShardedWeightError(
                f"{name} is partitioned by DeepSpeed (ZeRO-3). Load the model whole, attach, and "
                "call deepspeed.initialize afterwards."
            )
    for path, module in model.named_modules():
        where = f"module {path!r}" if path else "the model"
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise DistributedError(
                f"{where} is a DistributedDataParallel, which averages the gradients of the "
                "parameters it was made with: those of a new adapter would differ from rank to "
                "rank. Attach to the model itself, then wrap it."
            )
        if sharding is None:
            continue
        if isinstance(module, sharding.FSDPModule):
            raise ShardedWeightError(
                f"{where} is sharded by fully_shard, which would not gather a new adapter, nor "
                "average its gradients. Attach before fully_shard, then shard the model with its "
                "adapter."
            )
        if isinstance(module, sharding.FullyShardedDataParallel):
            raise ShardedWeightError(
                f"{where} is a FullyShardedDataParallel (FSDP1), which has flattened the weights. "
                "Attach to the model itself, then shard it with fully_shard (FSDP2)."
            )


def check_here(label: str, parameter: Tensor) -> None:
    """Raise for a parameter whose values others hold, and that cannot be asked for them.

    Args:
        label: what to call it in the message.
        parameter: of an adapter.

    Raises:
        ShardedWeightError: FSDP1 or DeepSpeed's ZeRO-3 holds them.
    """
    if getattr(parameter, "_fsdp_flattened", False):
        raise ShardedWeightError(
            f"{label} is in a FullyShardedDataParallel (FSDP1), which has flattened it: its values "
            "cannot be read here. Shard the model with fully_shard (FSDP2) instead."
        )
    if hasattr(parameter, "ds_id") and not parameter.numel():
        raise ShardedWeightError(
            f"{label} is partitioned by DeepSpeed (ZeRO-3). Gather the adapter for as long as it "
            "is read: with deepspeed.zero.GatheredParameters(list(handle.parameters())): ..."
        )
