"""A quantised base in an adapted Trainer: checkpoints, going on, and the export.

The models are as people load them, with a quantization_config of transformers, on the CPU.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig, Trainer, TrainingArguments

import tether
from quantized.bases import bitsandbytes, load_llama, save_llama, stored, torchao
from tether.errors import BaseMismatchError
from tether.integrations.transformers import ADAPTER_FILE, ExportLora, last_adapter

from .trainer_runs import arguments, equal, losses, make_trainer

NAMES = {
    "nf4": "bitsandbytes nf4",
    "int8": "bitsandbytes int8",
    "torchao int8": "torchao int8",
}
CONFIG = tether.LoraConfig(init="pissa", rank=4, dropout=0.1)


@pytest.fixture(autouse=True)
def _no_packing(monkeypatch):
    """On processors with bfloat16 products bitsandbytes packs weights anew in an evaluation."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("original"))


def load(folder, kind):
    if kind != "torchao int8":
        return load_llama(folder, kind)
    config = TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig(version=2))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    ).eval()


@pytest.mark.parametrize("kind", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(original, tmp_path, kind):
    model = load(original, kind)
    tether.attach(model, CONFIG)
    before = stored(model)
    whole = make_trainer(model, tmp_path / "whole", [ExportLora()])
    assert not getattr(model, "_hf_peft_config_loaded", False)
    whole.train()
    assert stored(model) == before
    seen = losses(whole)
    assert seen[-1] < seen[0]
    for name in ("checkpoint-2", "checkpoint-4"):
        assert not list((tmp_path / "whole" / name).glob("model*"))

    torch.manual_seed(77)  # a new process has another random state
    (tmp_path / "halves").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "halves" / "checkpoint-2")
    again = load(original, kind)
    tether.attach(again, last_adapter(tmp_path / "halves"))
    halves = make_trainer(again, tmp_path / "halves", [ExportLora()])
    halves.train(resume_from_checkpoint=True)
    assert losses(halves) == seen
    assert equal(halves.adapter.snapshot(), whole.adapter.snapshot())
    folders = [tmp_path / run / "checkpoint-4" for run in ("whole", "halves")]
    assert len({(folder / "optimizer.pt").read_bytes() for folder in folders}) == 1
    for name in (ADAPTER_FILE, "lora"):
        assert equal(*(tether.load(folder / name) for folder in folders))
    assert stored(again) == before


@pytest.mark.parametrize("kind", NAMES)
def test_the_export_is_the_trained_model_and_says_for_which_base(original, tmp_path, kind):
    model = load(original, kind)
    handle = tether.attach(model, tether.LoraConfig(rank=4))
    make_trainer(model, tmp_path, [ExportLora()]).train()
    tokens = {"input_ids": torch.arange(12).reshape(2, 6)}
    model.eval()
    live = model(**tokens).logits.detach()
    trained = tether.load(tmp_path / "checkpoint-4" / ADAPTER_FILE)
    assert trained.provenance.quantization == (NAMES[kind],)
    assert NAMES[kind] in (tmp_path / "lora" / "README.md").read_text("utf-8")
    handle.detach()
    assert (model(**tokens).logits - live).abs().max() > 1e-2
    tether.attach(model, tether.load(tmp_path / "lora"))
    # float32 factors of twice the rank, multiplied in another order.
    torch.testing.assert_close(model(**tokens).logits, live, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_another_quantisation_is_refused_and_left_alone(original, tmp_path):
    model = load(original, "nf4")
    tether.attach(model, CONFIG)
    make_trainer(model, tmp_path).train()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for kind, name in (("fp4", "bitsandbytes fp4"), (None, "float32")):
        other = load_llama(original, kind)
        handle = tether.attach(other, CONFIG)
        start = handle.snapshot()
        trainer = make_trainer(other, tmp_path)
        with pytest.raises(BaseMismatchError, match="made on bitsandbytes nf4") as caught:
            trainer.train(resume_from_checkpoint=True)
        assert name in str(caught.value)
        assert equal(handle.snapshot(), start)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_without_adapt_the_trainer_refuses_such_a_base(original, tmp_path):
    model = load(original, "nf4")
    tether.attach(model, CONFIG)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=TrainingArguments(**arguments(tmp_path)))
