"""Held-out loss, without leaving a trace in the model."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tether.errors import DataError, NonFiniteError
from tether.switch import quiet
from tether.training.data import IGNORED, Sequences
from tether.value import Progress


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean loss over tokens.

    Attributes:
        loss: cross entropy per predicted token, in nats.
        tokens: how many were predicted.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def token_loss(model: Callable[..., object], batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Summed next-token cross entropy, in float32.

    Args:
        model: a causal language model; its output has `logits` (batch, length, vocabulary).
        batch: input_ids, attention_mask, labels, each (batch, length).

    Returns:
        the sum over predicted tokens, and their number.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = model(**inputs, use_cache=False).logits  # type: ignore[attr-defined]
    targets = batch["labels"][:, 1:]
    loss = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return loss, int((targets != IGNORED).sum())


def evaluate(
    model: nn.Module,
    sequences: Sequences,
    batch_size: int = 4,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Mean held-out loss. Modes, gradients and random state stay as they are.

    Args:
        model: a causal language model, with or without adapters.
        sequences: held out.
        batch_size: sequences at a time.
        limit: most sequences used, evenly spaced; None for all.
        progress: called with (batches done, batches in all).

    Returns:
        loss per token, whatever the batch size up to rounding.

    Raises:
        NonFiniteError: the loss is NaN or Inf.
        DataError: no sequence to evaluate.
    """
    count = len(sequences) if limit is None else min(limit, len(sequences))
    if count < 1:
        raise DataError("there is no held-out text to evaluate.")
    chosen = [i * len(sequences) // count for i in range(count)]
    device = next(model.parameters()).device
    batches = [chosen[i : i + batch_size] for i in range(0, count, batch_size)]
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    with quiet(model):
        for done, indices in enumerate(batches, start=1):
            loss, number = token_loss(model, sequences.batch(indices, device))
            total += loss.double().cpu()
            tokens += number
            if progress is not None:
                progress(done, len(batches))
    mean = float(total) / max(tokens, 1)
    if not math.isfinite(mean):
        raise NonFiniteError(
            f"held-out loss is {mean}: the model's output is not finite. If it is in float16, use "
            "bfloat16 or float32."
        )
    return Evaluation(mean, tokens)
