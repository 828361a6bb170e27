"""The base and every adapter in one pass: each as if it were alone, sequence by sequence."""

import math

import numpy as np
import pytest
import torch

import tether
from tether.errors import ConfigError, DataError, NonFiniteError, UnknownNameError
from tether.training.data import Sequences
from tether.training.evaluate import evaluate, evaluate_all, sequence_losses

from .conftest import examples

CPU = torch.device("cpu")
CONFIGS = {
    "plain": tether.LoraConfig(rank=2, init="lora", dropout=0.5),
    "dora": tether.LoraConfig(rank=2, use_dora=True),
    "head": tether.LoraConfig(rank=2, modules_to_save=["lm_head"]),
    "other-head": tether.LoraConfig(rank=2, modules_to_save=["lm_head"], bias="all"),
}


@pytest.fixture
def many(tiny_llama):
    """A model with adapters of every kind, none of them active, and changed from their start."""
    model = tiny_llama(tie_word_embeddings=False, attention_bias=True)
    for name, config in CONFIGS.items():
        handle = tether.attach(model, config, name)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.normal_(std=0.1)
        tether.activate(model)
    return model


def test_the_losses_are_those_of_each_sequence_alone(tiny_llama):
    model, data = tiny_llama().eval(), examples(7)
    with torch.no_grad():
        sums, counts = sequence_losses(model, data.batch(range(7), CPU))
        for index in range(7):
            batch = data.batch([index], CPU)
            number = int((batch["labels"][:, 1:] >= 0).sum())
            alone = float(model(**batch).loss) * number  # transformers' own mean
            assert float(sums[index]) == pytest.approx(alone, rel=1e-6)
            assert int(counts[index]) == number


def test_together_is_each_alone(many):
    data = examples(9)
    scores = evaluate_all(many, list(CONFIGS), data, 4)
    assert list(scores.sums) == [None, *CONFIGS]
    for name in (None, *CONFIGS):
        with tether.only(many, *([] if name is None else [name])):
            alone = evaluate(many, data, 4)
            assert scores.mean(name).value == pytest.approx(alone.loss, rel=1e-6)
            assert scores.counts.sum() == alone.tokens
    assert len({round(scores.mean(name).value, 4) for name in scores.sums}) == 1 + len(CONFIGS)


def test_the_batch_changes_nothing_but_rounding(many):
    data = examples(9)
    one = evaluate_all(many, ["head"], data, 1)
    for size in (2, 9, 100):
        other = evaluate_all(many, ["head"], data, size)
        assert np.array_equal(other.counts, one.counts)
        for name in (None, "head"):
            assert other.sums[name] == pytest.approx(one.sums[name], rel=1e-5)


def test_a_limit_takes_the_sequences_that_evaluate_takes(many):
    data = examples(10)
    limited = evaluate_all(many, ["dora"], data, limit=3)
    picked = evaluate_all(many, ["dora"], data.pick([0, 3, 6]))
    for name in (None, "dora"):
        assert np.array_equal(limited.sums[name], picked.sums[name])


def test_it_leaves_no_trace(many):
    tether.activate(many, "plain", weights=[0.5])
    many.train()
    many.model.layers[0].eval()
    modes = [module.training for module in many.modules()]
    state = torch.get_rng_state()
    before = evaluate(many, examples(3)).loss
    scores = evaluate_all(many, ["dora", "plain"], examples(3))
    assert [module.training for module in many.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    handles = tether.handles(many)
    assert [name for name, handle in handles.items() if handle.active] == ["plain"]
    assert handles["plain"].weight == 0.5
    assert evaluate(many, examples(3)).loss == before != scores.mean("plain").value


def test_every_batch_is_made_once_and_progress_counts_passes(many, monkeypatch):
    made, calls = [], []
    batch = Sequences.batch
    monkeypatch.setattr(
        Sequences, "batch", lambda self, *args: made.append(1) or batch(self, *args)
    )
    evaluate_all(many, ["dora", "head"], examples(5), 2, progress=lambda *now: calls.append(now))
    assert len(made) == 3
    assert calls == [(n, 9) for n in range(1, 10)]


def test_a_loss_that_is_not_finite_names_adapter_and_sequence(many):
    data = examples(4)
    with torch.no_grad():
        next(tether.handles(many)["dora"].parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"^adapter 'dora', sequence 1: the loss is nan"):
        evaluate_all(many, ["plain", "dora"], data)
    wrong = data.tokens[2][0]
    many.model.embed_tokens.weight.data[wrong] = math.inf
    first = next(i for i, row in enumerate(data.tokens) if wrong in row)
    with pytest.raises(NonFiniteError, match=rf"^the base, row {first}: the loss is nan"):
        evaluate_all(many, ["plain"], data, describe=lambda index: f"row {index}")


def test_what_cannot_be_meant_is_refused(many):
    with pytest.raises(UnknownNameError, match="no adapter 'doar'"):
        evaluate_all(many, ["doar"], examples(2))
    with pytest.raises(ConfigError, match="'dora' is named 2 times"):
        evaluate_all(many, ["dora", "plain", "dora"], examples(2))
    with pytest.raises(DataError, match="no held-out text"):
        evaluate_all(many, [], Sequences((), (), packed=True))
