"""The held-out loss is the mean over tokens, and measuring it leaves no trace."""

import math

import pytest
import torch

from tether.errors import DataError, NonFiniteError
from tether.training.data import Sequences
from tether.training.evaluate import Evaluation, evaluate

from .conftest import examples

CPU = torch.device("cpu")


def test_the_loss_is_the_mean_over_tokens_whatever_the_batch(tiny_llama):
    model, data = tiny_llama().eval(), examples(7)
    total, tokens = 0.0, 0
    for index in range(7):
        batch = data.batch([index], CPU)
        number = int((batch["labels"][:, 1:] >= 0).sum())
        with torch.no_grad():
            total += float(model(**batch).loss) * number  # transformers' own mean
        tokens += number
    for size in (1, 2, 7, 100):
        found = evaluate(model, data, batch_size=size)
        assert found.loss == pytest.approx(total / tokens, rel=1e-6)
        assert found.tokens == tokens


def test_a_limit_takes_sequences_evenly(tiny_llama):
    model, data = tiny_llama(), examples(10)
    assert evaluate(model, data, limit=3) == evaluate(model, data.pick([0, 3, 6]))
    assert evaluate(model, data, limit=99) == evaluate(model, data)


def test_evaluating_leaves_no_trace(live):
    run = live(lora={"dropout": 0.5})
    run.train(examples(8), until=2)
    without_dropout = evaluate(run.model.eval(), examples(4))
    run.model.train()
    run.model.model.layers[0].mlp.eval()
    for parameter in run.handle.parameters():
        parameter.grad = torch.ones_like(parameter)

    def trace() -> list[object]:
        modules = [module.training for module in run.model.modules()]
        parameters = [(p.requires_grad, p._version) for p in run.model.parameters()]
        return [modules, parameters, torch.is_grad_enabled()]

    before, state = trace(), run.state()
    assert evaluate(run.model, examples(4)) == without_dropout
    assert trace() == before
    assert all(map(torch.equal, state, run.state()))
    assert all((p.grad == 1).all() for p in run.handle.parameters())


def test_progress_counts_batches(tiny_llama):
    calls: list[tuple[int, int]] = []
    evaluate(tiny_llama(), examples(5), 2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_an_output_that_is_not_finite_is_an_error(tiny_llama):
    model = tiny_llama().train()
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"held-out loss is nan"):
        evaluate(model, examples(2))
    assert model.training


def test_nothing_to_evaluate_is_an_error(tiny_llama):
    with pytest.raises(DataError, match="no held-out text"):
        evaluate(tiny_llama(), Sequences((), (), packed=True))


def test_perplexity_stays_finite():
    assert Evaluation(math.log(7), 1).perplexity == pytest.approx(7)
    assert math.isfinite(Evaluation(1e6, 1).perplexity)
