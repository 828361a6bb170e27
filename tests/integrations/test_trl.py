"""An adapter in TRL's trainers: they run, resume, and compare with the base without a copy."""

import copy
import importlib
import tempfile

import pytest
import torch
from transformers import LlamaForSequenceClassification

import tether
from tether.errors import ConfigError
from tether.integrations.transformers import (
    ADAPTER_FILE,
    AdapterTrainer,
    ExportLora,
    Reference,
    ReportDrift,
    adapt,
)
from tiny_model import make_tokenizer

from .trainer_runs import arguments, equal, losses

trl = importlib.import_module("trl")
datasets = importlib.import_module("datasets")

# transformers renames its settings, and TRL still uses the old ones.
RENAMED = [
    r"ignore:.*gradient_checkpointing\w*` is deprecated:FutureWarning",
    r"ignore:`use_return_dict` is deprecated:FutureWarning",
]
pytestmark = [pytest.mark.filterwarnings(text) for text in RENAMED]

PREFERENCES = [
    {"prompt": f"{n} green bottles", "chosen": f", {n} left", "rejected": " and a wall"}
    for n in range(8)
]
RATED = [
    {"prompt": f"{n} green bottles", "completion": f", {n} left", "label": n % 2 == 0}
    for n in range(8)
]
TEXTS = [{"text": f"{n} green bottles, hanging"} for n in range(8)]
PROMPTS = [{"prompt": f"{n} green"} for n in range(8)]


def reward(completions, **_):
    """Longer is better."""
    return [float(len(completion)) for completion in completions]


SAMPLED = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
TRAINERS = {
    "SFT": (TEXTS, {}, {}),
    "DPO": (PREFERENCES, {}, {}),
    "KTO": (RATED, {}, {}),
    "Reward": (PREFERENCES, {}, {}),
    "GRPO": (PROMPTS, SAMPLED, {"reward_funcs": reward}),
    "RLOO": (PROMPTS, SAMPLED, {"reward_funcs": reward}),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def base(tiny_llama, tokenizer):
    """Make the tiny model, with a vocabulary for the tokenizer."""

    def make(head=False, **more):
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
        ends |= {"bos_token_id": None}
        # Large weights: what the reference gives is then far from what the trained model does.
        settings = {"vocab_size": len(tokenizer), "initializer_range": 0.2, **ends, **more}
        model = tiny_llama(**settings)
        if not head:
            return model
        model.config.num_labels = 1
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return LlamaForSequenceClassification(model.config)

    return make


@pytest.fixture
def make(base, tokenizer, tmp_path):
    """Make an adapted trainer of TRL's, by the first part of its name."""

    def trainer(kind, name="run", callbacks=(), lora=None, model=None, given=None, **settings):
        data, more, arguments_of = TRAINERS[kind]
        if model is None:
            model = base(head=kind == "Reward")
            whole = {"modules_to_save": ["score"]} if kind == "Reward" else {}
            tether.attach(model, tether.LoraConfig(**{"rank": 4} | whole | (lora or {})))
        cls, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
        settings = {"per_device_train_batch_size": 2, "bf16": False} | more | settings
        return adapt(cls)(
            model=model,
            args=config(**arguments(tmp_path / name, **settings)),
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tokenizer,
            callbacks=list(callbacks),
            **arguments_of | (given or {}),
        )

    return trainer


@pytest.fixture
def no_second_model(monkeypatch):
    """Loading another model is an error."""

    def load(*_, **__):
        raise AssertionError("a second model was loaded")

    for kind in TRAINERS:
        module = importlib.import_module(getattr(trl, f"{kind}Trainer").__module__)
        if hasattr(module, "create_model_from_path"):
            monkeypatch.setattr(module, "create_model_from_path", load)


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_trainer_runs_and_resumes_bit_for_bit(kind, make, no_second_model, tmp_path):
    whole = make(kind, "run", [ExportLora(at_end=False), ReportDrift(every=1)])
    assert isinstance(whole, AdapterTrainer)
    start = whole.adapter.snapshot()
    whole.train()
    assert len(losses(whole)) == 4
    assert not equal(whole.adapter.snapshot(), start)
    folder = tmp_path / "run" / "checkpoint-2"
    names = {path.name for path in folder.iterdir()}
    assert names >= {ADAPTER_FILE, "lora", "tokenizer.json", "optimizer.pt"}
    assert not any(name.startswith("model") for name in names)
    again = make(kind, "run", [ExportLora(at_end=False), ReportDrift(every=1)])
    again.train(resume_from_checkpoint=str(folder))
    assert losses(again) == losses(whole)
    assert equal(again.adapter.snapshot(), whole.adapter.snapshot())


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_the_reference_is_the_base_as_a_frozen_copy_of_it_is(kind, make, base, no_second_model):
    own = make(kind, "own")
    assert isinstance(own.ref_model, Reference)
    assert not list(own.ref_model.parameters())
    copied = make(kind, "copied", given={"ref_model": copy.deepcopy(base()).requires_grad_(False)})
    assert not isinstance(copied.ref_model, Reference)
    for trainer in (own, copied):
        trainer.train()
    assert losses(own) == losses(copied)
    # A reference that moved with the model would give the same loss at every step.
    assert max(losses(own)) - min(losses(own)) > 1e-3
    assert equal(own.adapter.snapshot(), copied.adapter.snapshot())
    key = "rewards/chosen"
    rewards = [
        [entry[key] for entry in trainer.state.log_history if key in entry]
        for trainer in (own, copied)
    ]
    assert rewards[0] == rewards[1]
    assert rewards[0][-1] != 0


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_sampling_trainers_get_the_base_as_reference_too(kind, make, base, no_second_model):
    own = make(kind, "own")
    assert isinstance(own.ref_model, Reference)
    assert own.beta == own.args.beta == 0.1
    own.train()
    copied = make(kind, "copied")  # here, so that both begin with the same random state
    frozen = copy.deepcopy(base()).requires_grad_(False).eval()
    importlib.import_module("trl.trainer.utils").add_fused_lm_head(frozen)
    copied.ref_model = frozen
    copied.train()
    kl = [[e["kl"] for e in t.state.log_history if "kl" in e] for t in (own, copied)]
    assert kl[0] == kl[1]
    assert max(map(abs, kl[0])) > 0
    assert losses(own) == losses(copied)
    without = make(kind, "without", beta=0.0)
    assert without.ref_model is None


def test_reference_log_probabilities_can_be_computed_before(make, no_second_model):
    live, before = make("DPO", "live"), make("DPO", "before", precompute_ref_log_probs=True)
    for trainer in (live, before):
        trainer.train()
    # In other batches than those of training: sums of differently padded rows.
    assert losses(live) == pytest.approx(losses(before), abs=1e-5)


def test_what_was_computed_before_is_known_by_the_base_and_not_by_the_adapter(base):
    prints = []
    for change in (0.0, 0.0, 1.0):
        model = base()
        with torch.no_grad():
            model.model.norm.weight[0] += change
        handle = tether.attach(model, tether.LoraConfig(rank=2))
        torch.nn.init.normal_(next(iter(handle.parameters())))
        prints.append(importlib.import_module("trl.trainer.utils").hash_module(Reference(model)))
    assert prints[0] == prints[1] != prints[2]


def test_the_reference_is_the_base_bitwise_and_leaves_no_trace(base):
    model = base(attention_dropout=0.5)  # which is off in a reference, also in training
    inputs = torch.arange(8)[None]
    wanted = model.eval()(inputs).logits
    handle = tether.attach(model, tether.LoraConfig(rank=4, dropout=0.5))
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter)
    model.train()
    state = torch.get_rng_state()
    reference = Reference(model)
    for called in (reference, reference.forward):
        found = called(inputs).logits
        assert torch.equal(found, wanted)
        assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not torch.equal(model(inputs).logits, wanted)
    assert reference.config is model.config
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = reference.nothing_such


