"""init: the start of a whole adapter."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from tether import cache as caches
from tether import linalg, quantized, sites, whole
from tether.cache import AnchorCache
from tether.checkpoint import Checkpoint
from tether.config import LoraConfig, Plan, plan
from tether.errors import (
    ConfigError,
    MetaTensorError,
    ShapeMismatchError,
    UnsupportedModuleError,
)
from tether.fingerprints import sha256
from tether.provenance import Provenance
from tether.quantized import Quantized
from tether.ranks import check_unwrapped, world_size
from tether.start import ranks
from tether.start.model import base_class, base_name, original
from tether.start.site import Job, Start, find_start
from tether.start.workers import find_all
from tether.value import Adapter, Progress, Trained

_SAMPLE = 4096  # values by which ranks compare their weights


@dataclass(frozen=True, slots=True)
class Search:
    """How starts are to be found; see `init`, which does not change what is found.

    Attributes:
        weights_from: folder of the base model, or None.
        workers: sites at a time, or None.
        cache: whether to use it.
        distributed: whether to share the sites out.
    """

    weights_from: str | os.PathLike[str] | None = None
    workers: int | None = None
    cache: bool = True
    distributed: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """An adapter at its start, and how it was found.

    Attributes:
        adapter: the adapter.
        cached: how many of its sites came out of the cache.
    """

    adapter: Adapter
    cached: int


def init(
    model: nn.Module,
    config: LoraConfig | None = None,
    *,
    weights_from: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    cache: bool = True,
    distributed: bool = True,
    progress: Progress | None = None,
) -> Adapter:
    """Choose the start of an adapter. Pure: the model is read, never changed.

    Anchors are looked for in the cache first (`tether.cache`), so the same weight is decomposed
    once. Under torch.distributed every rank must call it: each finds a part of the sites, and all
    get the same bits.

    Args:
        model: any module whose selected weights are floating point, or quantised in a way that
            `tether.quantized` knows; with `weights_from`, an unquantised one may be on the meta
            device, without values.
        config: what to adapt and how; None for PiSSA of rank 16 on all linear layers.
        weights_from: folder of the base model, from which each weight is read when its turn comes:
            for models larger than memory. Of a quantised model: of what was quantised. The start is
            then that of the original weight; the fingerprints are the quantised base's, to which
            the adapter belongs, and how far the two lie apart is in `provenance.gaps`.
        workers: sites at a time, each in one thread, and weights in memory besides the model; None
            for as many as torch has threads, and one at a time on a GPU.
        cache: look for anchors in the user's cache, and keep them there. TETHER_NO_CACHE=1
            switches it off everywhere.
        distributed: share the sites out over the ranks; False to work alone, as where only one
            rank calls.
        progress: called with (sites done, sites in all) after each site; of this rank's.

    Returns:
        the adapter at its start, ΔW = 0: displacement zero on an anchor, or B·A = 0; biases,
        magnitudes and whole modules at the base's own values. float32 on the CPU. Same seed, same
        bits, whatever `workers` and torch's number of threads are; an anchor out of the cache may
        have been found on another machine, or with a larger rank, and then agrees within its
        certificate.

    Raises:
        ConfigError: the configuration does not fit the model.
        WeightError: a selected weight is NaN, Inf, without values, or sharded; or a parameter to be
            trained whole is without values.
        ModelError: the folder is not a model's.
        UnknownNameError: the folder has no such weight.
        BaseMismatchError: the model is quantised, and not from the folder's weights.
        UnsupportedModuleError: it is quantised in a way that is not known.
        MergedError: an adapter is merged into the model.
        DistributedError: the ranks disagree, or another one failed; or the model is wrapped for
            training on several.
    """
    search = Search(weights_from, workers, cache, distributed)
    return find(model, config or LoraConfig(), search, progress).adapter


@torch.no_grad()
def find(
    model: nn.Module, config: LoraConfig, search: Search, progress: Progress | None = None
) -> Found:
    """As `init`, and how much was found before.

    Args:
        model: see `init`.
        config: see `init`.
        search: how.
        progress: see `init`.

    Returns:
        the adapter, and how many of its sites came out of the cache.
    """
    model = original(model)
    prepare = partial(_prepare, model, config, search)
    store = AnchorCache(caches.folder()) if search.cache and caches.enabled() else None
    one = partial(find_start, config=config, cache=store)
    with linalg.full_precision():
        if search.distributed and world_size() > 1:
            task = ranks.agree(lambda: _described(prepare(), model, config, search))
            solve = partial(find_all, find=one, workers=task.workers, progress=progress)
            starts = ranks.share(task.jobs, solve)
        else:
            task = prepare()
            starts = find_all(task.jobs, one, task.workers, progress)
    cached = sum(start.cached for start in starts.values())
    return Found(_adapter(model, config, task, starts), cached)


@dataclass(frozen=True, slots=True)
class _Task:
    """All that is needed before the work begins; what can be wrong with it is found out first."""

    jobs: list[Job]
    workers: int
    biases: dict[str, Trained]
    modules: dict[str, dict[str, Trained]]


def _prepare(model: nn.Module, config: LoraConfig, search: Search) -> _Task:
    sites.check_unmerged(model)
    check_unwrapped(model)
    plans = plan(model, config)
    if search.weights_from is None:
        jobs = [_live_job(item, model) for item in plans]
    else:
        _check_no_whole(model, config, search.weights_from)
        jobs = _stored_jobs(plans, model, search.weights_from)
    paths = [item.site.path for item in plans]
    modules = whole.modules(model, config.modules_to_save, paths)
    biases = whole.biases(model, config.bias, paths, list(modules))
    return _Task(jobs, _workers(search, model), biases, modules)


def _workers(search: Search, model: nn.Module) -> int:
    wanted = search.workers
    if wanted is None:
        # On a GPU one site fills the machine. What is read from a folder is found on the CPU.
        on_cpu = all(p.device.type in ("cpu", "meta") for p in model.parameters())
        return torch.get_num_threads() if on_cpu or search.weights_from is not None else 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ConfigError(f"workers must be a whole number, at least 1, not {wanted!r}.")
    return wanted


def _check_no_whole(model: nn.Module, config: LoraConfig, folder: str | os.PathLike[str]) -> None:
    """Raise where parameters are trained whole whose values the model does not have."""
    trained = config.bias != "none" or config.modules_to_save
    if trained and any(p.is_meta for p in model.parameters()):
        raise MetaTensorError(
            f"bias={config.bias!r} and modules_to_save={list(config.modules_to_save)} train "
            f"parameters that start at the model's own values, but the model is on the meta "
            f"device, and from {os.fspath(folder)} only the weights of the sites are read. Load "
            "the model with its values, or use bias='none' and no modules_to_save."
        )


def _live_job(item: Plan, model: nn.Module) -> Job:
    stored = _live_weight(model, item.site.path)
    if isinstance(stored, Quantized):
        return Job(item, stored.dequantize, stored)
    return Job(item, partial(_plain_weight, model, item.site.path))


def _stored_jobs(
    plans: Sequence[Plan], model: nn.Module, folder: str | os.PathLike[str]
) -> list[Job]:
    checkpoint = Checkpoint.open(Path(folder))
    jobs = []
    for item in plans:
        path, wanted = item.site.path, item.site.layout.shape
        name = checkpoint.weight_name(path)
        if checkpoint.shape(name) != wanted:
            raise ShapeMismatchError(
                f"site {path!r}: the model's weight is {wanted}, that of {checkpoint.folder} is "
                f"{checkpoint.shape(name)}. Give the folder of the same model."
            )
        if not checkpoint.dtype(name).is_floating_point or checkpoint.dtype(name).itemsize < 2:
            raise UnsupportedModuleError(
                f"site {path!r}: the weight in {checkpoint.folder} is {checkpoint.dtype(name)}, "
                "which is quantised. Give the folder of the model before quantisation, or exclude "
                "the module."
            )
        held = _held(model, path)
        jobs.append(Job(item, partial(checkpoint.tensor, name), held, original=held is not None))
    return jobs


def _held(model: nn.Module, path: str) -> Quantized | None:
    """What the model holds at a quantised site. An unquantised weight may lack its values."""
    module = model.get_submodule(path)
    weight = module.weight
    assert isinstance(weight, Tensor)
    if type(weight) is nn.Parameter and weight.is_meta:
        return None
    return quantized.read(f"site {path!r}: weight", weight, module)


def _plain_weight(model: nn.Module, path: str) -> Tensor:
    return sites.base_weight(path, model.get_submodule(path)).detach()


def _live_weight(model: nn.Module, path: str) -> Tensor | Quantized:
    return sites.stored_weight(path, model.get_submodule(path))


def _described(
    task: _Task, model: nn.Module, config: LoraConfig, search: Search
) -> tuple[_Task, str]:
    """A task, and all that its starts depend on; of each weight in memory, how it begins."""
    plans = [job.plan for job in task.jobs]
    each = [(i.site.path, i.site.layout.shape, i.rank, i.scaling) for i in plans]
    if search.weights_from is None:
        stored = [_live_weight(model, item.site.path) for item in plans]
    else:
        stored = [job.held for job in task.jobs if job.held is not None]
    begin = " ".join(map(_beginning, stored))
    return task, json.dumps([each, config.to_dict(), begin], sort_keys=True)


def _beginning(stored: Tensor | Quantized) -> str:
    if not isinstance(stored, Quantized):
        return sha256(stored[:1].reshape(-1)[:_SAMPLE])
    return " ".join(sha256(part.reshape(-1)[:_SAMPLE]) for part in stored.parts.values())


def _adapter(
    model: nn.Module, config: LoraConfig, task: _Task, starts: dict[str, Start]
) -> Adapter:
    targets, excluded = sites.short_targets(model, list(starts))
    excluded = tuple(sorted({*excluded, *whole.mistaken(model, list(task.modules))}))
    certificates = {p: s.certificate for p, s in starts.items() if s.certificate is not None}
    return Adapter(
        layers={path: start.layer for path, start in starts.items()},
        provenance=Provenance(
            method=config.method.name,
            seed=config.seed,
            tether_version=version("tether"),
            base_model=base_name(model),
            base_class=base_class(model),
            fingerprints={path: start.fingerprint for path, start in starts.items()},
            certificates=certificates,
            gaps={path: s.gap for path, s in starts.items() if s.gap is not None},
        ),
        config=config.to_dict(),
        targets=targets,
        excluded=excluded,
        biases=task.biases,
        modules=task.modules,
    )
