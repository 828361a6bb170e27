"""How an adapter of a peft model started: as tracked, as saved, or as missing in the weights."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tether.errors import UnsupportedAdapterError, UntrackedError
from tether.fingerprints import fingerprint_tensor
from tether.integrations.peft import originals
from tether.integrations.peft.folder import read_start
from tether.integrations.peft.live import Live, method, splits
from tether.integrations.peft.originals import Base, Part
from tether.integrations.peft.place import Place
from tether.integrations.peft.starts import Start, Tracker
from tether.layers.record import to_value

# Rounding of float32 gives 2e-7 on SmolLM2, one step of AdamW at 2e-5 already 8e-6.
_ORTHOGONAL = 3e-6
# There peft's PiSSA leaves singular values of 3e-6 of the largest, and the next is 30 times that;
# without it, as many are 5e-4 and the next is beside them.
_VANISHING, _GAP = 1e-5, 10


def find(live: Live, tracker: Tracker, name: str, anchor: Path | None, base: Base | None) -> Start:
    """How an adapter started, from whatever says so.

    Args:
        live: the peft model.
        tracker: of it; the start, and fingerprints of the base's weights, are added.
        name: of the adapter.
        anchor: folder of the adapter as it was saved before training, or None.
        base: the folder of the base, or None.

    Returns:
        the start: from `anchor`; else as tracked; else from what is missing in the weights beside
        `base`; else, for an adapter that takes nothing out of the weights, known by itself.

    Raises:
        UntrackedError: none of these says it.
        BaseMismatchError: weights, start and `base` do not fit together.
    """
    config = live.config(name)
    if anchor is not None:
        parts, biases = read_start(live, name, anchor)
        start = Start(method(config), {p: _unless_zero(part) for p, part in parts.items()}, biases)
    elif name in tracker.adapters:
        start = tracker.adapters[name]
    elif base is not None:
        start = Start(method(config), _recovered(live, tracker, name, base))
    else:
        start = _plain(live, tracker, name)
    if base is not None and not start.biases:
        biases = {
            path: to_value(base.tensor(live.places[path], "bias"))
            for path in trained_biases(live, name)
        }
        start = replace(start, biases=biases)
    _refuse_broken(live, name, start)
    marks = {path: place.mark(name) for path, place in live.sites(name).items()}
    tracker.adapters[name] = start = replace(start, marks=marks)
    if base is not None:
        _verify(live, tracker, name, base)
    tracker.identify(live, name)
    return start


def begin(live: Live, tracker: Tracker, name: str, base: Base | None) -> Start:
    """The start of an adapter that has not been trained yet: its factors now.

    Args:
        live: the peft model.
        tracker: of it; the start, and fingerprints of the base's weights, are added.
        name: of the adapter.
        base: the folder of the base, or None.

    Returns:
        the start.

    Raises:
        UntrackedError: training has begun.
        BaseMismatchError: weights, factors and `base` do not fit together.
    """
    config = live.config(name)
    parts: dict[str, Part | None] = {}
    for path, place in live.sites(name).items():
        if any(parameter.grad is not None for parameter in place.parameters(name)):
            raise UntrackedError(
                f"site {path!r}: the factors of adapter {name!r} have gradients, so training may "
                "have begun. Call track() right after get_peft_model; if no step has been taken "
                "yet, clear them first with model.zero_grad()."
            )
        parts[path] = _part_now(live, tracker, place, name, base)
    biases = {
        path: to_value(live.places[path].module.get_parameter("bias"))
        for path in trained_biases(live, name)
    }
    start = Start(method(config), parts, biases)
    _refuse_broken(live, name, start)
    tracker.adapters[name] = start
    return find(live, tracker, name, None, base)


def trained_biases(live: Live, name: str) -> list[str]:
    """The modules whose bias an adapter trains, as peft selects them.

    Args:
        live: the peft model.
        name: of the adapter.

    Returns:
        paths; those in modules trained whole are not among them.
    """
    setting = live.config(name).bias
    if setting == "none":
        return []
    whole = tuple(live.saved(name))
    return [
        path
        for path, place in live.places.items()
        if place.module._parameters.get("bias") is not None
        and (setting == "all" or name in place.adapters)
        and not any(path == other or path.startswith(other + ".") for other in whole)
    ]


def _refuse_broken(live: Live, name: str, start: Start) -> None:
    """Starts with which the model was another one than the base before any training."""
    for path in (path for path, part in start.parts.items() if part is not None):
        if start.method == "olora" and live.places[path].layout.kind == "transposed":
            raise UnsupportedAdapterError(
                f"site {path!r}: peft's OLoRA takes its part out of a Conv1D the wrong way round, "
                "so the model was wrong before training. Start with another init_lora_weights."
            )
        tied = [other for other in live.sharing[path] if other != path]
        if tied:
            raise UnsupportedAdapterError(
                f"site {path!r}: its weight is tied to that of {tied[0]!r}, out of which peft took "
                f"the part of adapter {name!r} as well, so the model was wrong before training. "
                "Untie them first, or leave the module out of target_modules."
            )


def _unless_zero(part: Part) -> Part | None:
    """None where B·A is zero by itself: nothing was taken out of the weight."""
    return part if part.factors.A.any() and part.factors.B.any() else None


def _part_now(
    live: Live, tracker: Tracker, place: Place, name: str, base: Base | None
) -> Part | None:
    part = _unless_zero(Part(place.factors(name), place.scaling(name), place.layout))
    if part is None or not place.linear:
        return None
    config = live.config(name)
    if splits(config):
        broken = method(config) == "olora" and place.layout.kind == "transposed"
        if base is None and not broken and method(config) not in ("corda", "lora_ga"):
            _refuse_trained(tracker, place, name, part)
        return part
    # By its configuration a plain start. But peft's recipe for saving an initial PiSSA sets
    # init_lora_weights to True on the live adapter, after the weights were split.
    if base is not None:
        return None if torch.equal(base.tensor(place), place.weight.cpu()) else part
    overlap = _overlap(place, part)
    return part if overlap is not None and overlap < _ORTHOGONAL else None


def _refuse_trained(tracker: Tracker, place: Place, name: str, part: Part) -> None:
    if len(place.adapters) > 1 or tracker.parts(place.path):
        return
    overlap = _overlap(place, part)
    if overlap is not None and overlap > _ORTHOGONAL:
        raise UntrackedError(
            f"site {place.path!r}: the factors of adapter {name!r} are not those that it started "
            f"with: they and what is left of the weight are {overlap:.1e} of its norm from what a "
            f"start leaves; rounding explains {_ORTHOGONAL:g}. Training has begun, or a trained "
            "adapter was loaded. Give the folder of the adapter as it was before training "
            "(anchor=), or that of the base model (base=)."
        )


def _overlap(place: Place, part: Part) -> float | None:
    """How far factors and residual are from what a start leaves, relative to their norms.

    PiSSA leaves B0ᵀ·W_res = 0 or, of the randomised SVD of a wide weight, only W_res·A0ᵀ = 0.
    OLoRA, whose product is not divided by s, leaves B0ᵀ·W_res = (1 − s)·A0. Whichever is nearest
    counts. None where rounding hides it.
    """
    weight = place.weight
    exact = torch.get_float32_matmul_precision() == "highest"
    if weight.dtype != torch.float32 or not exact or not weight.any():
        return None
    matrix = place.layout.matrix(weight)
    a, b = part.factors.A.to(matrix), part.factors.B.to(matrix)
    left, right = b.T @ matrix, matrix @ a.T
    nearest = min(
        float(left.norm() / b.norm()),
        float((left - (1 - part.scaling) * a).norm() / b.norm()),
        float(right.norm() / a.norm()),
    )
    return nearest / float(matrix.norm() + part.scaling * (b @ a).norm())


def _plain(live: Live, tracker: Tracker, name: str) -> Start:
    """The start of an adapter of which nothing is known but its configuration."""
    config, sites = live.config(name), live.sites(name)
    advice = (
        "Call track() right after get_peft_model, or give the folder of the adapter as it was "
        "saved before training (anchor=), or that of the base model (base=)."
    )
    if splits(config) and any(place.linear for place in sites.values()):
        raise UntrackedError(
            f"adapter {name!r} was made with init_lora_weights={method(config)!r}, which takes a "
            f"part out of the base's weights; without the factors it started with, its change is "
            f"not known. {advice}"
        )
    place = _telltale(tracker, sites)
    if place is not None and _is_residual(place, name):
        raise UntrackedError(
            f"adapter {name!r} has init_lora_weights={method(config)!r} in its configuration, but "
            f"at {place.path!r} the base's weight lacks as many directions as the adapter has, as "
            f"if a part had been taken out of it (pissa, olora, …). {advice}"
        )
    return Start(method(config), dict.fromkeys(sites))


def _telltale(tracker: Tracker, sites: Mapping[str, Place]) -> Place | None:
    """The smallest weight that would show whether parts were taken out."""
    known = [
        place
        for path, place in sites.items()
        if place.linear
        and not tracker.parts(path)
        and len(place.adapters) == 1
        and place.readable
        and place.weight.dtype == torch.float32
    ]
    return min(known, key=lambda place: math.prod(place.layout.shape), default=None)


def _is_residual(place: Place, name: str) -> bool:
    """Whether as many singular values as the adapter's rank are zero but for rounding."""
    values = torch.linalg.svdvals(place.layout.matrix(place.weight).cpu().double())
    rank = place.factors(name).rank
    if rank >= len(values):
        return False
    vanishing = values[-rank] < _VANISHING * values[0]
    return bool(vanishing and _GAP * values[-rank] < values[-rank - 1])


