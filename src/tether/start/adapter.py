"""init: the start of a whole adapter."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from tether import cache as caches
from tether import sites, whole
from tether.cache import AnchorCache
from tether.checkpoint import Checkpoint
from tether.config import LoraConfig, Plan, plan
from tether.errors import ConfigError, ShapeMismatchError
from tether.provenance import Provenance
from tether.start import ranks
from tether.start.model import base_class, base_name, original
from tether.start.site import Job, Start, find_start
from tether.start.workers import find_all
from tether.value import Adapter, Progress


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
        model: any module whose selected weights are floating point; with `weights_from`, it may be
            on the meta device, without values.
        config: what to adapt and how; None for PiSSA of rank 16 on all linear layers.
        weights_from: folder of the base model, from which each weight is read when its turn comes:
            for models larger than memory.
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
        bits, whatever `workers` and torch's number of threads are; an anchor out of the cache may have been found on another
        machine, or with a larger rank, and then agrees within its certificate.

    Raises:
        ConfigError: the configuration does not fit the model.
        WeightError: a selected weight is NaN, Inf, without values, or sharded.
        ModelError: the folder is not a model's.
        UnknownNameError: the folder has no such weight.
        MergedError: an adapter is merged into the model.
        DistributedError: the ranks disagree, or another one failed.
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
    sites.check_unmerged(model)
    plans = plan(model, config)
    jobs = _jobs(model, plans, search.weights_from)
    store = AnchorCache(caches.folder()) if search.cache and caches.enabled() else None
    one = partial(find_start, config=config, cache=store)
    solve = partial(_solve, find=one, count=_workers(search.workers, model), progress=progress)
    if search.distributed and ranks.world_size() > 1:
        starts = ranks.share(jobs, solve, _described(plans, config))
    else:
        starts = solve(jobs)
    cached = sum(start.cached for start in starts.values())
    return Found(_adapter(model, config, starts), cached)


def _solve(
    jobs: Sequence[Job], find: Callable[[Job], Start], count: int, progress: Progress | None
) -> dict[str, Start]:
    return find_all(jobs, find, count, progress)


def _workers(wanted: int | None, model: nn.Module) -> int:
    if wanted is None:
        # On a GPU one site fills the machine.
        on_cpu = all(p.device.type in ("cpu", "meta") for p in model.parameters())
        return torch.get_num_threads() if on_cpu else 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ConfigError(f"workers must be a whole number, at least 1, not {wanted!r}.")
    return wanted


def _jobs(
    model: nn.Module, plans: Sequence[Plan], weights_from: str | os.PathLike[str] | None
) -> list[Job]:
    if weights_from is None:
        return [Job(item, partial(_live_weight, model, item.site.path)) for item in plans]
    checkpoint = Checkpoint.open(Path(weights_from))
    names = {item.site.path: checkpoint.weight_name(item.site.path) for item in plans}
    for item in plans:
        name, wanted = names[item.site.path], item.site.layout.shape
        if checkpoint.shape(name) != wanted:
            raise ShapeMismatchError(
                f"site {item.site.path!r}: the model's weight is {wanted}, that of "
                f"{weights_from} is {checkpoint.shape(name)}. Give the folder of the same model."
            )
    return [Job(item, partial(_stored_weight, checkpoint, names, item)) for item in plans]


def _live_weight(model: nn.Module, path: str) -> Tensor:
    return sites.base_weight(path, model.get_submodule(path)).detach()


def _stored_weight(checkpoint: Checkpoint, names: dict[str, str], item: Plan) -> Tensor:
    weight = checkpoint.tensor(names[item.site.path])
    label = f"site {item.site.path!r}: weight in {checkpoint.folder}"
    sites.check_readable(label, weight, nn.Module())
    return weight


def _described(plans: Sequence[Plan], config: LoraConfig) -> str:
    each = [(i.site.path, i.site.layout.shape, i.rank, i.scaling) for i in plans]
    return json.dumps([each, config.to_dict()], sort_keys=True)


def _adapter(model: nn.Module, config: LoraConfig, starts: dict[str, Start]) -> Adapter:
    paths = list(starts)
    modules = whole.modules(model, config.modules_to_save, paths)
    targets, excluded = sites.short_targets(model, paths)
    excluded = tuple(sorted({*excluded, *whole.mistaken(model, list(modules))}))
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
        ),
        config=config.to_dict(),
        targets=targets,
        excluded=excluded,
        biases=whole.biases(model, config.bias, paths, list(modules)),
        modules=modules,
    )
