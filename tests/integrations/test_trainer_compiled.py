"""torch_compile in an adapted Trainer: the compiled model trains, and what is saved is the adapter.

The backend is "aot_eager": all that compiling does but generating code, so no compiler is needed.
"""

import pytest
import torch

import tether
from quantized.bases import bitsandbytes, load_llama, save_llama
from tether.integrations.transformers import ADAPTER_FILE, ExportLora, last_adapter

from .trainer_runs import equal, losses, make_trainer

COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
FILES = {
    "adapter.safetensors",
    "lora",
    "optimizer.pt",
    "ranks.json",
    "rng_state.pth",
    "scheduler.pt",
}


@pytest.fixture(autouse=True)
def _fresh():
    """Nothing compiled in one test is used in another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def attached(tiny_llama):
    def make(adapter=None, **settings):
        model = tiny_llama(num_hidden_layers=1).eval()  # compiling takes its time
        tether.attach(model, adapter or tether.LoraConfig(**{"rank": 4} | settings))
        return model

    return make


def test_it_trains_what_the_model_as_it_is_trains(attached, tiny_llama, tmp_path):
    plain = make_trainer(attached(), tmp_path / "plain")
    plain.train()
    trainer = make_trainer(attached(), tmp_path / "compiled", [ExportLora()], **COMPILED)
    trainer.train()
    assert hasattr(trainer.model_wrapped, "_orig_mod")  # it was compiled
    # float32 sums in another order.
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    trained = trainer.adapter.snapshot()
    assert tether.compare(trained, plain.adapter.snapshot()).error < 1e-4
    checkpoint = tmp_path / "compiled" / "checkpoint-4"
    assert {path.name for path in checkpoint.iterdir()} == FILES | {"trainer_state.json"}
    assert equal(tether.load(checkpoint / ADAPTER_FILE), trained)
    for folder in (checkpoint / "lora", tmp_path / "compiled" / "lora"):
        assert tether.compare(tether.load(folder), trained).error < 1e-5
    trainer.save_model(str(tmp_path / "saved"))
    assert equal(tether.load(tmp_path / "saved" / ADAPTER_FILE), trained)
    trainer.adapter.detach()
    assert tether.fingerprint(trainer.model) == tether.fingerprint(tiny_llama(num_hidden_layers=1))


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(attached, tmp_path):
    whole = make_trainer(attached(dropout=0.1), tmp_path / "whole", **COMPILED)
    whole.train()
    torch._dynamo.reset()
    torch.manual_seed(5)
    (tmp_path / "halves").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "halves" / "checkpoint-2")
    model = attached(last_adapter(tmp_path / "halves"))
    halves = make_trainer(model, tmp_path / "halves", **COMPILED)
    halves.train(resume_from_checkpoint=True)
    assert losses(halves) == losses(whole)
    assert equal(halves.adapter.snapshot(), whole.adapter.snapshot())


def test_a_resume_into_a_model_that_was_compiled_before_is_seen_by_it(attached, tmp_path):
    """The values go into the very parameters that the compiled code reads."""
    trainer = make_trainer(attached(), tmp_path, **COMPILED)
    trainer.train()
    seen, wanted = losses(trainer), trainer.adapter.snapshot()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(trainer) == seen
    assert equal(trainer.adapter.snapshot(), wanted)


def test_a_quantised_base_is_compiled_too(tmp_path, monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    save_llama(tmp_path / "base", num_hidden_layers=1)
    found = []
    for name, settings in (("plain", {}), ("compiled", COMPILED)):
        model = load_llama(tmp_path / "base", "nf4")
        tether.attach(model, tether.LoraConfig(rank=4))
        trainer = make_trainer(model, tmp_path / name, **settings)
        trainer.train()
        found.append(trainer)
    assert losses(found[1]) == pytest.approx(losses(found[0]), rel=1e-5)
    checkpoint = tether.load(tmp_path / "compiled" / "checkpoint-4" / ADAPTER_FILE)
    assert equal(checkpoint, found[1].adapter.snapshot())
    assert checkpoint.provenance.quantization == ("bitsandbytes nf4",)
