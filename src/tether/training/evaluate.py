"""Held-out loss, without leaving a trace in the model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tether.errors import ConfigError, DataError, NonFiniteError
from tether.statistics import Scores
from tether.switch import find, only, quiet
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
    logits, targets = _predicted(model, batch)
    loss = functional.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return loss, int((targets != IGNORED).sum())


def sequence_losses(
    model: Callable[..., object], batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Summed next-token cross entropy of each sequence, in float32.

    Args:
        model: as for `token_loss`.
        batch: as for `token_loss`.

    Returns:
        (batch,) the sums in float64, and (batch,) the numbers of predicted tokens; on the CPU.
    """
    logits, targets = _predicted(model, batch)
    learnt = targets != IGNORED
    # Only where something is predicted: of a long prompt the logits stay as they are.
    found = functional.cross_entropy(logits[learnt].float(), targets[learnt], reduction="none")
    learnt = learnt.cpu()
    losses = torch.zeros(learnt.shape, dtype=torch.float64)
    losses[learnt] = found.cpu().double()
    return losses.sum(dim=1), learnt.sum(dim=1)


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
    batches = _batches(_spaced(len(sequences), limit), batch_size)
    device = next(model.parameters()).device
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


def evaluate_all(
    model: nn.Module,
    names: Sequence[str],
    sequences: Sequences,
    batch_size: int = 4,
    limit: int | None = None,
    progress: Progress | None = None,
    describe: Callable[[int], str] = lambda index: f"sequence {index + 1}",
) -> Scores:
    """The held-out loss of each sequence, of the base and with each adapter, in one pass.

    Every batch goes through the model once without adapters and once with each alone. Which are
    active, modes, gradients and random state stay as they are.

    Args:
        model: a causal language model with the adapters attached.
        names: of the adapters.
        sequences: held out, each with something to predict.
        batch_size: sequences at a time.
        limit: most sequences used, evenly spaced; None for all.
        progress: called with (forward passes done, in all).
        describe: what an error calls a sequence, by its index in `sequences`.

    Returns:
        sums of loss in nats and numbers of predicted tokens of the sequences used, in order; the
        base under None, an adapter under its name.

    Raises:
        NonFiniteError: a loss is NaN or Inf, naming adapter and sequence.
        DataError: no sequence to evaluate.
        UnknownNameError: no adapter of that name.
        ConfigError: an adapter is named twice.
        OffloadedError: an adapter is offloaded.
    """
    find(model, names)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"adapter {twice!r} is named {names.count(twice)} times. Name it once.")
    chosen = _spaced(len(sequences), limit)
    keys = (None, *names)
    sums: dict[str | None, list[float]] = {key: [] for key in keys}
    counts: list[int] = []
    device = next(model.parameters()).device
    batches = _batches(chosen, batch_size)
    with quiet(model):
        for number, indices in enumerate(batches):
            batch = sequences.batch(indices, device)
            for turn, key in enumerate(keys, start=1):
                with only(model, *(() if key is None else (key,))):
                    found, tokens = sequence_losses(model, batch)
                _check_finite(key, found, [describe(i) for i in indices])
                sums[key] += found.tolist()
                if progress is not None:
                    progress(number * len(keys) + turn, len(batches) * len(keys))
            counts += tokens.tolist()
    return Scores({key: np.array(values) for key, values in sums.items()}, np.array(counts))


def _check_finite(key: str | None, losses: Tensor, names: Sequence[str]) -> None:
    for name, loss in zip(names, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            who = "the base" if key is None else f"adapter {key!r}"
            raise NonFiniteError(
                f"{who}, {name}: the loss is {loss}: the model's output is not finite. If it is in "
                "float16, use bfloat16 or float32."
            )


def _predicted(model: Callable[..., object], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (batch, length - 1, vocabulary), and the token that each of them predicts."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = model(**inputs, use_cache=False).logits  # type: ignore[attr-defined]
    return logits[:, :-1], batch["labels"][:, 1:]


def _spaced(total: int, limit: int | None) -> list[int]:
    """Indices of the sequences used."""
    count = total if limit is None else min(limit, total)
    if count < 1:
        raise DataError("there is no held-out text to evaluate.")
    return [i * total // count for i in range(count)]


def _batches(chosen: list[int], size: int) -> list[list[int]]:
    return [chosen[i : i + size] for i in range(0, len(chosen), size)]