def test_an_adapter_on_an_output_head_that_trl_does_not_call_is_refused(make):
    with pytest.raises(ConfigError, match=r"changes 'lm_head'.*exclude_modules"):
        make("SFT", lora={"target_modules": ["q_proj", "lm_head"]})


def test_dropout_that_would_not_be_disabled_is_refused(make):
    with pytest.raises(ConfigError, match=r"disable_dropout is set.*dropout is 0\.1"):
        make("DPO", lora={"dropout": 0.1})
    assert make("DPO", lora={"dropout": 0.1}, disable_dropout=False).ref_model is not None


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_a_reference_that_would_be_overwritten_is_refused(kind, make):
    with pytest.raises(ConfigError, match="sync_ref_model needs a reference model of its own"):
        make(kind, sync_ref_model=True)


def test_a_server_that_would_sample_from_the_base_is_refused(make):
    with pytest.raises(ConfigError, match="use_vllm"):
        make("GRPO", use_vllm=True)


def test_peft_beside_an_adapter_of_tethers_is_refused(make):
    peft = importlib.import_module("peft")
    with pytest.raises(ConfigError, match="peft_config"):
        make("SFT", given={"peft_config": peft.LoraConfig()})


def test_recomputed_activations_give_the_same_adapter(make):
    found = []
    for name, settings in {
        "kept": {"gradient_checkpointing": False},
        "recomputed": {"gradient_checkpointing": True},
        "again": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    }.items():
        trainer = make("SFT", name, **settings)
        trainer.train()
        found.append(trainer.adapter.snapshot())
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])


def test_the_arguments_may_be_given_by_place(base, tokenizer):
    model = base()
    tether.attach(model, tether.LoraConfig(rank=2))
    with tempfile.TemporaryDirectory() as out:
        args = trl.DPOConfig(**arguments(out, bf16=False))
        data = datasets.Dataset.from_list(PREFERENCES)
        trainer = adapt(trl.DPOTrainer)(
            model, None, args, train_dataset=data, processing_class=tokenizer
        )

        class Mine(trl.DPOTrainer):
            """A user's own, that takes whatever it is given."""

            def __init__(self, *args, extra, **kwargs):
                super().__init__(*args, **kwargs)
                self.extra = extra

        mine = adapt(Mine)(
            model=model, args=args, train_dataset=data, processing_class=tokenizer, extra=1
        )
    assert isinstance(trainer.ref_model, Reference)
    assert isinstance(mine.ref_model, Reference)
