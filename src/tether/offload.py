"""Taking adapters off the model's memory and putting them back, exactly; a budget that does so."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tether import fs
from tether.errors import ConfigError, MergedError, OffloadedError, ShardedWeightError, TetherError
from tether.formats import only_copy
from tether.layers import (
    Anchor,
    Layer,
    ModuleLayer,
    Parked,
    Record,
    SiteLayer,
    bring_back,
    carriers,
    layers_of,
    originals,
    park,
    records_of,
    set_budget,
    share_anchors,
)
from tether.layers.record import Take, to_value
from tether.memory import measure, readable, users
from tether.ranks import check_here, is_sharded, reshard
from tether.start import original
from tether.value import CHILD, Adapter

_LOG = logging.getLogger("tether")


def snapshot(model: nn.Module, name: str, take: Take = to_value) -> Adapter:
    """An attached adapter now, as a value; also an offloaded one. Changes nothing.

    Args:
        model: that carries it.
        name: of the adapter.
        take: how to copy a tensor.

    Returns:
        copies on the CPU, float32 (float64 if attached so).

    Raises:
        FormatError: it is offloaded to a file that is missing, damaged or another one.
        ShardedWeightError: FSDP1 or DeepSpeed's ZeRO-3 holds its values.
    """
    modules = carriers(model, name)
    record: Record = getattr(modules[0], CHILD)[name].record
    if (stored := _stored(record)) is not None:
        return replace(stored, provenance=record.provenance)
    reshard(model)
    layers, biases, states = {}, {}, {}
    for module in modules:
        layer = getattr(module, CHILD)[name]
        for own, parameter in layer.named_parameters(recurse=False):
            check_here(f"site {layer.path!r}: {own}", parameter)
        if isinstance(layer, SiteLayer):
            layers[layer.path] = layer.value(take)
        if isinstance(layer, ModuleLayer):
            with originals(model):
                states[layer.path] = layer.state(module, take)
        elif (bias := layer.bias(take)) is not None:
            biases[layer.path] = bias
    return Adapter(
        layers=layers,
        provenance=record.provenance,
        config=record.config,
        targets=record.targets,
        excluded=record.excluded,
        biases=biases,
        modules=states,
    )


def offload(
    model: nn.Module, name: str, where: str | os.PathLike[str], by_limit: bool = False
) -> None:
    """Take an adapter's tensors off the model; see `Handle.offload`.

    Args:
        model: that carries it.
        name: of the adapter.
        where: "cpu", or the path of a file.
        by_limit: whether switching to the adapter shall bring it back.

    Raises:
        OffloadedError: it is offloaded to another place.
        MergedError: it is merged into the weights.
        ConfigError: `where` is another device.
        ShardedWeightError: its tensors are sharded.
        NonFiniteError: it holds NaN or Inf, which a file does not take.
        WriteError: the file cannot be written, or holds something else.
    """
    found = layers_of(model)
    layers = list(found[name].values())
    record, path = layers[0].record, _place(where)
    if record.parked is not None:
        if record.parked.path != path:
            raise OffloadedError(
                f"adapter {name!r} is offloaded to {record.parked.path or 'cpu'} already, not to "
                f"{path or 'cpu'}. Call handle.restore() first."
            )
        record.parked.by_limit = by_limit
        return
    if record.merged:
        raise MergedError(
            f"adapter {name!r} is merged into the weights, and its factors are needed to leave it "
            "out. Un-merge it first, with tether.unmerge, then offload it."
        )
    _check_local(layers)
    digest = "" if path is None else only_copy.write(snapshot(model, name), path)
    record.parked = Parked(record.active, path, digest, by_limit)
    try:
        park([*((layer, path is None) for layer in layers), *_unused_anchors(found)])
    except BaseException:
        record.parked = None
        raise
    record.active = False
    if path is None and _on_cpu(model, name):
        _LOG.warning(
            "offload: adapter %r is on the CPU, where offloading to 'cpu' frees nothing; a path of "
            "a file does.",
            name,
        )


def tidy(model: nn.Module) -> None:
    """Take off anchors that only offloaded adapters use by now.

    Args:
        model: from which an adapter was detached.
    """
    park(_unused_anchors(layers_of(model)))


def restore(model: nn.Module, name: str) -> None:
    """Put an adapter's tensors back; see `Handle.restore`.

    Args:
        model: that carries it.
        name: of the adapter.

    Raises:
        FormatError: the file is missing, damaged or another one; the adapter stays offloaded.
        ShardedWeightError: the model was sharded meanwhile.
    """
    layers = list(layers_of(model)[name].values())
    record = layers[0].record
    parked = record.parked
    if parked is None:
        return
    _check_local(layers)
    bring_back(layers, _stored(record))
    share_anchors(carriers(model, name), name)
    record.active, record.parked = parked.active, None


@dataclass(eq=False)
class Limit:
    """A soft budget on a model; see `limit`.

    Attributes:
        bytes: for all adapters; None for no limit, but what it offloaded still comes back.
        to: folder for the adapters offloaded; None for CPU memory.
        said: the excess that was last reported.
    """

    bytes: int | None
    to: Path | None = None
    said: int = 0

    def bring(self, model: nn.Module, name: str) -> None:
        """Put an adapter back that a limit offloaded.

        Args:
            model: that carries it.
            name: of the adapter.
        """
        restore(model, name)
        _LOG.info("limit: adapter %r is back on the model.", name)

    def keep(self, model: nn.Module) -> list[str]:
        """Offload the least recently used inactive adapters until the budget is kept.

        Args:
            model: with adapters.

        Returns:
            names of the adapters offloaded.
        """
        if self.bytes is None:
            return []
        gone = []
        idle = [r for r in records_of(model) if not (r.active or r.pins or r.parked)]
        # Nothing is gained by moving from CPU memory to CPU memory.
        idle = [r for r in idle if self.to is not None or not _on_cpu(model, r.name)]
        for record in sorted(idle, key=lambda record: (record.used, record.order)):
            if measure(model).adapters <= self.bytes:
                break
            if self._offload(model, record.name):
                gone.append(record.name)
        self._report(measure(model).adapters)
        return gone

    def _offload(self, model: nn.Module, name: str) -> bool:
        size = measure(model, name).adapters
        try:
            where = "cpu" if self.to is None else self._file(snapshot(model, name), name)
            offload(model, name, where, by_limit=True)
        except TetherError as error:
            _LOG.warning("limit: adapter %r stays on the model: %s", name, error)
            return False
        _LOG.warning(
            "limit: adapter %r (up to %s, inactive) is offloaded to %s; switching to it brings it "
            "back.",
            name,
            readable(size),
            where,
        )
        return True

    def _file(self, adapter: Adapter, name: str) -> str:
        """A name for this very content: no other adapter, run or state is overwritten."""
        assert self.to is not None
        return str(self.to / f"{name}-{only_copy.digest_of(adapter)[:16]}.safetensors")

    def _report(self, live: int) -> None:
        assert self.bytes is not None
        if live > self.bytes and live != self.said:
            _LOG.warning(
                "limit: the adapters in use hold %s, more than the limit of %s; none is left to "
                "offload.",
                readable(live),
                readable(self.bytes),
            )
        self.said = live if live > self.bytes else 0


def limit(
    model: nn.Module,
    bytes: int | None,  # noqa: A002
    to: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Set a soft budget for the memory of all adapters of a model: anchors, factors, gradients.

    Where it is exceeded the least recently used inactive adapters are offloaded, now and after
    every later switch (`only`, `attach`, leaving such a block), and the logger "tether" says so.
    Switching to one of them brings it back first, so for a moment one adapter more is held.
    Adapters that take part, or will again when a block ends, are never offloaded, and nothing is
    ever deleted: if they alone exceed the budget, the logger says that. An adapter that cannot be
    written to `to` stays on the model, and the logger says why.

    Args:
        model: with or without adapters.
        bytes: the budget; None to lift it. What was offloaded stays so until it is used.
        to: folder for the adapters offloaded, one file for each state of each, which you may
            remove when they are no longer offloaded. None for CPU memory; not for a model on the
            CPU, where that would free nothing.

    Returns:
        names of the adapters offloaded now.

    Raises:
        ConfigError: the budget is no number of bytes, or `to` is missing.
    """
    base = original(model)
    if bytes is not None and (type(bytes) is not int or bytes < 0):
        raise ConfigError(f"limit: bytes={bytes!r} must be a whole number of bytes, or None.")
    if bytes is not None and to is None and _on_cpu(base):
        raise ConfigError(
            "limit: the model is on the CPU, where offloading to CPU memory frees nothing. Give "
            "a folder: to='offloaded'."
        )
    folder = None if to is None else Path(os.path.realpath(to))
    if folder is not None:
        fs.make_directory(folder)
    budget = Limit(bytes, folder)
    set_budget(base, budget)
    return budget.keep(base)


