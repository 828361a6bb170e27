"""Where the initial factors of a PEFT adapter can come from, one site at a time.

- `Saved`: the adapter as it was saved before training.
- `Subtracted`: the base model minus the residual model.
- `recompute.Recomputed`: the base model, by a start that it alone determines.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tether.checkpoint import Checkpoint
from tether.errors import RescueError, ShapeMismatchError
from tether.fingerprints import fingerprint_tensor
from tether.linalg import check_finite
from tether.provenance import Fingerprint
from tether.rescue import product
from tether.rescue.folder import PeftFolder, coarseness
from tether.rescue.product import Product
from tether.value import Factors, LayerAdapter, Layout

_LEFT_OVER = 1e-3  # of |P|, besides rounding: products in reduced precision (TF32) leave 4e-4
_DROWNED = 0.3  # of |P|: more rounding than this, and the anchor cannot be told from it


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The initial factors of one site.

    Attributes:
        anchor: A0, B0, float64.
        product: s·B0·A0.
        left_over: |P − s·B0·A0|_F / |P|_F of a difference P of two models, else 0.
        gap: how clearly the base determines the start, in (0, 1]: 1 − σ_{r+1}/σ_r of PiSSA, σ_r/σ_1
            of the leading columns of OLoRA; None where it was not recomputed.
        error: estimate of what is wrong in ΔW, Frobenius.
        fingerprint: of the base's weight, where there is a base.
    """

    anchor: Factors
    product: Product
    left_over: float = 0.0
    gap: float | None = None
    error: float = 0.0
    fingerprint: Fingerprint | None = None


class Source(Protocol):
    """Gives the initial factors, site by site."""

    def find(self, site: str, layer: LayerAdapter) -> Found:
        """The initial factors of one site.

        Args:
            site: its path.
            layer: its trained factors.

        Returns:
            what was found.
        """
        ...


@dataclass(frozen=True, slots=True)
class Saved:
    """The adapter as it was saved before training.

    Attributes:
        adapter: the trained one.
        initial: the untrained one; checked against it when made.
        base: the base model, for its fingerprints alone, or None.
    """

    adapter: PeftFolder
    initial: PeftFolder
    base: Checkpoint | None = None

    def __post_init__(self) -> None:
        """Check that the two folders are of one adapter."""
        advice = "Give the adapter that was saved before this training."
        for one, other in ((self.adapter, self.initial), (self.initial, self.adapter)):
            for site in one.shapes.layers:
                if site not in other.shapes.layers:
                    raise RescueError(
                        f"site {site!r}: is in {one.path}, not in {other.path}. {advice}"
                    )
        for site, layer in self.adapter.shapes.layers.items():
            for name, mine, theirs in _facts(layer, self.initial.shapes.layers[site]):
                if mine != theirs:
                    raise RescueError(
                        f"site {site!r}: {name} is {mine} in {self.adapter.path}, {theirs} in "
                        f"{self.initial.path}. {advice}"
                    )
        trained, start = (
            folder.config.get("init_lora_weights", True) for folder in (self.adapter, self.initial)
        )
        # peft's own recipe sets it to True before the adapter is saved.
        if trained != start and True not in (trained, start):
            raise RescueError(
                f"{self.adapter.path} started from {trained!r}, {self.initial.path} from "
                f"{start!r}. {advice}"
            )

    def find(self, site: str, layer: LayerAdapter) -> Found:
        """The factors in the other folder, exactly.

        Args:
            site: its path.
            layer: its trained factors.

        Returns:
            what was found; `error` is that of rounding one of the files to a coarser dtype.
        """
        anchor = self.initial.layer(site).trainable.to(torch.float64)
        part = product.of_factors(anchor, layer.scaling)
        rounded = [coarseness(folder.dtypes[site]) for folder in (self.adapter, self.initial)]
        error = max(rounded) * part.norm if rounded[0] != rounded[1] else 0.0
        if self.base is None:
            return Found(anchor, part, error=error)
        weight = read_weight(self.base, site, layer.layout)
        return Found(anchor, part, error=error, fingerprint=fingerprint_tensor(weight))


@dataclass(frozen=True, slots=True)
class Subtracted:
    """The base model minus the residual model.

    Attributes:
        base: the model that training started from.
        residual: the model that was saved without the adapter.
    """

    base: Checkpoint
    residual: Checkpoint

    def find(self, site: str, layer: LayerAdapter) -> Found:
        """P = W − W_res, cut to the rank of the adapter.

        Args:
            site: its path.
            layer: its trained factors.

        Returns:
            what was found; `error` is what is left over, P − s·B0·A0: by this the base and ΔW
            differ from the residual model and the adapter.

        Raises:
            RescueError: more is left over than rounding explains.
        """
        weight = read_weight(self.base, site, layer.layout)
        residual = read_weight(self.residual, site, layer.layout)
        view = layer.layout.matrix
        part = product.of_difference(view(weight), view(residual), layer.trainable)
        whole = math.hypot(part.norm, part.left_over)
        left_over = part.left_over / whole if whole > 0 else 0.0
        allowed = min(part.noise + _LEFT_OVER * whole, _DROWNED * whole)
        if part.left_over > allowed:
            raise RescueError(
                f"site {site!r}: base − residual is not of rank {layer.rank}: {left_over:.2%} of "
                f"it is left over, and at most {allowed / whole:.2%} can be rounding. "
                + _reason(part, whole, self)
            )
        anchor = product.nearest(part, layer.trainable, layer.scaling)
        print_ = fingerprint_tensor(weight)
        return Found(anchor, part, left_over, error=part.left_over, fingerprint=print_)


def read_weight(model: Checkpoint, site: str, layout: Layout) -> Tensor:
    """Read the weight of one site.

    Args:
        model: on disk.
        site: its path.
        layout: how the adapter says it is stored.

    Returns:
        the weight, in the model's dtype.

    Raises:
        RescueError: it is not floating point.
        ShapeMismatchError: its shape is another.
        NonFiniteError: it holds NaN or Inf.
    """
    name = model.weight_name(site)
    dtype, shape = model.dtype(name), model.shape(name)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise RescueError(
            f"site {site!r}: {model.folder} stores {name!r} as {dtype}. Give the model in float32, "
            "bfloat16 or float16."
        )
    if shape != layout.shape:
        raise ShapeMismatchError(
            f"site {site!r}: {name!r} is {shape} in {model.folder}, the adapter was trained on "
            f"{layout.shape}. Give the model that it was trained on."
        )
    weight = model.tensor(name)
    check_finite(weight, f"site {site!r}: {name!r} in {model.folder}")
    return weight


def _facts(one: LayerAdapter, other: LayerAdapter) -> tuple[tuple[str, object, object], ...]:
    return (
        ("the weight's shape", one.layout, other.layout),
        ("the rank", one.rank, other.rank),
        ("the scaling", one.scaling, other.scaling),
    )


def _reason(part: Product, whole: float, models: Subtracted) -> str:
    if part.noise >= _DROWNED * whole:
        return (
            "The models are stored too coarsely for so small an anchor; give the adapter that was "
            "saved before training (anchor)."
        )
    return (
        f"{models.residual.folder} is not what this adapter's training left of "
        f"{models.base.folder}: give the two that it was trained with."
    )
