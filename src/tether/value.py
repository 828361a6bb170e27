"""The values: factors, one site's adapter, a whole adapter.

Frozen, and independent of any live model. The idea in one formula: a site's anchor (A0, B0) is
frozen, its displacement (dA, dB) is trained, and

    ΔW = s·(B·A − B0·A0) = s·(B·dA + dB·A0)      with A = A0 + dA, B = B0 + dB

so a displacement of zero is exactly the base model.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from tether.errors import ConfigError, ShapeMismatchError
from tether.provenance import Provenance

Kind = Literal["linear", "transposed", "embedding", "conv"]
CHILD = "tether"  # the name under which a base module carries its adapters
Progress = Callable[[int, int], None]  # (done, in all)
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight is stored, and its view as an (out, in) matrix.

    Attributes:
        kind: "linear": stored (out, in). "transposed": transformers' Conv1D, stored (in, out).
            "embedding": stored (in, out) = (tokens, width). "conv": stored (out, channels,
            *kernel), in = channels·∏kernel.
        shape: shape of the stored weight.
        common: False for a convolution with a dilation or a padding mode other than zeros, which
            other libraries' LoRA layers ignore; such a site is not exported to them.
    """

    kind: Kind
    shape: tuple[int, ...]
    common: bool = True

    def __post_init__(self) -> None:
        """Check kind and number of dimensions."""
        if self.kind not in get_args(Kind):
            raise ConfigError(f"layout kind {self.kind!r} is none of {get_args(Kind)}.")
        low, high = (3, 5) if self.kind == "conv" else (2, 2)
        if not low <= len(self.shape) <= high or any(n < 1 for n in self.shape):
            raise ConfigError(f"layout {self.kind!r} cannot have shape {self.shape}.")

    @property
    def out_features(self) -> int:
        """Rows of the matrix view."""
        return self.shape[1] if self.kind in ("transposed", "embedding") else self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix view."""
        return math.prod(self.shape) // self.out_features

    def matrix(self, weight: Tensor) -> Tensor:
        """View a stored weight as (out, in), without copying.

        Args:
            weight: of shape `shape`.

        Returns:
            a view (out, in).
        """
        return weight.T if self.kind in ("transposed", "embedding") else weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: view an (out, in) matrix in the weight's own shape.

        Args:
            matrix: (out, in).

        Returns:
            a view of shape `shape`.
        """
        if self.kind in ("transposed", "embedding"):
            return matrix.T
        return matrix.reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A low-rank matrix B·A.

    Attributes:
        A: (r, in), floating.
        B: (out, r), floating.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        """Check that the two fit together."""
        a, b = tuple(self.A.shape), tuple(self.B.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
            raise ShapeMismatchError(
                f"factors A {a} and B {b} do not multiply as B·A. Give A (r, in) and B (out, r), "
                "rank r at least 1."
            )
        if not (self.A.is_floating_point() and self.B.is_floating_point()):
            raise ConfigError(
                f"factors must be floating point, not {self.A.dtype}, {self.B.dtype}."
            )

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product."""
        return self.B.shape[0], self.A.shape[1]

    def to(self, dtype: torch.dtype) -> "Factors":
        """The same factors in another dtype.

        Args:
            dtype: a floating dtype.

        Returns:
            contiguous factors.
        """
        return Factors(self.A.to(dtype).contiguous(), self.B.to(dtype).contiguous())

    def zeros_like(self) -> "Factors":
        """Zero factors of the same shapes: the displacement before training."""
        return Factors(torch.zeros_like(self.A), torch.zeros_like(self.B))


@dataclass(frozen=True, slots=True, eq=False)
class LayerAdapter:
    """One site's adapter.

    Attributes:
        trainable: with an anchor the displacement (dA, dB), zero at the start; without one the
            factors (A, B) themselves.
        anchor: the frozen initial factors (A0, B0), or None.
        scaling: s; alpha/r, or alpha/√r under rsLoRA.
        layout: how the base weight is stored.
        dropout: probability of dropping an input while training, shared by both paths.
    """

    trainable: Factors
    anchor: Factors | None
    scaling: float
    layout: Layout
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check shapes and scaling."""
        here = (self.layout.out_features, self.layout.in_features)
        if self.trainable.shape != here:
            raise ShapeMismatchError(
                f"factors make a matrix {self.trainable.shape}, the layout {self.layout.kind!r} "
                f"{self.layout.shape} views as {here}."
            )
        if self.anchor is not None and (
            self.anchor.shape != here or self.anchor.rank != self.trainable.rank
        ):
            raise ShapeMismatchError(
                f"anchor {self.anchor.shape} of rank {self.anchor.rank} does not fit displacement "
                f"{self.trainable.shape} of rank {self.trainable.rank}."
            )
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise ConfigError(f"scaling {self.scaling} must be finite and positive.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout} is not in [0, 1).")

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the factors, float32 at least: nothing is lost in it."""
        factors = [self.trainable, *([] if self.anchor is None else [self.anchor])]
        dtype = torch.float32
        for tensor in (t for f in factors for t in (f.A, f.B)):
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    @property
    def rank(self) -> int:
        """Rank of the trained factors (a plain LoRA of an anchored site needs twice this)."""
        return self.trainable.rank

    @property
    def current(self) -> Factors:
        """(A, B) = (A0 + dA, B0 + dB), or the trained factors where there is no anchor."""
        if self.anchor is None:
            return self.trainable
        return Factors(self.anchor.A + self.trainable.A, self.anchor.B + self.trainable.B)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A whole adapter: a value that needs no model.

    Attributes:
        layers: site path -> its adapter.
        provenance: where it came from.
        config: the settings it was made with, as JSON values.
        targets: module names that select these sites in the base model (the shortest suffixes
            that do), for files of other libraries; none for the paths themselves.
        excluded: module names that `targets` select besides, to be left out.
    """

    layers: Mapping[str, LayerAdapter]
    provenance: Provenance
    config: Mapping[str, Json] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Freeze the mappings."""
        if not self.layers:
            raise ConfigError("an adapter needs at least one site; this one has none.")
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "config", MappingProxyType(dict(self.config)))
        object.__setattr__(self, "targets", tuple(self.targets) or tuple(self.layers))
        object.__setattr__(self, "excluded", tuple(self.excluded))

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle by value: a mapping proxy can do neither."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"layers": dict(self.layers), "config": dict(self.config)}
        return _rebuild, (values,)

    @property
    def anchored(self) -> bool:
        """Whether any site has an anchor."""
        return any(layer.anchor is not None for layer in self.layers.values())

    def with_provenance(self, **changes: str | int | float | None) -> "Adapter":
        """The same adapter with fields of its provenance replaced.

        Args:
            **changes: fields of Provenance, such as `learning_rate=2e-4`.

        Returns:
            a new adapter that shares the tensors.
        """
        provenance = replace(self.provenance, **changes)  # type: ignore[arg-type]
        return replace(self, provenance=provenance)


def _rebuild(values: dict[str, object]) -> Adapter:
    return Adapter(**values)  # type: ignore[arg-type]
