"""Adapters beside each other on one base: logits, losses, texts, and no trace left."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import tether
from tether.errors import ConfigError, DataError, NonFiniteError
from tether.training.agreement import agreement
from tether.training.behaviour import behaviour, put_on
from tether.training.data import Sequences, load
from tether.training.generate import beginnings, generate
from tiny_model import make_tokenizer

from .conftest import examples


def moved(model, seed, size=0.05):
    """A LoRA of this base that has moved."""
    handle = tether.attach(model, tether.LoraConfig(rank=2), f"made-{seed}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return handle.detach()


@pytest.fixture
def both(tiny_llama):
    model = tiny_llama(initializer_range=0.15)
    values = {"A": moved(model, 1), "B": moved(model, 2)}
    put_on(model, values)
    return model


def logits(model, name, tokens):
    with torch.no_grad(), tether.only(model, *([name] if name else [])):
        return model(torch.tensor([tokens])).logits[0].double()


def test_logits_are_compared_by_the_definitions(both):
    data = examples(5)
    found = agreement(both, "A", ["B", None], data, limit=3)
    for name in ("B", None):
        pairs = [(logits(both, "A", t), logits(both, name, t)) for t in data.tokens[:3]]
        a, b = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
        p, q = a.softmax(-1), b.softmax(-1)
        each = (p * (p.log() - q.log())).sum(-1)
        assert found[name].tokens == len(a) == sum(map(len, data.tokens[:3]))
        # The logits themselves are float32; shapes of batches change their last digits.
        assert found[name].largest == pytest.approx(float((a - b).abs().max()), rel=1e-4)
        assert found[name].divergence == pytest.approx(float(each.mean()), rel=1e-4)
        assert found[name].same == float((a.argmax(-1) == b.argmax(-1)).double().mean())
    assert found["B"].largest > 1e-2
    # The other way round it is another number: KL is not symmetric.
    back = agreement(both, "B", ["A"], data, limit=3)["A"]
    assert back.divergence != pytest.approx(found["B"].divergence, rel=1e-3)


def test_an_adapter_agrees_with_itself(both):
    (same,) = agreement(both, "A", ["A"], examples(2)).values()
    assert (same.largest, same.divergence, same.same) == (0.0, 0.0, 1.0)


def test_nothing_to_compare_and_what_is_not_finite_are_refused(both):
    with pytest.raises(DataError, match="no text"):
        agreement(both, "A", ["B"], Sequences((), (), False))
    with torch.no_grad():
        both.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="adapter 'A': a logit"):
        agreement(both, "A", ["B"], examples(2))


def test_adapters_that_train_one_module_whole_live_side_by_side(tiny_llama):
    model = tiny_llama(initializer_range=0.15, tie_word_embeddings=False)
    values = {}
    for name in "AB":
        config = tether.LoraConfig(rank=2, modules_to_save=["lm_head"])
        handle = tether.attach(model, config, name)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        values[name] = handle.detach()
    put_on(model, values)
    found = agreement(model, "A", ["B", None], examples(2))
    assert min(found["B"].largest, found[None].largest) > 1e-2


@pytest.fixture
def real(model_folder):
    """A model with a tokenizer, whose own settings would sample."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    put_on(model, {"A": moved(model, 1, 0.3), "B": moved(model, 2, 0.3)})
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    return model


def test_all_of_it_leaves_no_trace(real, text_file):
    tokenizer = make_tokenizer()
    data = load(str(text_file), tokenizer, 32)
    real.train()
    state, active = torch.get_rng_state(), [h.active for h in tether.handles(real).values()]
    before = {name: value.clone() for name, value in real.state_dict().items()}
    found = behaviour(real, tokenizer, ["A", "B"], data, limit=3, length=2)
    assert set(found.agreements) == {None, "B"}
    assert set(found.scores.sums) == {None, "A", "B"}
    assert len(found.scores.counts) == 3
    assert [set(each.texts) for each in found.generations] == [{None, "A", "B"}] * 3
    assert real.training
    assert torch.equal(torch.get_rng_state(), state)
    assert [h.active for h in tether.handles(real).values()] == active == [False, False]
    assert all(torch.equal(value, before[name]) for name, value in real.state_dict().items())
    # Prompts that are given are used, and without a length there are no texts.
    own = behaviour(real, tokenizer, ["A", "B"], data, limit=1, prompts=["9 green"], length=1)
    assert [each.prompt for each in own.generations] == ["9 green"]
    assert behaviour(real, tokenizer, ["A", "B"], data, limit=1).generations == ()


def test_texts_are_the_most_likely_tokens_of_each_adapter_alone(real):
    tokenizer, prompt = make_tokenizer(), "3 green bottles"
    (found,) = generate(real, tokenizer, [None, "A", "B"], [prompt], 6)
    assert found.prompt == prompt
    for name, text in found.texts.items():
        tokens = tokenizer(prompt)["input_ids"]
        added = []
        while len(added) < 6 and tokenizer.eos_token_id not in added:
            added.append(int(logits(real, name, tokens + added)[-1].argmax()))
        assert text == tokenizer.decode(added, skip_special_tokens=True)
    assert len(set(found.texts.values())) == 3
    assert real.generation_config.do_sample


def test_a_prompt_that_cannot_be_continued_is_refused(real):
    with pytest.raises(ConfigError, match=r"prompt '' makes no token"):
        generate(real, make_tokenizer(), ["A"], [""], 2)
    with pytest.raises(ConfigError, match=r"and 127 more exceed the model's 128"):
        generate(real, make_tokenizer(), ["A"], ["green bottles"], 127)


def test_prompts_are_the_beginnings_of_running_text(text_file):
    tokenizer = make_tokenizer()
    data = load(str(text_file), tokenizer, 32)
    found = beginnings(data, tokenizer, 3)
    assert len(found) == 3
    for place, text in enumerate(found):
        tokens = data.tokens[place * len(data) // 3]
        assert text == tokenizer.decode(list(tokens[:24]))


def test_prompts_of_examples_are_what_is_not_learnt(tmp_path):
    tokenizer = make_tokenizer()
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "one bottle", "completion": " falls"}\n' * 2, "utf-8")
    data = load(str(path), tokenizer, 32)
    assert beginnings(data, tokenizer, 1) == ["one bottle"]
