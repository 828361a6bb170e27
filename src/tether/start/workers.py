"""Many sites at once: threads, each with one site and one thread of torch's own."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import torch

from tether.start.site import Job, Start
from tether.value import Progress


def find_all(
    jobs: Sequence[Job],
    find: Callable[[Job], Start],
    workers: int,
    progress: Progress | None = None,
) -> dict[str, Start]:
    """Find the starts of many sites, the most expensive first.

    torch leaves Python's lock while it computes, so threads are enough, and nothing is copied.
    Within a site torch has one thread, whatever `workers` is: a sum that is shared out among
    threads is rounded in another order, and the same bits are promised. And the matrices are too
    small for many threads: as many sites at a time do more. A new thread also knows nothing of the
    caller's autocast or inference mode, which would change what is computed, or what it is good
    for.

    Args:
        jobs: the sites.
        find: gives the start of one.
        workers: sites at a time; as many weights are in memory.
        progress: called with (sites done, sites in all) after each, in the caller's thread.

    Returns:
        path -> start, in the order of the jobs.

    Raises:
        TetherError: what a site raised; of several, the most expensive one's, however the threads
            were timed. The sites not yet begun are left alone.
    """
    if not jobs:
        return {}
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(workers, len(jobs)), "tether", torch.set_num_threads, (1,))
    try:
        ordered = sorted(jobs, key=lambda job: -job.cost)
        futures: dict[Future[Start], str] = {pool.submit(find, job): job.path for job in ordered}
        for done, future in enumerate(as_completed(futures), start=1):
            if future.exception() is not None:
                break
            if progress is not None:
                progress(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)
        # It is each thread's own, but new threads take over what was set last.
        torch.set_num_threads(threads)
    # Sites are begun in order, so all before one that failed have ended: the first error in this
    # order is the same in every run.
    found = {path: each.result() for each, path in futures.items() if not each.cancelled()}
    return {job.path: found[job.path] for job in jobs}
