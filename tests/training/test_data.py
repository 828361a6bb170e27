"""Text files become token sequences, with loss on what is to be learnt and nothing else."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tether.errors import DataError
from tether.training import data
from tether.training.data import IGNORED, Sequences
from tiny_model import CHATML

TURNS = [("system", "Be brief."), ("user", "Hi?"), ("assistant", "Yes."), ("user", "And?")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]
ANSWERED = [*CHAT, {"role": "assistant", "content": "No."}]


def jsonl(folder: Path, *records: object) -> str:
    """A file with one JSON value a line."""
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), "utf-8")
    return str(path)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def learnt(sequences: Sequences, index: int = 0) -> tuple[int, ...]:
    """The labels that carry loss; each must be its own token."""
    pairs = zip(sequences.tokens[index], sequences.labels[index], strict=True)
    kept = [(token, label) for token, label in pairs if label != IGNORED]
    assert all(token == label for token, label in kept)
    return tuple(label for _, label in kept)


# Running text


def test_texts_are_joined_with_an_end_after_each_and_cut_into_blocks(tokenizer, tmp_path):
    path = jsonl(tmp_path, {"text": "green bottles"}, {"text": "the wall"})
    eos = (tokenizer.eos_token_id,)
    stream = ids(tokenizer, "green bottles") + eos + ids(tokenizer, "the wall") + eos
    found = data.load(path, tokenizer, 3)
    assert sum(found.tokens, ()) == stream[: len(stream) // 3 * 3]
    assert all(len(row) == 3 for row in found.tokens)
    assert found.labels == found.tokens
    assert found.left_out == len(stream) % 3 > 0
    assert found.packed


def test_a_text_file_is_one_text(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    stream = (*ids(tokenizer, "one\n\ntwo\n"), tokenizer.eos_token_id)
    assert data.load(str(path), tokenizer, len(stream)).tokens == (stream,)


def test_a_tokenizer_without_an_end_token_adds_none(tokenizer, tmp_path):
    tokenizer.eos_token = None
    found = data.load(jsonl(tmp_path, {"text": "aa"}, {"text": "bb"}), tokenizer, 2)
    assert sum(found.tokens, ()) == ids(tokenizer, "aa") + ids(tokenizer, "bb")


def test_without_a_path_it_is_pythons_documentation(tokenizer):
    found = data.load(None, tokenizer, 64)
    first = topics[min(topics)]
    assert first.startswith(tokenizer.decode(found.tokens[0]))
    assert len(found) * 64 > 100_000


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_only_a_line_feed_ends_a_line(separator, tokenizer, tmp_path):
    # JSON may hold these characters as they are, and str.splitlines() cuts at them.
    text = f"a{separator}b"
    stream = (*ids(tokenizer, text), tokenizer.eos_token_id)
    found = data.load(jsonl(tmp_path, {"text": text}), tokenizer, len(stream))
    assert found.tokens == (stream,)


# Prompt and completion


def test_only_the_completion_and_the_end_carry_loss(tokenizer, tmp_path):
    found = data.load(jsonl(tmp_path, {"prompt": "the w", "completion": "all"}), tokenizer, 64)
    prompt, completion = ids(tokenizer, "the w"), ids(tokenizer, "all")
    assert prompt + completion != ids(tokenizer, "the wall")  # tokenized apart
    assert found.tokens == ((*prompt, *completion, tokenizer.eos_token_id),)
    assert found.labels[0][: len(prompt)] == (IGNORED,) * len(prompt)
    assert learnt(found) == (*completion, tokenizer.eos_token_id)
    assert not found.packed


def test_a_tokenizer_that_opens_and_closes_texts_does_so_once(tokenizer, tmp_path):
    start, eos = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", start), ("<|im_end|>", eos)],
    )
    found = data.load(jsonl(tmp_path, {"prompt": "ab", "completion": "cd"}), tokenizer, 64)
    assert found.tokens == ((start, *ids(tokenizer, "ab"), *ids(tokenizer, "cd"), eos),)


def test_examples_are_cut_to_the_block_and_left_out_where_nothing_is_learnt(tokenizer, tmp_path):
    prompts = ["x", "xxxx", "xxxxx", "xxxxxxxx"]
    lines = [{"prompt": prompt, "completion": "yyyy"} for prompt in prompts]
    found = data.load(jsonl(tmp_path, *lines), tokenizer, 5)
    (y,) = ids(tokenizer, "y")
    assert [len(row) for row in found.tokens] == [5, 5]
    assert learnt(found, 0) == (y,) * 4
    assert learnt(found, 1) == (y,)
    assert found.left_out == 2


def test_an_example_whose_only_label_is_its_first_token_is_left_out(tokenizer, tmp_path):
    lines = [{"prompt": "", "completion": ""}, {"prompt": "", "completion": "yy"}]
    found = data.load(jsonl(tmp_path, *lines), tokenizer, 8)
    assert len(found) == found.left_out == 1


# Chats


def test_only_the_assistants_turns_carry_loss(tokenizer, tmp_path):
    later = {"role": "user", "content": "never answered"}
    found = data.load(jsonl(tmp_path, {"messages": [*ANSWERED, later]}), tokenizer, 512)
    assert tokenizer.decode(learnt(found)) == "Yes.<|im_end|>\nNo.<|im_end|>\n"
    whole = tokenizer.apply_chat_template(ANSWERED, tokenize=False)
    assert tokenizer.decode(found.tokens[0]) == whole


def test_a_chat_that_the_assistant_opens_is_learnt_from(tokenizer, tmp_path):
    chat = [{"role": "assistant", "content": "Hello."}, *CHAT[1:3]]
    found = data.load(jsonl(tmp_path, {"messages": chat}), tokenizer, 512)
    assert tokenizer.decode(found.tokens[0]) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(learnt(found)).endswith("Yes.<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHATML.replace("{{ message['content'] }}", "{{ loop.last }}"), "changes earlier messages"),
        ("{{ raise_exception('no system role here') }}", "no system role here"),
        (None, "no chat template"),
    ],
    ids=["rewrites history", "refuses", "missing"],
)
def test_a_template_that_does_not_fit_is_refused(template, words, tokenizer, tmp_path):
    tokenizer.chat_template = template
    path = jsonl(tmp_path, {"messages": ANSWERED})
    with pytest.raises(DataError, match=words) as caught:
        data.load(path, tokenizer, 64)
    assert f"{path}, line 1:" in str(caught.value)


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, ["no such file"]),
        ("data.csv", b"a", ["must end in .txt or .jsonl, not '.csv'"]),
        ("latin.txt", "é".encode("latin-1"), ["not UTF-8"]),
        ("empty.txt", b"", ["is empty"]),
        ("blank.jsonl", b" \n\n", ["is empty"]),
        ("short.txt", b"abc", ["4 tokens", "block of 8", "--block"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', ["line 3", "not valid JSON"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "not valid JSON"]),
        ("a.jsonl", b'["text"]', ["line 1", "list"]),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "a"}', ["line 2", "['txt']", "'text'"]),
        ("a.jsonl", b'{"text": 3}', ["line 1", "['text']"]),
        ("a.jsonl", b'{"prompt": "a"}', ["line 1", "'completion'"]),
        ("a.jsonl", b'{"messages": []}', ["line 1", "'messages'"]),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', ["line 1", "'content'"]),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', ["line 1", "'assistant'"]),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "a", "completion": "b"}', ["mixes", "text"]),
        ("a.jsonl", b'{"prompt": "aaaaaaaa", "completion": "b"}', ["1 examples", "--block 8"]),
        ("a.jsonl", rb'{"text": "fine"}' + b"\n" + rb'{"text": "\ud800"}', ["line 2"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_file_that_cannot_be_used_is_named(name, content, words, tokenizer, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        data.load(str(path), tokenizer, 8)
    for word in [str(path), *words]:
        assert word in str(caught.value)


# Parts


def rows(count: int, packed: bool) -> Sequences:
    tokens = tuple((i,) for i in range(count))
    return Sequences(tokens, tokens, packed)


@pytest.mark.parametrize(
    ("count", "share", "packed", "kept"),
    [
        (10, 0.3, True, [7, 8, 9]),
        (10, 0.3, False, [0, 3, 6]),
        (10, 0.001, True, [9]),
        (3, 0.999, True, [1, 2]),
        (2, 0.5, False, [0]),
    ],
)
def test_running_text_is_split_at_the_end_and_examples_evenly(count, share, packed, kept):
    train, held_out = data.split(rows(count, packed), share)
    assert [row[0] for row in held_out.tokens] == kept
    assert [row[0] for row in train.tokens] == [i for i in range(count) if i not in kept]
    assert train.packed == held_out.packed == packed


def test_one_sequence_cannot_be_split():
    with pytest.raises(DataError, match=r"1 sequence; at least 2 .* --eval-data"):
        data.split(rows(1, packed=True), 0.1)


def test_a_batch_is_padded_at_the_end():
    found = Sequences(((5, 6, 7), (8,), (9, 4)), ((IGNORED, 6, 7), (8,), (9, 4)), packed=False)
    batch = found.batch([1, 0], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[8, 0, 0], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[8, IGNORED, IGNORED], [IGNORED, 6, 7]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_the_digest_sees_every_token_and_label():
    values = [
        Sequences(((1, 2), (3,)), ((1, 2), (3,)), packed=True),
        Sequences(((1,), (2, 3)), ((1,), (2, 3)), packed=True),
        Sequences(((1, 2), (3,)), ((IGNORED, 2), (3,)), packed=True),
        Sequences(((3,), (1, 2)), ((3,), (1, 2)), packed=True),
    ]
    assert len({value.digest() for value in values}) == len(values)