def _recovered(live: Live, tracker: Tracker, name: str, base: Base) -> dict[str, Part | None]:
    """The parts that an adapter took out, from what is missing in the weights."""
    found: dict[str, Part | None] = {}
    for path, place in live.sites(name).items():
        known, unknown = tracker.parts(path), tracker.unknown(live, path)
        found[path] = None
        weight = base.tensor(place)
        if not place.linear or (not known and torch.equal(weight, place.weight.cpu())):
            continue
        if len(unknown) > 1:
            raise UntrackedError(
                f"site {path!r}: adapters {unknown} both took a part out of the weight; what is "
                "missing in it cannot be told apart. Give the folder of one of them as it was "
                "saved before training: track(model, adapter_name, anchor=folder)."
            )
        if unknown == [name]:
            taken = weight.double() - originals.put_together(place.weight, known)
            current = Part(place.factors(name), place.scaling(name), place.layout)
            found[path] = originals.recover(taken, current)
    return found


def _verify(live: Live, tracker: Tracker, name: str, base: Base) -> None:
    """Check weights, parts and base against each other, and take the base's fingerprints."""
    for path, place in live.sites(name).items():
        weight: Tensor = base.tensor(place)
        if not tracker.unknown(live, path):
            originals.check(place, weight, tracker.parts(path), base.checkpoint.folder)
        tracker.fingerprints[path] = fingerprint_tensor(weight)
