"""The likeliest label is the answer: likelihoods by hand, and what cannot be told apart."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn

import tether
from tether.errors import ConfigError, DataError, NonFiniteError
from tether.integrations import hub
from tether.training.classify import TEMPLATE, encode, evaluate_labels
from tether.training.data import IGNORED
from tether.training.labels import Labelled, Row

LINE = TEMPLATE + "\n"


def labelled(*pairs: tuple[str, str]) -> Labelled:
    rows = tuple(Row(text, label, n) for n, (text, label) in enumerate(pairs, start=2))
    return Labelled("rows.csv", rows, tuple(sorted({label for _, label in pairs})))


ROWS = labelled(("one wall", "good"), ("no bottles", "so bad"), ("green", "good"), ("1", "so bad"))


class Bigram(nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.table.weight.data.zero_()

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.table(input_ids))


def test_the_score_is_the_likelihood_of_the_whole_text(model_folder, tokenizer):
    """Which labels differ by as much as the texts that hold them: the rest is the same."""
    model = hub.load_model(str(model_folder), torch.float32, "cpu")
    answers = evaluate_labels(model, [], ROWS, tokenizer, template=LINE, batch_size=3)

    def likelihood(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return -float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)

    for index, row in enumerate(ROWS.rows):
        whole = {
            label: likelihood(f"{row.text}\nAnswer: {label}\n") for label in ("good", "so bad")
        }
        shared = likelihood(f"{row.text}\nAnswer: ")
        # Sums of 20 to 40 losses in float32.
        wanted = pytest.approx(shared - whole[row.label], abs=1e-3)
        assert answers.losses.sums[None][index] == wanted
        best = max(whole, key=whole.__getitem__)
        assert answers.correct.sums[None][index] == (best == row.label)
        tokens = len(tokenizer(f"{row.label}\n")["input_ids"])
        assert answers.losses.counts[index] == tokens
    assert answers.correct.counts.tolist() == [1] * 4


def test_accuracy_by_hand(tokenizer):
    model = Bigram(len(tokenizer))
    one, two, yes, no = (tokenizer(text)["input_ids"][0] for text in ("1", "2", "y", "n"))
    model.table.weight.data[one, yes] = 3.0
    model.table.weight.data[two, no] = 2.0
    rows = labelled(("a1", "y"), ("b1", "y"), ("c2", "n"), ("d2", "y"), ("e1", "n"))
    answers = evaluate_labels(model, [], rows, tokenizer, template="{text}{label}", batch_size=4)
    assert answers.correct.sums[None].tolist() == [1, 1, 1, 0, 0]
    assert answers.correct.mean(None).value == 0.6
    size = len(tokenizer)
    wanted = [math.log(math.exp(3) + size - 1) - 3, math.log(math.exp(2) + size - 1)]
    assert answers.losses.sums[None][[0, 3]] == pytest.approx(wanted, rel=1e-6)


def test_base_and_adapter_answer_the_same_rows(tokenizer):
    class Model(Bigram):
        def __init__(self):
            super().__init__(len(tokenizer))
            self.change = nn.Linear(len(tokenizer), len(tokenizer), bias=False)
            self.change.weight.data.zero_()

        def forward(self, input_ids, **_):
            logits = self.table(input_ids)
            one_hot = nn.functional.one_hot(input_ids, logits.shape[-1]).float()
            return SimpleNamespace(logits=logits + self.change(one_hot))

    model = Model()
    one, yes, no = (tokenizer(text)["input_ids"][0] for text in ("1", "y", "n"))
    model.table.weight.data[one, yes] = 2.0
    config = tether.LoraConfig(rank=1, alpha=1, init="lora", target_modules=["change"])
    handle = tether.attach(model, config, "contrary")
    with torch.no_grad():
        for factor in handle.parameters():
            factor.zero_()
        parts = {name.rsplit(".", 1)[1]: factor for name, factor in handle.named_parameters()}
        parts["A"][0, one], parts["B"][no, 0] = 1.0, 5.0
    rows = labelled(("a1", "y"), ("b1", "y"), ("c1", "n"))
    answers = evaluate_labels(model, ["contrary"], rows, tokenizer, template="{text}{label}")
    assert answers.correct.sums[None].tolist() == [1, 1, 0]
    assert answers.correct.sums["contrary"].tolist() == [0, 0, 1]
    difference = answers.correct.difference("contrary", None)
    assert difference.value == pytest.approx(-1 / 3)
    assert difference.within_noise


def test_only_the_label_carries_a_loss(tokenizer):
    found = encode(ROWS, tokenizer, LINE)
    assert len(found) == 8
    for index in range(8):
        row, label = ROWS.rows[index // 2], ROWS.labels[index % 2]
        assert tokenizer.decode(found.tokens[index]) == f"{row.text}\nAnswer: {label}\n"
        learnt = [token for token in found.labels[index] if token != IGNORED]
        assert tokenizer.decode(learnt) == f"{label}\n"  # this tokenizer has no " g"
        assert found.tokens[index][-len(learnt) :] == tuple(learnt)


def test_labels_of_a_row_are_scored_from_the_same_token(tokenizer):
    """A space that is one token with the first label, and one by itself before the second."""
    assert len(tokenizer(" green")["input_ids"]) == 3
    assert len(tokenizer(" wall")["input_ids"]) == 2
    found = encode(labelled(("a", "green"), ("b", "wall")), tokenizer, LINE)
    learnt = [[t for t in row if t != IGNORED] for row in found.labels]
    assert [tokenizer.decode(row) for row in learnt] == [" green\n", " wall\n"] * 2


def test_what_opens_a_text_stays_and_what_closes_it_goes(tokenizer):
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=ids
    )
    found = encode(ROWS, tokenizer, LINE)
    assert {row[0] for row in found.tokens} == {ids[0][1]}
    assert tokenizer.decode(found.tokens[0][1:]) == "one wall\nAnswer: good\n"


def test_braces_of_a_text_are_text(tokenizer):
    rows = labelled(("{label} {text} {0}", "y"), ("{", "{text}"))
    found = encode(rows, tokenizer, LINE)
    texts = [tokenizer.decode(row) for row in found.tokens]
    assert texts[:2] == [
        f"{{label}} {{text}} {{0}}\nAnswer: {label}\n" for label in ("y", "{text}")
    ]


@pytest.mark.parametrize(
    "template",
    ["", "{text}", "{label}", "{label} {text}", "{text} {label} {text}", "{text}{label}" * 2],
)
def test_a_template_without_its_parts_is_refused(tokenizer, template):
    with pytest.raises(ConfigError, match=r"must hold \{text\} once and, after it, \{label\}"):
        encode(ROWS, tokenizer, template)


def test_a_label_that_begins_another_is_refused(tokenizer):
    rows = labelled(("a", "up"), ("b", "down"), ("c", "upward"))
    with pytest.raises(
        DataError, match=r"line 2: the tokens of label 'up' begin those of 'upward'"
    ):
        encode(rows, tokenizer)
    assert len(encode(rows, tokenizer, LINE)) == 9


def test_a_row_that_the_model_cannot_take_is_named(model_folder, tokenizer):
    model = hub.load_model(str(model_folder), torch.float32, "cpu")
    rows = labelled(("a", "y"), ("Ω" * 80, "n"))
    with pytest.raises(
        DataError, match=r"rows\.csv, line 3: makes \d+ tokens, and the model takes 128"
    ):
        evaluate_labels(model, [], rows, tokenizer, template=LINE)


def test_a_label_that_nothing_comes_before_is_named():
    def tokenizer(texts, verbose):
        return {"input_ids": [[len(text)] for text in texts]}

    tokenizer.eos_token_id = None
    with pytest.raises(DataError, match="line 2: the text makes no token before the label"):
        encode(labelled(("a", "y"), ("b", "no")), tokenizer)


def test_a_limit_draws_rows_and_progress_counts_passes(tokenizer):
    model, calls = Bigram(len(tokenizer)), []
    answers = evaluate_labels(
        model,
        [],
        ROWS,
        tokenizer,
        template=LINE,
        batch_size=4,
        limit=3,
        progress=lambda *now: calls.append(now),
    )
    assert answers.rows == ROWS.sample(3)
    assert len(answers.correct.counts) == 3
    assert calls == [(1, 2), (2, 2)]


def test_a_loss_that_is_not_finite_names_line_and_label(tokenizer):
    model = Bigram(len(tokenizer))
    wrong = tokenizer("1")["input_ids"][0]
    model.table.weight.data[wrong] = math.nan
    rows = labelled(("a", "x"), ("b", "1y"))
    with pytest.raises(NonFiniteError, match=r"^the base, rows\.csv, line 2, label '1y': the loss"):
        evaluate_labels(model, [], rows, tokenizer)
    assert np.isfinite(
        evaluate_labels(model, [], labelled(("a", "x"), ("b", "y")), tokenizer).losses.sums[None]
    ).all()
