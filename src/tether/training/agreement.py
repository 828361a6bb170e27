"""How near the predictions of adapters on one base are to each other, token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tether.errors import DataError, NonFiniteError
from tether.switch import only, quiet
from tether.training.data import Sequences
from tether.value import Progress


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of one model's logits with the reference's, over the same tokens.

    Attributes:
        largest: max |Δlogit|.
        divergence: mean of KL(reference ‖ model) over the tokens, in nats.
        same: share of the tokens for which both hold the same next one for the most likely.
        tokens: how many were compared.
    """

    largest: float
    divergence: float
    same: float
    tokens: int


def agreement(
    model: nn.Module,
    reference: str,
    names: Sequence[str | None],
    sequences: Sequences,
    limit: int = 4,
    progress: Progress | None = None,
) -> dict[str | None, Agreement]:
    """Compare the logits on the first sequences. Which adapters are active stays as it is.

    Args:
        model: a causal language model with the adapters attached.
        reference: name of the adapter that the others are compared with.
        names: of the others; None for the base alone.
        sequences: at least one.
        limit: most sequences used, from the first on.
        progress: called with (sequences done, in all).

    Returns:
        name -> its agreement, in float64.

    Raises:
        DataError: there is no sequence.
        NonFiniteError: a logit is NaN or Inf.
    """
    count = min(limit, len(sequences))
    if count < 1:
        raise DataError("there is no text to compare the logits on.")
    device = next(model.parameters()).device
    found: dict[str | None, list[tuple[float, float, int, int]]] = {name: [] for name in names}
    with quiet(model):
        for index in range(count):
            batch = sequences.batch([index], device)
            expected = _logits(model, reference, batch)
            for name in names:
                found[name].append(_between(expected, _logits(model, name, batch)))
            if progress is not None:
                progress(index + 1, count)
    return {name: _summed(parts) for name, parts in found.items()}


def _logits(model: nn.Module, name: str | None, batch: Mapping[str, Tensor]) -> Tensor:
    """(tokens, vocabulary) of the model with this adapter alone."""
    with only(model, *(() if name is None else (name,))):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits: Tensor = model(**inputs, use_cache=False).logits[0].float()
    if not bool(torch.isfinite(logits).all()):
        who = "the base" if name is None else f"adapter {name!r}"
        raise NonFiniteError(
            f"{who}: a logit is NaN or Inf. If the model is in float16, use bfloat16 or float32."
        )
    return logits


def _between(reference: Tensor, other: Tensor) -> tuple[float, float, int, int]:
    """Largest difference, sum of KL, number of equal first choices, number of tokens."""
    p, q = (functional.log_softmax(logits.double(), dim=-1) for logits in (reference, other))
    divergence = (p.exp() * (p - q)).sum(dim=-1).clamp(min=0)
    return (
        float((reference - other).abs().max()),
        float(divergence.sum()),
        int((reference.argmax(dim=-1) == other.argmax(dim=-1)).sum()),
        len(reference),
    )


def _summed(parts: Sequence[tuple[float, float, int, int]]) -> Agreement:
    largest, divergence, same, tokens = zip(*parts, strict=True)
    total = sum(tokens)
    return Agreement(max(largest), sum(divergence) / total, sum(same) / total, total)
