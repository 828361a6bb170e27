"""Text files -> token blocks with labels."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from tether.errors import DataError

IGNORED = -100  # label of a token that carries no loss


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences and what is learnt of them.

    Attributes:
        tokens: token ids of each sequence.
        labels: the same, with IGNORED where there is no loss.
        packed: True for blocks cut from running text, False for one sequence per example.
        left_out: examples without a label within the block length, or the tokens of the last,
            incomplete block.
    """

    tokens: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    packed: bool
    left_out: int = 0

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.tokens)

    def pick(self, indices: Sequence[int]) -> "Sequences":
        """Some of the sequences.

        Args:
            indices: in the order wanted.

        Returns:
            a new value.
        """
        tokens = tuple(self.tokens[i] for i in indices)
        return Sequences(tokens, tuple(self.labels[i] for i in indices), self.packed)

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Some of the sequences, padded at the end to one length.

        Args:
            indices: in the order wanted.
            device: of the result.

        Returns:
            input_ids, attention_mask, labels: (batch, length) int64; label IGNORED on padding.
        """
        length = max(len(self.tokens[i]) for i in indices)

        def padded(rows: Iterable[Sequence[int]], value: int) -> Tensor:
            filled = [[*row, *[value] * (length - len(row))] for row in rows]
            return torch.tensor(filled, dtype=torch.int64, device=device)

        return {
            "input_ids": padded((self.tokens[i] for i in indices), 0),
            "attention_mask": padded(([1] * len(self.tokens[i]) for i in indices), 0),
            "labels": padded((self.labels[i] for i in indices), IGNORED),
        }

    def digest(self) -> str:
        """sha256 over tokens and labels: the same data, or not.

        Returns:
            the hex digest.
        """
        text = json.dumps([self.tokens, self.labels], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def load(path: str | None, tokenizer: Any, block: int) -> Sequences:
    """Read a training file.

    Args:
        path: .txt (running text), or .jsonl with on every line an object with "text" (running
            text), or "prompt" and "completion" (loss on the completion), or "messages" (a chat,
            through the tokenizer's template; loss on what the assistant says). None for the
            documentation that comes with Python.
        tokenizer: of the model.
        block: length of a sequence in tokens. Running text is joined and cut into blocks; a
            longer example is cut off.

    Returns:
        at least one sequence.

    Raises:
        DataError: naming the file, the line and what is wrong.
    """
    if path is None:
        return _blocks([_python_documentation()], tokenizer, block, "Python's documentation")
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{path}: no such file.")
    if file.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: the name must end in .txt or .jsonl, not {file.suffix!r}.")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    if not content.strip():
        raise DataError(f"{path}: is empty. Give a file with text.")
    if file.suffix == ".txt":
        return _blocks([content], tokenizer, block, path)
    records = list(_records(path, content))
    kinds = {kind for kind, _ in records}
    if len(kinds) > 1:
        raise DataError(f"{path}: mixes {' and '.join(sorted(kinds))} lines; use one form.")
    if kinds == {"text"}:
        return _blocks([record["text"] for _, record in records], tokenizer, block, path)
    return _examples(path, [record for _, record in records], tokenizer, block)


def split(
    sequences: Sequences, held_out: float, where: str = "the text"
) -> tuple[Sequences, Sequences]:
    """Keep a part for evaluation: of running text the end, of examples every n-th.

    Args:
        sequences: at least two.
        held_out: share to hold out, in (0, 1).
        where: what to call the text in the message.

    Returns:
        for training, for evaluation; neither is empty.

    Raises:
        DataError: too few sequences.
    """
    n = len(sequences)
    count = min(max(1, round(n * held_out)), n - 1)
    if count < 1:
        raise DataError(
            f"{where}: makes {n} sequence; at least 2 are needed to train and to evaluate. "
            "Give more text, a smaller --block, or --eval-data."
        )
    last = range(n - count, n) if sequences.packed else (i * n // count for i in range(count))
    chosen = set(last)
    rest = [i for i in range(n) if i not in chosen]
    return sequences.pick(rest), sequences.pick(sorted(chosen))


def _python_documentation() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def _records(path: str, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines: JSON may hold other characters that Python takes for the end of a line.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON: {error}.") from error
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: holds half a character (\\ud800 to \\udfff).") from error
        kind = _kind(record)
        if kind is None:
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{where}: has {keys}; expected strings 'text', or 'prompt' and 'completion', or a "
                "list 'messages' of objects with strings 'role' and 'content'."
            )
        yield kind, record | {"where": where}


def _kind(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("text"), str):
        return "text"
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return "prompt/completion"
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(m) for m in messages):
        return "messages"
    return None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _blocks(texts: Sequence[str], tokenizer: Any, block: int, where: str) -> Sequences:
    """Join texts, an end token after each, and cut into whole blocks."""
    stream: list[int] = []
    for text in texts:
        stream += _tokenize(tokenizer, text)
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    count = len(stream) // block
    if count == 0:
        raise DataError(
            f"{where}: {len(stream)} tokens are fewer than one block of {block}. "
            "Give more text, or a smaller --block."
        )
    rows = tuple(tuple(stream[i * block : (i + 1) * block]) for i in range(count))
    return Sequences(rows, rows, packed=True, left_out=len(stream) - count * block)


def _examples(
    path: str, records: Sequence[dict[str, Any]], tokenizer: Any, block: int
) -> Sequences:
    tokens, labels = [], []
    for record in records:
        parts = _chat(record, tokenizer) if "messages" in record else _pair(record, tokenizer)
        ids = [token for part, _ in parts for token in part][:block]
        wanted = [token if learn else IGNORED for part, learn in parts for token in part][:block]
        # The first token is never predicted.
        if any(label != IGNORED for label in wanted[1:]):
            tokens.append(tuple(ids))
            labels.append(tuple(wanted))
    if not tokens:
        raise DataError(
            f"{path}: none of {len(records)} examples has anything to learn within --block {block} "
            "tokens. Raise --block."
        )
    return Sequences(tuple(tokens), tuple(labels), False, len(records) - len(tokens))


def _pair(record: dict[str, Any], tokenizer: Any) -> list[tuple[list[int], bool]]:
    """Tokenized apart, as they are at inference: there the prompt ends before the completion."""
    prompt = list(tokenizer(record["prompt"])["input_ids"])
    eos = tokenizer.eos_token_id
    if prompt and prompt[-1] == eos:  # some tokenizers close every text
        prompt.pop()
    completion = _tokenize(tokenizer, record["completion"])
    return [(prompt, False), (completion + ([] if eos is None else [eos]), True)]


def _chat(record: dict[str, Any], tokenizer: Any) -> list[tuple[list[int], bool]]:
    """The rendered chat in parts; what follows each prompt for the assistant is learnt."""
    messages, done, parts = record["messages"], "", []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Templates refuse an empty chat: what opens it has no prompt.
        before = _render(record, tokenizer, messages[:index], prompt=True) if index else ""
        after = _render(record, tokenizer, messages[: index + 1], prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{record['where']}: the tokenizer's chat template changes earlier messages when "
                "later ones are added, so the assistant's part cannot be told. Write the example "
                "as prompt and completion."
            )
        parts += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    if not parts:
        raise DataError(f"{record['where']}: no message has the role 'assistant'.")
    return [(_tokenize(tokenizer, text), learn) for text, learn in parts]


def _render(record: dict[str, Any], tokenizer: Any, messages: list[Any], *, prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{record['where']}: the model's tokenizer has no chat template. Use an instruct "
            "model, or write the examples as prompt and completion."
        )
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # templates raise errors of their own
        raise DataError(f"{record['where']}: the chat template refuses it: {error}.") from error
    return text


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    """Tokens without special ones; no notice about texts longer than the model's window."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
