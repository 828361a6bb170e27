"""The training loop: AdamW on the factors, cosine schedule, accumulation, clipping."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tether.errors import NonFiniteError
from tether.handle import Handle
from tether.start import seed_for
from tether.training.data import Sequences
from tether.training.evaluate import token_loss
from tether.training.settings import Settings


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step did.

    Attributes:
        number: counted from 1.
        loss: mean over its tokens, before the step.
        learning_rate: used.
        gradient_norm: before clipping.
        tokens: predicted in it.
    """

    number: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int


def make_optimizer(handle: Handle, settings: Settings) -> torch.optim.AdamW:
    """AdamW over the adapter's factors.

    Args:
        handle: of the adapter to train.
        settings: learning rate and weight decay.

    Returns:
        the optimizer.
    """
    return torch.optim.AdamW(
        handle.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


def train(
    model: nn.Module,
    handle: Handle,
    optimizer: torch.optim.AdamW,
    data: Sequences,
    settings: Settings,
    *,
    first: int,
    on_step: Callable[[Step], bool],
) -> None:
    """Run the steps from `first` + 1 to the end.

    What a step does depends only on the settings, its number, the factors, the optimizer and the
    random state: a resumed run is the uninterrupted run, bit for bit.

    Args:
        model: with the adapter attached.
        handle: of the adapter.
        optimizer: over its factors.
        data: for training.
        settings: of the run.
        first: steps done before.
        on_step: called after each step; training stops when it returns True.

    Raises:
        NonFiniteError: a loss or gradient is NaN or Inf; that step is not taken.
    """
    total = settings.total_steps(len(data))
    model.train()
    for number in range(first + 1, total + 1):
        rate = learning_rate(number, total, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss, tokens = _backward(model, data, settings, number)
        limit = settings.clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(list(handle.parameters()), limit))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"step {number}: loss {loss}, gradient norm {norm}; the step was not taken. "
                f"Lower the learning rate (now {rate:.3g}), or raise warmup."
            )
        optimizer.step()
        if on_step(Step(number, loss, rate, norm, tokens)):
            break
    optimizer.zero_grad(set_to_none=True)


def learning_rate(number: int, total: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to zero after the last step.

    Args:
        number: of the step, from 1.
        total: steps of the run.
        settings: learning rate and warm-up.

    Returns:
        the learning rate of that step.
    """
    rise = round(settings.warmup * total)
    if number <= rise:
        return settings.learning_rate * number / rise
    share = (number - rise - 1) / max(1, total - rise)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def order(number: int, count: int, per_step: int, seed: int) -> list[int]:
    """Which sequences a step sees: epochs of seeded permutations, one after the other.

    Args:
        number: of the step, from 1.
        count: sequences in all.
        per_step: sequences per step.
        seed: of the permutations.

    Returns:
        indices.
    """

    def endless(epoch: int, position: int) -> Iterator[int]:
        while True:
            generator = torch.Generator().manual_seed(seed_for(seed, f"epoch {epoch}"))
            yield from torch.randperm(count, generator=generator).tolist()[position:]
            epoch, position = epoch + 1, 0

    stream = endless(*divmod((number - 1) * per_step, count))
    return [next(stream) for _ in range(per_step)]


def _backward(
    model: nn.Module, data: Sequences, settings: Settings, number: int
) -> tuple[float, int]:
    """Gradients of the mean loss over all tokens of the step, however they are divided."""
    per_step = settings.batch_size * settings.accumulation
    indices = order(number, len(data), per_step, settings.seed)
    size = settings.batch_size
    device = next(model.parameters()).device
    batches = [data.batch(indices[i : i + size], device) for i in range(0, per_step, size)]
    tokens = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss, _ = token_loss(model, batch)
        (loss / tokens).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total / tokens, tokens