def _place(where: str | os.PathLike[str]) -> Path | None:
    """The absolute path of a file, or None for CPU memory."""
    if isinstance(where, str):
        try:
            device = torch.device(where)
        except RuntimeError:
            pass
        else:
            if device.type == "cpu":
                return None
            raise ConfigError(
                f"offload: {where!r} is a device; an adapter is offloaded to 'cpu' or to a file. "
                f"For a file of this name give './{where}'."
            )
    # The real place: the current folder may change before the file is read again.
    return Path(os.path.realpath(where))


def _check_local(layers: list[Layer]) -> None:
    for layer in layers:
        for name, tensor in layer.own().items():
            if is_sharded(tensor):
                raise ShardedWeightError(
                    f"site {layer.path!r}: {name} is a DTensor, whose memory FSDP manages. "
                    "Offload with FSDP's CPUOffloadPolicy, or offload and restore before "
                    "fully_shard."
                )


def _on_cpu(model: nn.Module, name: str | None = None) -> bool:
    """Whether a model, or one adapter's layers, are in CPU memory anyway."""
    layers = None if name is None else layers_of(model)[name].values()
    modules = [model] if layers is None else layers
    return all(p.device.type == "cpu" for module in modules for p in module.parameters())


def _unused_anchors(found: Mapping[str, Mapping[str, Layer]]) -> list[tuple[Anchor, bool]]:
    """The anchors on the model whose adapters are all offloaded, and whether CPU memory needs them.

    Where all their adapters are in files, each file has them.
    """
    unused = []
    for anchor, owners in users(found).items():
        parked = [next(iter(found[owner].values())).record.parked for owner in owners]
        if not anchor.away and None not in parked:
            unused.append((anchor, any(p.path is None for p in parked if p is not None)))
    return unused


def _stored(record: Record) -> Adapter | None:
    """The adapter in the file that it is offloaded to; None where it is in no file."""
    if record.parked is None or record.parked.path is None:
        return None
    return only_copy.read(record.parked.path, record.parked.digest, record.name)
