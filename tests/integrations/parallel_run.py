"""Train in this process, one of several of torch.distributed; run as a program on each rank.

Prints, once the run has been resumed from its middle: this rank's losses, those after the resume,
the digest of its adapter and of the resumed one, and the names of its checkpoint's files.
"""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from trainer_runs import losses, make_trainer, tensors

import tether
from tether.formats.native import digest, digest_texts
from tether.integrations.transformers import ExportLora


def train(out: Path, resume: str | None, **settings: object) -> tuple[list[float], str]:
    """Four steps; the losses and the digest of the adapter."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    tether.attach(model, tether.LoraConfig(init="pissa", rank=2, dropout=0.1))
    settings = {"save_total_limit": 2, "per_device_train_batch_size": 2} | settings
    trainer = make_trainer(model, out, [ExportLora()], **settings)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.args.world_size == int(os.environ["WORLD_SIZE"])
    texts = (digest(tensor) for _, tensor in tensors(trainer.adapter.snapshot()))
    return losses(trainer), digest_texts(*texts)


def main(out: Path, each_node: bool) -> None:
    """Train, and train the second half again."""
    whole = train(out, None, save_on_each_node=each_node)
    middle = str(out / "checkpoint-2")
    again = train(out, middle, save_on_each_node=each_node)
    files = sorted(path.name for path in (out / "checkpoint-4").iterdir())
    found = sorted(path.name for path in out.iterdir())
    print("result", json.dumps([whole, again, files, found]), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "each")
