"""The values: factors, one site's adapter, a whole adapter.

Frozen, and independent of any live model. The idea in one formula: a site's anchor (A0, B0) is
frozen, its displacement (dA, dB) is trained, and

    ΔW = s·(B·A − B0·A0) = s·(B·dA + dB·A0)      with A = A0 + dA, B = B0 + dB

so a displacement of zero is exactly the base model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

import torch
from torch import Tensor

from tether.errors import ConfigError, ShapeMismatchError
from tether.layout import Kind, Layout
from tether.provenance import Provenance

__all__ = [
    "CHILD",
    "KEPT",
    "Adapter",
    "Factors",
    "Json",
    "Kind",
    "LayerAdapter",
    "Layout",
    "Progress",
    "Trained",
]

CHILD = "tether"  # the name under which a base module carries its adapters
KEPT = "_tether_base_"  # and, with the parameter's name, its own tensor while a merged one is there
Progress = Callable[[int, int], None]  # (done, in all)
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


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
class Trained:
    """A parameter that is trained whole: a bias, a DoRA magnitude, a weight of a saved module.

    The same idea as for factors: the base's own values are the anchor, what moves away from them
    is trained.

    Attributes:
        trainable: with an anchor the displacement, zero at the start; without one the parameter
            itself (a file of another library holds no more). Any shape, floating.
        anchor: the base's own values, or None.
    """

    trainable: Tensor
    anchor: Tensor | None

    def __post_init__(self) -> None:
        """Check that the two fit together."""
        tensors = [self.trainable, *([] if self.anchor is None else [self.anchor])]
        if any(not tensor.is_floating_point() for tensor in tensors):
            raise ConfigError(f"a trained parameter must be floating, not {self.trainable.dtype}.")
        if tensors[0].shape != tensors[-1].shape:
            raise ShapeMismatchError(
                f"anchor {tuple(tensors[-1].shape)} does not fit displacement "
                f"{tuple(tensors[0].shape)}."
            )

    @property
    def current(self) -> Tensor:
        """The parameter now: anchor + displacement."""
        return self.trainable if self.anchor is None else self.anchor + self.trainable


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
        magnitude: DoRA's row lengths m (out,) of the matrix view, or None without DoRA
            (arXiv:2402.09353): W' = m·(W + ΔW)/|W + ΔW|, the lengths taken row by row.
    """

    trainable: Factors
    anchor: Factors | None
    scaling: float
    layout: Layout
    dropout: float = 0.0
    magnitude: Trained | None = None

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
        if self.magnitude is not None and self.magnitude.trainable.shape != here[:1]:
            raise ShapeMismatchError(
                f"magnitude {tuple(self.magnitude.trainable.shape)} does not fit the "
                f"{here[0]} rows of the matrix {here}."
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
        excluded: module names that `targets`, or the paths of `modules` read as endings, select
            besides; to be left out.
        biases: module path -> its trained bias.
        modules: module path -> parameter name -> the parameter, for modules trained whole
            (`modules_to_save`).
    """

    layers: Mapping[str, LayerAdapter]
    provenance: Provenance
    config: Mapping[str, Json] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    biases: Mapping[str, Trained] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, Trained]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Freeze the mappings."""
        if not self.layers:
            raise ConfigError("an adapter needs at least one site; this one has none.")
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "config", MappingProxyType(dict(self.config)))
        object.__setattr__(self, "targets", tuple(self.targets) or tuple(self.layers))
        object.__setattr__(self, "excluded", tuple(self.excluded))
        object.__setattr__(self, "biases", MappingProxyType(dict(self.biases)))
        modules = {path: MappingProxyType(dict(state)) for path, state in self.modules.items()}
        object.__setattr__(self, "modules", MappingProxyType(modules))

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle by value: a mapping proxy can do neither."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"layers": dict(self.layers), "config": dict(self.config)}
        values |= {"biases": dict(self.biases)}
        values |= {"modules": {path: dict(state) for path, state in self.modules.items()}}
        return _rebuild, (values,)

    @property
    def anchored(self) -> bool:
        """Whether any site has an anchor."""
        return any(layer.anchor is not None for layer in self.layers.values())

    @property
    def trained_whole(self) -> Iterator[tuple[str, Trained]]:
        """What is trained beside the factors, as (parameter name, parameter): biases, modules."""
        yield from ((f"{path}.bias", bias) for path, bias in self.biases.items())
        for path, state in self.modules.items():
            yield from ((f"{path}.{name}", value) for name, value in state.items())

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
