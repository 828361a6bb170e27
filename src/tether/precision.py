"""What an adapter loses when its plain-LoRA factors are kept in fewer bits. Pure functions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tether import algebra
from tether.errors import UnknownNameError, nearest
from tether.linalg import check_finite
from tether.value import Adapter, Factors, LayerAdapter, Progress

FORMS = ("bfloat16", "float16", "int8")
LEVELS = 127  # int8 without −128: symmetric
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Loss:
    """What rounding costs.

    Attributes:
        sites: site path -> |ΔW − ΔW'|_F / |ΔW|_F; inf where a value does not fit.
        error: the same of all sites together.
    """

    sites: Mapping[str, float]
    error: float


@torch.no_grad()
def rounded(factors: Factors, form: str) -> Factors:
    """The factors as they come back from fewer bits.

    int8 is absmax, symmetric, for each row of A and of B: q = round(127·x / max|x|) in
    −127 … 127, and q·max|x|/127 with the maximum in float32.

    Args:
        factors: floating.
        form: "bfloat16", "float16" or "int8".

    Returns:
        float64.

    Raises:
        UnknownNameError: another form.
    """
    if form not in FORMS:
        raise UnknownNameError(f"{form!r} is no precision to measure. {nearest(form, FORMS)}")
    return Factors(_rounded(factors.A, form), _rounded(factors.B, form))


@torch.no_grad()
def losses(adapter: Adapter, progress: Progress | None = None) -> dict[str, Loss]:
    """Measure what each form costs, on the factors that `save_as_lora` would write.

    They are the plain ones with the scaling folded in and sizes evened out. Computed in float64
    from the factors: with E = B' − B and F = A' − A, B'·A' − B·A = E·A' + B·F, whose norm follows
    from small Gram matrices; nothing large cancels.

    Args:
        adapter: anchored or plain; with DoRA its low-rank part is measured.
        progress: called after each site.

    Returns:
        form -> loss.

    Raises:
        NonFiniteError: a factor holds NaN or Inf.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {form: {} for form in FORMS}
    for done, (path, layer) in enumerate(adapter.layers.items(), start=1):
        for form, measured in _of_site(path, layer).items():
            found[form][path] = measured
        if progress is not None:
            progress(done, len(adapter.layers))
    return {form: _summed(sites) for form, sites in found.items()}


def _of_site(path: str, layer: LayerAdapter) -> dict[str, tuple[float, float]]:
    """Form -> (|ΔW − ΔW'|, |ΔW|)."""
    for factor in (layer.trainable, layer.anchor):
        if factor is not None:
            check_finite(factor.A, f"site {path!r}: A")
            check_finite(factor.B, f"site {path!r}: B")
    balanced = algebra.balanced(layer)
    factors, size = balanced.to(torch.float64), algebra.norm(layer)
    return {form: (_distance(factors, rounded(balanced, form)), size) for form in FORMS}


def _distance(factors: Factors, other: Factors) -> float:
    """|B'·A' − B·A|_F for factors that are nearly the same."""
    e, f = other.B - factors.B, other.A - factors.A
    left, right = torch.cat([e, factors.B], dim=1), torch.cat([other.A, f])
    square = float(((left.T @ left) * (right @ right.T)).sum())
    # What does not fit became Inf, whose differences are NaN. Rounding may leave a zero below 0.
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.inf


def _rounded(factor: Tensor, form: str) -> Tensor:
    if form in _DTYPES:
        return factor.to(_DTYPES[form]).to(torch.float64)
    # Rows of zeros stay so.
    largest = factor.abs().amax(dim=1, keepdim=True).to(torch.float32).double()
    step = torch.where(largest > 0, largest, torch.ones_like(largest)) / LEVELS
    return (factor.double() / step).round().clamp(-LEVELS, LEVELS) * step


def _summed(sites: Mapping[str, tuple[float, float]]) -> Loss:
    size = math.hypot(*(norm for _, norm in sites.values()))
    apart = math.hypot(*(distance for distance, _ in sites.values()))
    shares = {path: _share(distance, norm) for path, (distance, norm) in sites.items()}
    return Loss(shares, _share(apart, size))


def _share(distance: float, size: float) -> float:
    if size == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / size
