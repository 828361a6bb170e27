"""`tether train` on the folder of a quantised model: a resumed run is the uninterrupted one."""

from pathlib import Path

import pytest
import torch

import tether
from tether.training import run as runs
from tether.training.report import Reporter
from tether.training.settings import Settings
from tiny_model import TEXT, make_tokenizer
from training.files import everything

from .bases import load_llama, save_llama

STEPS = 4


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_resumed_run_is_the_uninterrupted_one(kind, tmp_path):
    tokenizer = make_tokenizer()
    vocabulary = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    original = save_llama(tmp_path / "original", bos_token_id=None, **vocabulary)
    folder = tmp_path / "quantised"
    load_llama(original, kind).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    settings = Settings(
        model=str(folder),
        data=str(tmp_path / "text.txt"),
        lora=tether.LoraConfig(rank=2),
        steps=STEPS,
        learning_rate=1e-2,
        batch_size=2,
        block=16,
        eval_limit=4,
        save_every=0,
    )
    written = {}
    for name, parts in (("whole", 1), ("halves", 2)):
        run = runs.prepare(settings, tmp_path / name, overwrite=False, reporter=Reporter())
        if parts == 2:
            runs.execute(run, lambda run=run: run.step >= STEPS // 2)
            torch.manual_seed(77)  # a new process has another random state
            run = runs.resume(tmp_path / name, {}, Reporter())
            assert run.step == STEPS // 2
        runs.execute(run)
        written[name] = everything(tmp_path / name)
    assert written["halves"] == written["whole"]
    adapter = tether.load(tmp_path / "whole" / "adapter.safetensors")
    wanted = {"nf4": "bitsandbytes nf4", "int8": "bitsandbytes int8"}[kind]
    assert adapter.provenance.quantization == (wanted,)
    lora = Path(tmp_path / "whole" / "lora" / "README.md").read_text("utf-8")
    assert f"quantised as {wanted}" in lora
