"""Going on with another adapter, method or base: both values, what to do, and no file changed."""

import pytest
import torch

import tether
from tether.errors import BaseMismatchError, ConfigError, ShapeMismatchError

from .trainer_runs import equal, make_trainer

RANK = 4
CASES = {
    "rank": ({"rank": 2}, ShapeMismatchError, ["rank is 4 in the file, 2 here"]),
    "targets": (
        {"target_modules": ["q_proj"]},
        ShapeMismatchError,
        ["is only in the file", "14 sites in the file, 2 here"],
    ),
    "more targets": (
        {"target_modules": ["all-linear", "embed_tokens"]},
        ShapeMismatchError,
        ["'model.embed_tokens' is only in the live adapter", "14 sites in the file, 15 here"],
    ),
    "method": ({"init": "olora"}, ConfigError, ["method is 'pissa' in the file, 'olora' here"]),
    "base": (
        {},
        BaseMismatchError,
        ["model.layers.1.mlp.up_proj", "made on float32", "here is float32", "sha256"],
    ),
}


def content(folder):
    """Every file below a folder, with its bytes and times."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("name", CASES)
def test_another_run_s_checkpoint_is_refused_and_no_file_is_written(name, tiny_llama, tmp_path):
    settings, error, words = CASES[name]
    model = tiny_llama()
    tether.attach(model, tether.LoraConfig(rank=RANK))
    make_trainer(model, tmp_path).train()
    before = content(tmp_path)
    assert len(before) == 12

    other = tiny_llama()
    if name == "base":
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    handle = tether.attach(other, tether.LoraConfig(**{"rank": RANK} | settings))
    start, base = handle.snapshot(), tether.fingerprint(other)
    trainer = make_trainer(other, tmp_path)
    with pytest.raises(error) as caught:
        trainer.train(resume_from_checkpoint=True)
    message = str(caught.value)
    assert all(word in message for word in words), message
    advice = "Load the base model" if name == "base" else "Attach with the settings of the checkp"
    assert advice in message
    assert equal(handle.snapshot(), start)
    assert handle.record.provenance == start.provenance
    assert tether.fingerprint(other) == base
    assert content(tmp_path) == before
