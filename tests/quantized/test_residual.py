"""A quantised residual base and the factors that complete it, as a folder."""

from pathlib import Path

import pytest
import torch
import transformers

import tether
from tether.errors import BaseMismatchError, ConfigError, UnsupportedModuleError, WriteError
from tether.integrations.residual import ADAPTER, KINDS, save_residual
from tether.quantized import values

from .bases import expanded, load_llama, save_llama, tokens

CONFIG = tether.LoraConfig(rank=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def load(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def nuclear(matrix: torch.Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.double()).sum())


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written(kind, rounds, folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    out = tmp_path / "out"
    report = save_residual(str(folder), out, CONFIG, quantize=kind, rounds=rounds)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not any(path.is_dir() for path in out.iterdir())
    assert report.quantization == (f"bitsandbytes {kind}",)
    model, adapter = load(out), tether.load(out / ADAPTER)
    full, plain = load(folder), load_llama(folder, kind)
    assert adapter.provenance.base_model == str(out)
    for path, layer in adapter.layers.items():
        weight = full.get_submodule(path).weight.detach()
        change = layer.trainable.B @ layer.trainable.A
        left = weight - values(path, model.get_submodule(path)) - change
        error = report.sites[path]
        assert error.residual == pytest.approx(nuclear(left), rel=1e-4)
        alone = weight - expanded(plain.get_submodule(path))
        assert error.plain == pytest.approx(nuclear(alone), rel=1e-3)
        if rounds == 1:
            anchor = tether.init(full, CONFIG).layers[path].anchor
            assert torch.equal(layer.trainable.A, anchor.A)
    # The whole is nearer to the original model than the base quantised as it is.
    handle = tether.attach(model, adapter)
    start = model(input_ids=tokens()).logits.detach()
    wanted = full(input_ids=tokens()).logits.detach()
    alone = plain(input_ids=tokens()).logits.detach()
    norm = torch.linalg.vector_norm
    assert norm(start - wanted) < 0.95 * norm(alone - wanted)
    assert 0.05 < report.reduction < 0.6
    assert report.to_dict()["reduction"] == report.reduction

    optimizer = torch.optim.AdamW(handle.parameters(), lr=5e-3)
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    exported = tether.save_as_lora(handle, tmp_path / "lora", verify={"input_ids": tokens()})
    assert (exported.rank, exported.quantization) == (8, report.quantization)
    handle.detach()
    for other in (plain, full):
        with pytest.raises(BaseMismatchError):
            tether.attach(other, adapter)


def test_further_rounds_lose_less(folder, tmp_path):
    once = save_residual(str(folder), tmp_path / "once", CONFIG)
    often = save_residual(str(folder), tmp_path / "often", CONFIG, rounds=4)
    assert often.reduction > once.reduction + 0.01


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"quantize": "nf3"}, ConfigError, "'nf3' is none of nf4, fp4, int8"),
        ({"config": tether.LoraConfig(init="lora")}, ConfigError, "takes a part of W, not 'lora'"),
        ({"config": tether.LoraConfig(use_dora=True)}, ConfigError, "no DoRA"),
        ({"rounds": 0}, ConfigError, "rounds must be a whole number"),
        ({"rounds": True}, ConfigError, "rounds must be a whole number"),
        (
            {"rounds": 2, "config": tether.LoraConfig(init="olora", rank=4)},
            ConfigError,
            "rounds=2 needs PiSSA, not 'olora'",
        ),
        (
            {"config": tether.LoraConfig(rank=4, target_modules=["lm_head"])},
            UnsupportedModuleError,
            "'lm_head': transformers leaves this module unquantised",
        ),
    ],
)
def test_what_cannot_be_meant_writes_nothing(settings, error, message, tmp_path):
    folder = save_llama(tmp_path / "base", tie_word_embeddings=False)
    with pytest.raises(error, match=message):
        save_residual(str(folder), tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_place_that_is_taken_stays_as_it_is(folder, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(WriteError, match="mine"):
        save_residual(str(folder), tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(WriteError, match="lies in the folder of the base model"):
        save_residual(str(folder), folder / "out", CONFIG)
