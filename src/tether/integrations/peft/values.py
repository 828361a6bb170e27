"""A live peft adapter, whose start is known, as a value: read site by site, nothing is changed."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from tether import sites, whole
from tether.errors import ConfigError, ShapeMismatchError, UnsupportedAdapterError
from tether.integrations.peft.find import trained_biases
from tether.integrations.peft.live import Live
from tether.integrations.peft.originals import Base
from tether.integrations.peft.place import Place
from tether.integrations.peft.starts import Start, Tracker
from tether.layers.record import to_value
from tether.provenance import Provenance
from tether.source import Source, sketch, sketch_trained
from tether.start import base_class, base_name
from tether.value import Adapter, Factors, LayerAdapter, Trained

# peft's init_lora_weights that are no names.
_METHODS = {"True": "lora", "False": "unknown"}


def source_of(live: Live, tracker: Tracker, name: str, start: Start, base: Base | None) -> Source:
    """An adapter whose start is known, to be read site by site.

    Args:
        live: the peft model.
        tracker: of it.
        name: of the adapter.
        start: of the adapter.
        base: the folder of the base, or None.

    Returns:
        a source whose values are copied from the model when they are asked for.

    Raises:
        UnsupportedAdapterError: something that a LoRA cannot say, by name.
    """
    places, saved, config = live.sites(name), live.saved(name), live.config(name)

    def layer(path: str) -> LayerAdapter:
        dora = places[path].magnitude(name) is not None
        weight = _original(tracker, places[path], base) if dora else None
        return _layer(places[path], name, start, weight)

    def bias(path: str) -> Trained:
        now = live.places[path].module.get_parameter("bias")
        return _trained(to_value(now), start.biases.get(path))

    def module(path: str, key: str) -> Trained:
        place = saved[path]
        original = dict(place.module.named_parameters()).get(key)
        anchor = None if original is None else to_value(original)
        return _trained(to_value(place.saved.modules_to_save[name].get_parameter(key)), anchor)

    targets, excluded = sites.short_targets(_skeleton(live), list(places))
    about = Adapter(
        layers={path: sketch(layer(path)) for path in places},
        provenance=Provenance(
            method=_METHODS.get(str(start.method), str(start.method)),
            base_model=config.base_model_name_or_path or base_name(live.base),
            base_class=base_class(live.base),
            fingerprints={p: f for p, f in tracker.fingerprints.items() if p in places},
        ),
        targets=targets,
        excluded=excluded,
        biases={path: sketch_trained(bias(path)) for path in trained_biases(live, name)},
        modules={
            path: {key: sketch_trained(module(path, key)) for key in _keys(place, name)}
            for path, place in saved.items()
        },
    )
    return Source(about, layer, bias, module)


def take(source: Source) -> Adapter:
    """The value that a source reads.

    Args:
        source: of a live adapter.

    Returns:
        copies on the CPU.
    """
    about = source.about
    return replace(
        about,
        layers={path: source.layer(path) for path in about.layers},
        biases={path: source.bias(path) for path in about.biases},
        modules={
            path: {key: source.module(path, key) for key in state}
            for path, state in about.modules.items()
        },
    )


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


def _keys(place: Place, name: str) -> list[str]:
    """The parameters of a module trained whole; peft keeps the original beside it."""
    copy, before = place.saved.modules_to_save[name], dict(place.module.named_buffers())
    for key, buffer in copy.named_buffers():
        if key not in before or not torch.equal(buffer.cpu(), before[key].cpu()):
            raise UnsupportedAdapterError(
                f"module {place.path!r} of modules_to_save: its buffer {key!r} changed in training "
                "and is no parameter; without it the adapter would be another one."
            )
    return [key for key, _ in copy.named_parameters()]


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
