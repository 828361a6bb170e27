"""W + ΔW block by block: beside the weight itself only one block is held in float32."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tether import algebra
from tether.errors import BaseMismatchError
from tether.linalg import check_finite
from tether.value import Factors, LayerAdapter, Layout, Trained

_BLOCK = 1 << 18  # values: some MiB in all, and they stay in the cache

# Views of the weight and of the result; the values to write there; what they are changed by.
_Blocks = Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Change:
    """How much one tensor changed.

    Attributes:
        norm: |ΔW|_F.
        error: |(W' − W) − ΔW|_F / |ΔW|_F, W' as written: what rounding took; 0 where ΔW is 0.
    """

    norm: float
    error: float


@torch.no_grad()
def add(
    weight: Tensor,
    change: LayerAdapter | Trained,
    dtype: torch.dtype,
    name: str,
    verify: bool = True,
) -> tuple[Tensor, Change]:
    """W + ΔW, in float32 (float64 if W is), rounded once.

    Under DoRA W' = m·(W + ΔW)/|W + ΔW| row by row of the matrix view (arXiv:2402.09353, eq. 5); a
    row of zeros stays one.

    Args:
        weight: of the base, as stored; overwritten where `dtype` is its own.
        change: a site's adapter, or a parameter trained whole.
        dtype: of the result.
        name: of the tensor, for messages.
        verify: check that the base's own values are the ones a parameter was trained from.

    Returns:
        the result, and how much it changed.

    Raises:
        NonFiniteError: a value of the result is NaN or Inf in `dtype`.
        BaseMismatchError: a parameter was trained from other values.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    result = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    if isinstance(change, LayerAdapter):
        blocks = _site_blocks(weight, result, change, work)
    else:
        blocks = _trained_blocks(weight, result, change, work, name if verify else None)
    square = lost = 0.0
    for old, new, wanted, delta in blocks:
        before = old.to(torch.float64, copy=True)
        new.copy_(wanted)
        square += float(torch.linalg.vector_norm(delta)) ** 2
        before.neg_().add_(new).sub_(delta)
        lost += float(torch.linalg.vector_norm(before)) ** 2
    if not math.isfinite(lost):
        check_finite(result, f"{name!r} merged, in {dtype}")
    norm = math.sqrt(square)
    return result, Change(norm, math.sqrt(lost) / norm if norm else 0.0)


def _site_blocks(weight: Tensor, result: Tensor, layer: LayerAdapter, work: torch.dtype) -> _Blocks:
    old, new = layer.layout.matrix(weight), layer.layout.matrix(result)
    out_features, in_features = old.shape
    # Blocks lie along the weight in memory. DoRA needs whole rows of the matrix.
    columns = layer.layout.kind in ("transposed", "embedding") and layer.magnitude is None
    length, across = (in_features, out_features) if columns else (out_features, in_features)
    step = max(1, _BLOCK // across)
    for start in range(0, length, step):
        part, every = slice(start, start + step), slice(None)
        rows, cols = (every, part) if columns else (part, every)
        wide = old[rows, cols].to(work)
        delta = algebra.delta(_part(layer, rows, cols, work), wide)
        yield old[rows, cols], new[rows, cols], wide + delta, delta


def _part(layer: LayerAdapter, rows: slice, cols: slice, work: torch.dtype) -> LayerAdapter:
    """Some rows and columns of a site's matrix, as a site of its own."""

    def cut(factors: Factors) -> Factors:
        return Factors(factors.A[:, cols].to(work), factors.B[rows].to(work))

    trainable, magnitude = cut(layer.trainable), layer.magnitude
    if magnitude is not None:
        magnitude = Trained(magnitude.current[rows].to(work), None)
    return LayerAdapter(
        trainable=trainable,
        anchor=None if layer.anchor is None else cut(layer.anchor),
        scaling=layer.scaling,
        layout=Layout("linear", trainable.shape),
        magnitude=magnitude,
    )


def _trained_blocks(
    weight: Tensor, result: Tensor, trained: Trained, work: torch.dtype, check: str | None
) -> _Blocks:
    old, new, moved = weight.reshape(-1), result.view(-1), trained.trainable.reshape(-1)
    anchor = None if trained.anchor is None else trained.anchor.reshape(-1)
    for start in range(0, len(old), _BLOCK):
        part = slice(start, start + _BLOCK)
        wide, value = old[part].to(work), moved[part].to(work)
        if anchor is None:
            yield old[part], new[part], value, value - wide
            continue
        if check is not None and not _equal(old[part], anchor[part]):
            raise BaseMismatchError(
                f"{check!r}: was trained from other values than the base here has. Give the base "
                "model that the adapter was made on, or insist with verify=False (--no-verify) if "
                "you know that it belongs here."
            )
        yield old[part], new[part], wide + value, value


def _equal(here: Tensor, anchor: Tensor) -> bool:
    """Whether two are the same values, perhaps rounded to a half precision on one side."""
    return any(
        torch.equal(here.to(dtype).to(torch.float64), anchor.to(dtype).to(torch.float64))
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
    )
