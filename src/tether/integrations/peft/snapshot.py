"""track, snapshot and save_as_lora: a live peft adapter as a value. The model is only read."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tether.conversion import ConversionReport
from tether.errors import (
    BaseMismatchError,
    ConfigError,
    UntrackedError,
)
from tether.export import save_as_lora as export_as_lora
from tether.integrations.peft.find import begin, find
from tether.integrations.peft.live import Live, is_peft
from tether.integrations.peft.originals import Base
from tether.integrations.peft.starts import Tracker
from tether.integrations.peft.values import source_of, take
from tether.source import Source
from tether.value import Adapter

Folder = str | os.PathLike[str]


@torch.no_grad()
def track(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    anchor: Folder | None = None,
    base: Folder | None = None,
) -> Tracker:
    """Remember how the adapters of a peft model start. Call it right after `get_peft_model`.

    Copies A0 and B0, and the biases that are trained, to the CPU; no files. They are kept on the
    model, outside its state dict; copies and pickles of the model take them along. Call it again
    after `add_adapter`: what is tracked already stays as it is. An adapter that is deleted and made
    again under its name is another one.

    That training has begun cannot be seen in general. It is noticed, and refused, where factors
    have gradients; for pissa, pissa_niter_* and olora on float32 weights, where the factors are
    not orthogonal to what is left of the weight; and with `base`, everywhere that factors and
    weight do not make up the original within rounding.

    Args:
        model: a PeftModel; only read.
        adapter_name: of one adapter; None for all (for the only active one with `anchor`).
        anchor: folder of the adapter as `save_pretrained` wrote it before training, if training has
            begun.
        base: folder that the base model was loaded from, to check against; its fingerprints go
            into what is saved. With it, training may have begun: the start is then found from what
            is missing in the weights.

    Returns:
        what is tracked now.

    Raises:
        UntrackedError: training has begun.
        BaseMismatchError: the weights are not those of `base` without the factors.
        FormatError: a folder is not what it should be.
        MergedError: an adapter is merged into the base.
        UnsupportedAdapterError: an adapter holds something that a LoRA cannot say.
    """
    live = Live.of(model)
    tracker = Tracker.of(live)
    opened = None if base is None else Base.open(base, live)
    all_of_them = adapter_name is None and anchor is None
    for name in live.names if all_of_them else (live.name(adapter_name),):
        if anchor is not None or name in tracker.adapters:
            find(live, tracker, name, None if anchor is None else Path(anchor), opened)
            continue
        try:
            begin(live, tracker, name, opened)
        except (UntrackedError, BaseMismatchError):
            if opened is None:
                raise
            tracker.adapters.pop(name, None)
            find(live, tracker, name, None, opened)
    tracker.keep(live)
    return tracker


@torch.no_grad()
def snapshot(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    anchor: Folder | None = None,
    base: Folder | None = None,
) -> Adapter:
    """A live peft adapter as a value: what training changed, for the original base.

    Where the start was taken out of the weights (pissa, pissa_niter_*, olora, corda, lora_ga), the
    sites are anchored: ΔW = s·(B·A − B0·A0), the adapter's own change, whatever other adapters took
    out of the same weights. With all of several such adapters active, peft's output is that of the
    original base with the sum of their changes; with one of them, it lacks the others' parts.

    Args:
        model: a PeftModel; only read.
        adapter_name: None for the only one, or the only active one.
        anchor: folder of the adapter as `save_pretrained` wrote it before training; needed where
            `track` was not called.
        base: folder that the base model was loaded from. Weights and start are checked against it;
            where `track` was not called and there is no `anchor`, the start is found from what is
            missing in the weights beside it.

    Returns:
        float32 (or float64) copies on the CPU. Biases and modules trained whole are in it; of a
        DoRA magnitude and a bias whose start is not at hand, the value itself.

    Raises:
        UntrackedError: how the adapter started is not known.
        MergedError: an adapter is merged into the base.
        BaseMismatchError: weights, start and `base` do not fit together.
        UnsupportedAdapterError: something that a LoRA cannot say, by name.
    """
    return take(_source(model, adapter_name, anchor, base))


@torch.no_grad()
def save_as_lora(
    model: nn.Module,
    path: Folder,
    *,
    adapter_name: str | None = None,
    anchor: Folder | None = None,
    base: Folder | None = None,
    **options: Any,
) -> ConversionReport:
    """Write a live peft adapter as a plain LoRA for the original base. The model is only read.

    Args:
        model: a PeftModel.
        path: of the folder to write.
        adapter_name: None for the only adapter, or the only active one.
        anchor: as of `snapshot`.
        base: as of `snapshot`.
        **options: of `tether.save_as_lora`.

    Returns:
        the measured report.

    Raises:
        ConfigError: `path` is one of the folders that are read.
        UntrackedError: how the adapter started is not known.
        WriteError: it cannot be written; what was there stays.
    """
    for folder in (anchor, base):
        if folder is not None and os.path.realpath(folder) == os.path.realpath(path):
            raise ConfigError(f"{path}: is read, and would be replaced. Write to another folder.")
    return export_as_lora(_source(model, adapter_name, anchor, base), path, **options)


def read(source: object) -> Adapter | None:
    """The value of a live peft model, for `tether.save_as_lora`.

    Args:
        source: anything.

    Returns:
        the only adapter, or the only active one; None if this is no peft model with a LoRA.
    """
    return snapshot(source) if is_peft(source) else None  # type: ignore[arg-type]


def _source(
    model: nn.Module, adapter_name: str | None, anchor: Folder | None, base: Folder | None
) -> Source:
    live = Live.of(model)
    name = live.name(adapter_name)
    opened = None if base is None else Base.open(base, live)
    tracker = Tracker.of(live)
    start = find(live, tracker, name, None if anchor is None else Path(anchor), opened)
    return source_of(live, tracker, name, start, opened)
