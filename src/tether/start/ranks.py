"""Sites shared out over the ranks of torch.distributed."""

import hashlib
from collections.abc import Callable, Sequence

from torch import distributed

from tether.errors import DistributedError
from tether.start.site import Job, Start

Solve = Callable[[Sequence[Job]], dict[str, Start]]


def world_size() -> int:
    """How many ranks there are.

    Returns:
        1 without torch.distributed.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def share(jobs: Sequence[Job], solve: Solve, plan: str) -> dict[str, Start]:
    """Let each rank find the starts of its part of the sites, and give all to all.

    Args:
        jobs: the sites; the same on every rank.
        solve: finds the starts of some sites.
        plan: all that the starts depend on, as text: it must be the same on every rank.

    Returns:
        path -> start, in the order of the jobs: the same bits on every rank.

    Raises:
        DistributedError: the ranks disagree, or another rank failed. Every rank raises.
        TetherError: this rank failed.
    """
    size, rank = distributed.get_world_size(), distributed.get_rank()
    _check_same(plan, rank, size)
    mine, failure = {}, None
    error: Exception | None = None
    try:
        mine = solve(_part(jobs, rank, size))
    except Exception as caught:  # noqa: BLE001  the other ranks must not wait for ever
        error, failure = caught, f"{type(caught).__name__}: {caught}"
    gathered: list[tuple[dict[str, Start], str | None]] = [({}, None)] * size
    distributed.all_gather_object(gathered, (mine, failure))
    if error is not None:
        raise error
    for other, (_, reason) in enumerate(gathered):
        if reason is not None:
            raise DistributedError(f"rank {other} failed, so this one has no start: {reason}")
    found = {path: start for part, _ in gathered for path, start in part.items()}
    return {job.path: found[job.path] for job in jobs}


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


def _check_same(plan: str, rank: int, size: int) -> None:
    digest = hashlib.sha256(plan.encode()).hexdigest()
    digests = [""] * size
    distributed.all_gather_object(digests, digest)
    for other, theirs in enumerate(digests):
        if theirs != digest:
            raise DistributedError(
                f"rank {rank} wants starts for other sites or settings ({digest[:12]}…) than rank "
                f"{other} ({theirs[:12]}…). Give every rank the same model and configuration, or "
                "distributed=False."
            )
