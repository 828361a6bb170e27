"""track, snapshot and save_as_lora: a live peft adapter as a value. The model is only read."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tether import sites, whole
from tether.conversion import ConversionReport
from tether.errors import (
    BaseMismatchError,
    ConfigError,
    ShapeMismatchError,
    UnsupportedAdapterError,
    UntrackedError,
)
from tether.export import save_as_lora as export_as_lora
from tether.integrations.peft.find import begin, find, trained_biases
from tether.integrations.peft.live import Live, is_peft
from tether.integrations.peft.originals import Base
from tether.integrations.peft.place import Place
from tether.integrations.peft.starts import Start, Tracker
from tether.layers.record import to_value
from tether.provenance import Provenance
from tether.start import base_class, base_name
from tether.value import Adapter, Factors, LayerAdapter, Trained

Folder = str | os.PathLike[str]
# peft's init_lora_weights that are no names.
_METHODS = {"True": "lora", "False": "unknown"}


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
    live = Live.of(model)
    name = live.name(adapter_name)
    opened = None if base is None else Base.open(base, live)
    tracker = Tracker.of(live)
    start = find(live, tracker, name, None if anchor is None else Path(anchor), opened)
    return take(live, tracker, name, start, opened)


def take(live: Live, tracker: Tracker, name: str, start: Start, base: Base | None) -> Adapter:
    """The value of an adapter whose start is known.

    Args:
        live: the peft model.
        tracker: of it.
        name: of the adapter.
        start: of the adapter.
        base: the folder of the base, or None.

    Returns:
        copies on the CPU.

    Raises:
        UnsupportedAdapterError: something that a LoRA cannot say, by name.
    """
    places, config = live.sites(name), live.config(name)
    layers = {}
    for path, place in places.items():
        dora = place.magnitude(name) is not None
        weight = _original(tracker, place, base) if dora else None
        layers[path] = _layer(place, name, start, weight)
    targets, excluded = sites.short_targets(_skeleton(live), list(layers))
    return Adapter(
        layers=layers,
        provenance=Provenance(
            method=_METHODS.get(str(start.method), str(start.method)),
            base_model=config.base_model_name_or_path or base_name(live.base),
            base_class=base_class(live.base),
            fingerprints={p: f for p, f in tracker.fingerprints.items() if p in layers},
        ),
        targets=targets,
        excluded=excluded,
        biases={
            path: _trained(
                to_value(live.places[path].module.get_parameter("bias")), start.biases.get(path)
            )
            for path in trained_biases(live, name)
        },
        modules={path: _module(place, name) for path, place in live.saved(name).items()},
    )


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
    adapter = snapshot(model, adapter_name, anchor=anchor, base=base)
    return export_as_lora(adapter, path, **options)


def read(source: object) -> Adapter | None:
    """The value of a live peft model, for `tether.save_as_lora`.

    Args:
        source: anything.

    Returns:
        the only adapter, or the only active one; None if this is no peft model with a LoRA.
    """
    return snapshot(source) if is_peft(source) else None  # type: ignore[arg-type]


def _layer(place: Place, name: str, start: Start, weight: Tensor | None) -> LayerAdapter:
    part, scaling, current = start.parts[place.path], place.scaling(name), place.factors(name)
    trainable, anchor = current, None
    if part is not None:
        if scaling != part.scaling:
            raise UnsupportedAdapterError(
                f"site {place.path!r}: the scaling is {scaling:g} now and was {part.scaling:g} at "
                "the start, so that the adapter no longer stands for the part that was taken out. "
                "Set it back with set_scale(adapter_name, 1) or unscale_layer()."
            )
        anchor = part.factors
        trainable = Factors(current.A - anchor.A, current.B - anchor.B)
    try:
        return LayerAdapter(
            trainable=trainable,
            anchor=anchor,
            scaling=scaling,
            layout=place.layout,
            dropout=place.dropout(name),
            magnitude=_magnitude(place, name, weight),
        )
    except (ConfigError, ShapeMismatchError) as error:
        raise type(error)(f"site {place.path!r}: {error}") from error


def _original(tracker: Tracker, place: Place, base: Base | None) -> Tensor | None:
    """The original weight of a site, if it is at hand."""
    if base is not None:
        return base.tensor(place)
    # It has a fingerprint, and nothing was taken out of it: it is the one in the model.
    here = place.path in tracker.fingerprints and not tracker.parts(place.path)
    return place.weight if here else None


def _magnitude(place: Place, name: str, weight: Tensor | None) -> Trained | None:
    """DoRA's magnitude; its anchor are the row lengths of the original weight, if that is at hand.

    Not those that peft started with: it rounds them to the weight's dtype.
    """
    parameter = place.magnitude(name)
    if parameter is None:
        return None
    value = to_value(parameter).flatten()
    if weight is None:
        return Trained(value, None)
    return _trained(value, whole.row_lengths(place.layout.matrix(weight)).anchor)


def _module(place: Place, name: str) -> dict[str, Trained]:
    """The parameters of a module trained whole; peft keeps the original beside it."""
    copy, original = place.saved.modules_to_save[name], place.module
    known = dict(original.named_parameters())
    before = dict(original.named_buffers())
    for key, buffer in copy.named_buffers():
        if key not in before or not torch.equal(buffer.cpu(), before[key].cpu()):
            raise UnsupportedAdapterError(
                f"module {place.path!r} of modules_to_save: its buffer {key!r} changed in training "
                "and is no parameter; without it the adapter would be another one."
            )
    return {
        key: _trained(to_value(parameter), to_value(known[key]) if key in known else None)
        for key, parameter in copy.named_parameters()
    }


def _trained(value: Tensor, anchor: Tensor | None) -> Trained:
    return Trained(value if anchor is None else value - anchor, anchor)


def _skeleton(live: Live) -> nn.Module:
    """Empty modules with the base's own paths, without peft's between them."""
    root = nn.Module()
    modules: dict[str, nn.Module] = {"": root}
    for path in live.places:
        parent, _, last = path.rpartition(".")
        if path:
            modules[path] = nn.Module()
            modules[parent].add_module(last, modules[path])
    return root
