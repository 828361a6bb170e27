"""Sites shared out over the ranks of torch.distributed."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import distributed

from tether.errors import DistributedError
from tether.start.site import Job, Start

T = TypeVar("T")
Solve = Callable[[Sequence[Job]], dict[str, Start]]


def world_size() -> int:
    """How many ranks there are.

    Returns:
        1 without torch.distributed.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def agree(prepare: Callable[[], tuple[T, str]]) -> T:
    """Let every rank prepare, and go on only if all could, and for the same.

    Args:
        prepare: gives what this rank needs, and all that the starts depend on, as text.

    Returns:
        what it needs.

    Raises:
        DistributedError: the ranks disagree, or another rank failed. Every rank raises.
        TetherError: this rank failed.
    """
    prepared, error = _attempt(prepare)
    digest = hashlib.sha256(prepared[1].encode()).hexdigest() if prepared else ""
    digests = _gather(digest, error)
    assert prepared is not None
    rank = distributed.get_rank()
    for other, theirs in enumerate(digests):
        if theirs != digest:
            raise DistributedError(
                f"rank {rank} wants starts for other sites, settings or weights ({digest[:12]}…) "
                f"than rank {other} ({theirs[:12]}…). Give every rank the same model and "
                "configuration, or distributed=False."
            )
    return prepared[0]


def share(jobs: Sequence[Job], solve: Solve) -> dict[str, Start]:
    """Let each rank find the starts of its part of the sites, and give all to all.

    Args:
        jobs: the sites; the same on every rank, see `agree`.
        solve: finds the starts of some sites.

    Returns:
        path -> start, in the order of the jobs: the same bits on every rank.

    Raises:
        DistributedError: another rank failed. Every rank raises.
        TetherError: this rank failed.
    """
    mine = _part(jobs, distributed.get_rank(), distributed.get_world_size())
    parts = _gather(*_attempt(lambda: solve(mine)))
    found = {path: start for part in parts if part for path, start in part.items()}
    return {job.path: found[job.path] for job in jobs}


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as caught:  # noqa: BLE001  the other ranks must not wait for ever
        return None, caught


def _gather(value: T, error: Exception | None) -> list[T]:
    """The value of every rank, in their order; raise on all of them where one failed."""
    failure = None if error is None else f"{type(error).__name__}: {error}"
    gathered: list[tuple[T, str | None]] = [(value, None)] * distributed.get_world_size()
    distributed.all_gather_object(gathered, (value, failure))
    if error is not None:
        raise error
    for other, (_, reason) in enumerate(gathered):
        if reason is not None:
            raise DistributedError(f"rank {other} failed, so this one has no start: {reason}")
    return [each for each, _ in gathered]


def _part(jobs: Sequence[Job], rank: int, size: int) -> list[Job]:
    """The most expensive first, each to the rank that has least to do."""
    loads = [0] * size
    mine = []
    for job in sorted(jobs, key=lambda job: (-job.cost, job.path)):
        least = loads.index(min(loads))
        loads[least] += job.cost
        if least == rank:
            mine.append(job)
    return mine
