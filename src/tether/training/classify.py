"""Accuracy: of all labels of a row the likeliest is the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from tether.errors import ConfigError, DataError
from tether.statistics import Scores
from tether.training.data import IGNORED, Sequences
from tether.training.evaluate import evaluate_all
from tether.training.labels import Labelled
from tether.value import Progress

TEMPLATE = "{text}\nAnswer: {label}"


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """How the base and every adapter answered the same rows.

    Attributes:
        losses: of the right label: nats and tokens of each row.
        correct: 1 where the right label was the likeliest, else 0.
        rows: that were used.
    """

    losses: Scores
    correct: Scores
    rows: Labelled


def evaluate_labels(
    model: nn.Module,
    names: Sequence[str],
    data: Labelled,
    tokenizer: Any,
    *,
    template: str = TEMPLATE,
    batch_size: int = 4,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Answers:
    """Let the base and each adapter answer every row, in one pass.

    The score of a label is log p(label | text), summed over its tokens and not divided by their
    number; tokens that all the labels of a row share with the text before them say nothing. The
    answer is the label with the highest score.

    Args:
        model: a causal language model with the adapters attached.
        names: of the adapters.
        data: the rows.
        tokenizer: of the model.
        template: what the model reads; "{text}" and, after it, "{label}" are replaced.
        batch_size: sequences at a time, one for each label of a row.
        limit: most rows, see `Labelled.sample`; None for all.
        progress: called with (forward passes done, in all).

    Returns:
        losses and answers; the base under None, an adapter under its name.

    Raises:
        ConfigError: a template without its parts, or an adapter named twice.
        DataError: a row that is longer than the model's window, or whose labels cannot be told
            apart by their tokens; naming the line.
        NonFiniteError: a loss is NaN or Inf, naming adapter, line and label.
        UnknownNameError: no adapter of that name.
    """
    rows = data.sample(limit)
    window = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    sequences = encode(rows, tokenizer, template, window)
    width = len(rows.labels)

    def describe(index: int) -> str:
        row, label = divmod(index, width)
        return f"{rows.path}, line {rows.rows[row].line}, label {rows.labels[label]!r}"

    found = evaluate_all(model, names, sequences, batch_size, progress=progress, describe=describe)
    right = np.array([rows.labels.index(row.label) for row in rows.rows])
    each = np.arange(len(rows))
    counts = found.counts.reshape(-1, width)[each, right]
    losses = {key: sums.reshape(-1, width) for key, sums in found.sums.items()}
    correct = {key: (table.argmin(axis=1) == right) * 1.0 for key, table in losses.items()}
    return Answers(
        losses=Scores({key: table[each, right] for key, table in losses.items()}, counts),
        correct=Scores(correct, np.ones(len(rows), dtype=np.int64)),
        rows=rows,
    )


def encode(
    data: Labelled, tokenizer: Any, template: str = TEMPLATE, window: int | None = None
) -> Sequences:
    """The tokens of every row with every label; there is a loss on the label alone.

    Text and label are tokenized together, as in a text that holds both, and the label begins where
    the tokens of a row's labels part from those of the text alone.

    Args:
        data: the rows.
        tokenizer: of the model.
        template: with "{text}" and, after it, "{label}".
        window: most tokens that the model takes; None for no limit.

    Returns:
        row by row, and in each in the order of `data.labels`.

    Raises:
        ConfigError: a template without its parts.
        DataError: naming the line; see `evaluate_labels`.
    """
    before, after = split_template(template)
    tokens: list[tuple[int, ...]] = []
    labels: list[tuple[int, ...]] = []
    for row in data.rows:
        where = f"{data.path}, line {row.line}"
        prompt = before.replace("{text}", row.text)
        texts = [prompt, *(f"{prompt}{label}{after}" for label in data.labels)]
        alone, *full = _tokenize(tokenizer, texts)
        start = min(_shared(alone, ids) for ids in full)
        _check(where, data.labels, [ids[start:] for ids in full], start)
        longest = max(map(len, full))
        if window is not None and longest > window:
            raise DataError(
                f"{where}: makes {longest} tokens, and the model takes {window}. Shorten the text."
            )
        tokens += map(tuple, full)
        labels += [(*[IGNORED] * start, *ids[start:]) for ids in full]
    return Sequences(tuple(tokens), tuple(labels), packed=False)


def split_template(template: str) -> tuple[str, str]:
    """Check a template.

    Args:
        template: with "{text}" and, after it, "{label}".

    Returns:
        what comes before the label, with "{text}", and after it.

    Raises:
        ConfigError: either is missing, or there more than once.
    """
    before, _, after = template.partition("{label}")
    counts = (before.count("{text}"), template.count("{text}"), template.count("{label}"))
    if counts != (1, 1, 1):
        raise ConfigError(
            f"template {template!r} must hold {{text}} once and, after it, {{label}} once."
        )
    return before, after


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens with what opens a text, without what closes it."""
    found = [list(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    for ids in found:
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
    return found


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens before the first that differs."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _check(where: str, labels: Sequence[str], tails: Sequence[list[int]], start: int) -> None:
    """Raise where likelihoods would not say which label fits better."""
    if start == 0:
        raise DataError(f"{where}: the text makes no token before the label. Give a longer one.")
    # In order, a list is followed by one that it begins, if there is one.
    ordered = sorted(zip(tails, labels, strict=True))
    for (short, one), (long, other) in pairwise(ordered):
        if long[: len(short)] == short:
            raise DataError(
                f"{where}: the tokens of label {one!r} begin those of {other!r}, so it would "
                "always be the likelier. End the template with something after {label}, such as a "
                "new line."
            )
