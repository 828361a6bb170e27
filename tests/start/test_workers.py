"""Sites in threads: the same bits, the caller's settings untouched, the first error by name."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tether
from tether import methods, sites
from tether.config import Plan
from tether.errors import ConfigError, NonFiniteError
from tether.layout import Layout
from tether.sites import Site
from tether.start import adapter as adapters
from tether.start.site import Job, Start
from tether.start.workers import find_all

from .cases import everything, stack, tensors


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    """The number of torch's threads in the caller."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def jobs(sizes: list[int]) -> list[Job]:
    """Jobs named by their place, square weights."""
    return [
        Job(Plan(Site(str(index), Layout("linear", (size, size))), 1, 1.0), lambda: torch.empty(0))
        for index, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("init", methods.names())
def test_any_number_of_workers_and_threads_gives_the_same_bits(init):
    model, config = stack(), tether.LoraConfig(init=init, rank=5, use_dora=True)
    expected = everything(tether.init(model, config, workers=1))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for workers in (None, 1, 2, 3, 50):
                found = tether.init(model, config, workers=workers)
                assert everything(found) == expected, (threads, workers)
                assert list(found.layers) == ["0", "1", "2", "3"]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2, 6])
def test_each_site_has_one_thread_of_torch_and_the_caller_keeps_its_own(workers, threads):
    seen, names = [], set()

    def find(job: Job) -> Start:
        seen.append(torch.get_num_threads())
        names.add(threading.current_thread())
        return job

    find_all(jobs([4] * 6), find, workers)
    assert seen == [1] * 6
    assert threading.current_thread() not in names
    assert 1 <= len(names) <= workers
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (threads, threads)


def test_the_caller_keeps_its_threads_after_an_error(threads):
    def find(job: Job) -> Start:
        raise NonFiniteError(job.path)

    with pytest.raises(NonFiniteError):
        find_all(jobs([4] * 6), find, 2)
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (threads, threads)


def test_of_several_errors_the_first_in_order_is_raised_however_late_it_comes():
    failed = threading.Event()

    def find(job: Job) -> Start:
        if job.path == "0":
            assert failed.wait(60)
            time.sleep(0.2)
        failed.set()
        raise NonFiniteError(job.path)

    with pytest.raises(NonFiniteError, match=r"^0$"):
        find_all(jobs([4] * 6), find, 2)


def threads_of_a_new_thread() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_callers_modes_do_not_reach_the_starts(workers):
    model, config = stack(), tether.LoraConfig(rank=3, use_dora=True)
    expected = everything(tether.init(model, config, workers=workers))
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.no_grad()):
        with mode:
            found = tether.init(model, config, workers=workers)
        assert everything(found) == expected
        for name, tensor in tensors(found):
            assert not tensor.requires_grad, name
            assert not tensor.is_inference(), name
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("workers", [1, 2, 6])
def test_progress_is_told_in_the_callers_thread_after_each_site(workers):
    told, where = [], set()

    def progress(done: int, count: int) -> None:
        told.append((done, count))
        where.add(threading.current_thread())

    find_all(jobs([4] * 6), lambda job: job, workers, progress)
    assert told == [(done, 6) for done in range(1, 7)]
    assert where == {threading.current_thread()}


def test_the_most_expensive_come_first_and_the_result_is_in_the_models_order():
    begun = []

    def find(job: Job) -> Start:
        begun.append(job.path)
        return job

    wanted = jobs([5, 7, 3, 9, 9])
    assert list(find_all(wanted, find, 1).items()) == [(job.path, job) for job in wanted]
    assert begun == ["3", "4", "1", "0", "2"]
    assert find_all([], find, 2) == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_is_raised_and_sites_not_begun_are_left_alone(workers):
    begun = []

    def find(job: Job) -> Start:
        begun.append(job.path)
        if job.path == "0":
            raise NonFiniteError("site '0': here")
        time.sleep(0.1)
        return job

    with pytest.raises(NonFiniteError, match="site '0': here"):
        find_all(jobs([9, *[4] * 30]), find, workers)
    # The one that failed takes up at most one more before the others are called off.
    assert len(begun) <= 2 * workers


def test_an_error_names_its_site():
    model = stack()
    with torch.no_grad():
        model[1].weight[3, 4] = torch.nan
    for workers in (1, 4):
        with pytest.raises(NonFiniteError, match=r"^site '1': weight \(128, 160\): 1 of 20480"):
            tether.init(model, tether.LoraConfig(rank=2), workers=workers)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_as_many_weights_as_workers_are_read_at_a_time(workers, monkeypatch):
    lock, now, most = threading.Lock(), set(), []
    together = threading.Barrier(workers)
    find_start, base_weight = adapters.find_start, sites.base_weight

    def read(path: str, module: nn.Module) -> Tensor:
        with lock:
            now.add(path)
            most.append(len(now))
        return base_weight(path, module)

    def find(job: Job, **settings: object) -> Start:
        together.wait(timeout=60)  # all of them are at work
        start = find_start(job, **settings)
        with lock:
            now.remove(job.path)
        return start

    monkeypatch.setattr(sites, "base_weight", read)
    monkeypatch.setattr(adapters, "find_start", find)
    shapes = ((128, 128),) * 2 * workers
    tether.init(stack(shapes), tether.LoraConfig(rank=2), workers=workers)
    assert len(most) == 2 * workers
    assert max(most) <= workers


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, "2"])
def test_workers_is_a_positive_whole_number(workers):
    with pytest.raises(
        ConfigError, match=f"workers must be a whole number, at least 1, not {workers!r}"
    ):
        tether.init(stack(), tether.LoraConfig(rank=2), workers=workers)


def test_there_are_as_many_workers_as_torch_has_threads(threads, monkeypatch):
    seen = []

    def spy(jobs: list[Job], find: object, workers: int, progress: object) -> dict[str, Start]:
        seen.append(workers)
        return find_all(jobs, find, workers, progress)

    monkeypatch.setattr(adapters, "find_all", spy)
    tether.init(stack(), tether.LoraConfig(rank=2))
    assert seen == [threads]
