"""Several adapters on one live base: logits, losses and texts beside each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tether.attach import attach
from tether.statistics import Scores
from tether.switch import activate
from tether.training.agreement import Agreement, agreement
from tether.training.data import Sequences
from tether.training.evaluate import evaluate_all
from tether.training.generate import Generation, beginnings, generate
from tether.training.report import Reporter
from tether.value import Adapter

PROMPTS = 3  # taken from the data where none is given


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a base does with each of several adapters. Keys are their names; None is the base.

    Attributes:
        agreements: of the logits with the first adapter's.
        scores: loss of each sequence, in nats.
        generations: texts; none where none were asked for.
    """

    agreements: Mapping[str | None, Agreement]
    scores: Scores
    generations: tuple[Generation, ...]


def put_on(model: nn.Module, adapters: Mapping[str, Adapter], verify: bool = True) -> None:
    """Attach adapters, none of them active.

    Args:
        model: their base.
        adapters: by the names they get.
        verify: check the base's fingerprints.

    Raises:
        AttachError: one does not fit.
    """
    for name, adapter in adapters.items():
        attach(model, adapter, name, trainable=False, verify=verify)
        # Not beside the next: two cannot train one module whole at a time.
        activate(model)


def behaviour(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    sequences: Sequences,
    *,
    batch_size: int = 4,
    limit: int | None = None,
    prompts: Sequence[str] = (),
    length: int = 0,
    reporter: Reporter | None = None,
) -> Behaviour:
    """Run the model with each adapter alone, and without any.

    Args:
        model: a causal language model with the adapters attached.
        tokenizer: of the model.
        names: of the adapters; the first is the reference.
        sequences: for logits and losses.
        batch_size: sequences at a time.
        limit: most sequences for the losses.
        prompts: beginnings to continue; none for those of the data.
        length: most tokens to add to each; 0 for no texts.
        reporter: shows progress.

    Returns:
        what was measured. The model is as before.

    Raises:
        NonFiniteError: an output is not finite.
        DataError: there is no text.
    """
    reporter = reporter or Reporter()
    others = [None, *names[1:]]
    with reporter.task("Comparing logits") as task:
        agreements = agreement(model, names[0], others, sequences, progress=task)
    with reporter.task("Measuring losses") as task:
        scores = evaluate_all(model, names, sequences, batch_size, limit, task)
    texts: tuple[Generation, ...] = ()
    if length > 0:
        chosen = list(prompts) or beginnings(sequences, tokenizer, PROMPTS)
        with reporter.task("Writing texts") as task:
            texts = generate(model, tokenizer, [None, *names], chosen, length, task)
    return Behaviour(agreements, scores, texts)
