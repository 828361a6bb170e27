"""What adapters on one base write after the same beginnings, always the most likely next token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tether.errors import ConfigError
from tether.integrations import hub
from tether.switch import only, quiet
from tether.training.data import IGNORED, Sequences
from tether.value import Progress

_BEGINNING = 24  # tokens of running text that stand for a prompt
_LONGEST = 256  # tokens of an example's own prompt


@dataclass(frozen=True, slots=True)
class Generation:
    """Side by side.

    Attributes:
        prompt: the beginning.
        texts: name of an adapter, None for the base -> what follows; special tokens left out.
    """

    prompt: str
    texts: Mapping[str | None, str]


def beginnings(sequences: Sequences, tokenizer: Any, count: int) -> list[str]:
    """Prompts from data: of examples what they do not learn, of running text the first tokens.

    Args:
        sequences: of the data.
        tokenizer: that made them.
        count: most prompts, evenly spaced.

    Returns:
        texts; none that is empty.
    """
    count = min(count, len(sequences))
    found = []
    for place in range(count):
        index = place * len(sequences) // count
        tokens, labels = sequences.tokens[index], sequences.labels[index]
        given = next((i for i, label in enumerate(labels) if label != IGNORED), 0)
        taken = tokens[: given or _BEGINNING][-_LONGEST:]
        found.append(tokenizer.decode(list(taken), skip_special_tokens=given == 0))
    return [text for text in found if text]


def generate(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str | None],
    prompts: Sequence[str],
    length: int,
    progress: Progress | None = None,
) -> tuple[Generation, ...]:
    """Continue each prompt with each adapter alone, greedily. The model stays as it is.

    Args:
        model: a transformers causal language model with the adapters attached.
        tokenizer: of the model.
        names: of the adapters; None for the base alone.
        prompts: none of them empty.
        length: most tokens to add.
        progress: called with (texts done, in all).

    Returns:
        one for each prompt.

    Raises:
        ConfigError: a prompt makes no token, or does not fit the model with what follows.
    """
    found: list[Generation] = []
    for prompt in prompts:
        tokens = _tokens(model, tokenizer, prompt, length)
        texts: dict[str | None, str] = {}
        for name in names:
            texts[name] = _continue(model, tokenizer, name, tokens, length)
            if progress is not None:
                progress(len(found) * len(names) + len(texts), len(prompts) * len(names))
        found.append(Generation(prompt, texts))
    return tuple(found)


def _tokens(model: nn.Module, tokenizer: Any, prompt: str, length: int) -> torch.Tensor:
    tokens = list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    most = getattr(model.config, "max_position_embeddings", None)
    if not tokens:
        raise ConfigError(f"the prompt {prompt!r} makes no token. Give a text.")
    if most is not None and len(tokens) + length > most:
        raise ConfigError(
            f"a prompt of {len(tokens)} tokens and {length} more exceed the model's {most}. Give a "
            "shorter prompt, or generate fewer."
        )
    return torch.tensor([tokens], device=next(model.parameters()).device)


def _continue(
    model: nn.Module, tokenizer: Any, name: str | None, tokens: torch.Tensor, length: int
) -> str:
    transformers = hub.import_transformers()
    own: Any = model.generation_config
    # Not the model's own settings, which may sample or penalise: the most likely token, plainly.
    settings = transformers.GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else 0,
    )
    with quiet(model), hub.quietly(transformers), only(model, *(() if name is None else (name,))):
        output = model.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
        )
    text: str = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
    return text
