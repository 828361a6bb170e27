"""The change of a linear site, added to the base's output as one step of autograd.

Autograd by itself would keep, at every site, the input in the factors' precision (for a bfloat16
base a copy of twice its size) and pass over the output several times. Here the input is kept as it
came, one tensor for all sites that share it, with r numbers per token; all else is computed again
in the backward pass. The anchor costs no product of its own: its factors are laid beside the
displacement, as in the plain LoRA [B0, dB]·[dA; A0 + dA].
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def add_change(
    output: Tensor,
    x: Tensor,
    trained: tuple[Tensor, Tensor],
    anchor: tuple[Tensor, Tensor] | None,
    scaling: float,
) -> Tensor:
    """The base's output + s·(B0·(dA·x) + dB·((A0 + dA)·x)), or + s·B·(A·x) without an anchor.

    Computed in the dtype of the factors (under autocast in autocast's) and rounded once, to the
    output's dtype. A change of zero leaves every bit of the output.

    Args:
        output: (…, out), of the base.
        x: (…, in), its input.
        trained: dA (r, in) and dB (out, r); without an anchor A and B.
        anchor: A0 (r, in) and B0 (out, r), frozen, or None.
        scaling: s.

    Returns:
        (…, out); gradients reach output, x and the trained factors.
    """
    dtype = trained[0].dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    factors = (*trained, *(anchor or (None, None)))
    result: Tensor
    result, _ = _AddChange.apply(output, x, *factors, scaling, dtype)  # type: ignore[no-untyped-call]
    return result


class _AddChange(torch.autograd.Function):
    """See `add_change`; also gives −s·(A0 + dA)·x, which only the backward pass needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        a0: Tensor | None,
        b0: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        hidden, trained = _hidden(x.to(dtype), a, a0, scaling)
        change = functional.linear(hidden, _beside(b0, b, dtype, dim=1))
        # In place: passing over memory that is new costs as much as the product. `hidden` is the
        # negative, and so are the zeros of −change: they keep the sign of the output's zeros.
        change = change.to(torch.promote_types(dtype, output.dtype)).neg_()
        return change.add_(output).to(output.dtype), trained

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, x, a, b, a0, b0, ctx.scaling, ctx.dtype = inputs
        trained = output[1]
        ctx.mark_non_differentiable(trained)
        ctx.set_materialize_grads(False)
        _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(
            x if needs_a or needs_b else None, trained if needs_b else None, a, b, a0, b0
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        x, trained, a, b, a0, b0 = ctx.saved_tensors
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        rows = grad if x is None else x.to(ctx.dtype)  # where nothing is trained it is not used
        wide = grad.to(ctx.dtype)
        grad_x = grad_a = grad_b = None
        if needs_b:
            if torch.is_grad_enabled():  # create_graph: what was kept has no graph
                trained = _hidden(rows, a, a0, ctx.scaling)[1]
            grad_b = -_summed(wide, trained).to(b.dtype)
        if needs_x or needs_a:
            back = (wide @ _beside(b0, b, ctx.dtype, dim=1)) * ctx.scaling
            if a0 is not None:
                start, moved = back.chunk(2, dim=-1)
                back = torch.cat([start + moved, moved], dim=-1)
            if needs_a:
                grad_a = _summed(back[..., : a.shape[0]], rows).to(a.dtype)
            if needs_x:
                grad_x = (back @ _beside(a, a0, ctx.dtype, dim=0)).to(ctx.x_dtype)
        return grad, grad_x, grad_a, grad_b, None, None, None, None


def _hidden(rows: Tensor, a: Tensor, a0: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """−s·[dA·x, (A0 + dA)·x] (…, 2r) and its second half; without an anchor −s·A·x, twice."""
    hidden = functional.linear(rows, _beside(a, a0, rows.dtype, dim=0)) * -scaling
    if a0 is None:
        return hidden, hidden
    moved, start = hidden.chunk(2, dim=-1)
    # B·(dA·x) + dB·(A0·x) with B = B0 + dB, regrouped: no sum of a large and a small *weight*, in
    # which half precision would lose a small displacement.
    trained = moved + start
    return torch.cat([moved, trained], dim=-1), trained


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """Σ left·rightᵀ over all tokens: (…, m) and (…, n) give (m, n)."""
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def _beside(first: Tensor | None, second: Tensor | None, dtype: torch.dtype, dim: int) -> Tensor:
    """The trained factor and the anchor's in one, or the trained one alone."""
    return torch.cat([f.to(dtype) for f in (first, second) if f is not None], dim=dim)
