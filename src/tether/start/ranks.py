"""Sites shared out over the ranks of torch.distributed."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import distributed

from tether.errors import DistributedError
from tether.ranks import attempt, gather
from tether.start.site import Job, Start

T = TypeVar("T")
Solve = Callable[[Sequence[Job]], dict[str, Start]]
_LOST = "this one has no start"


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
    prepared, error = attempt(prepare)
    digest = hashlib.sha256(prepared[1].encode()).hexdigest() if prepared else ""
    digests = gather(digest, error, _LOST)
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
    parts = gather(*attempt(lambda: solve(mine)), _LOST)
    found = {path: start for part in parts if part for path, start in part.items()}
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
