"""Models that transformers quantised with bitsandbytes, beside peft on the same base."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import tether
from tether.errors import BaseMismatchError

from .bases import SETTINGS, load_llama, save_llama, stored, tokens


@contextmanager
def quiet() -> Iterator[None]:
    """Without peft's own notices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits


def train(handle: tether.Handle, steps: int = 6) -> list[float]:
    model, losses = handle.model, []
    optimizer = torch.optim.AdamW(handle.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def distance(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_plain_lora_gives_the_live_output_in_peft(kind, use_dora, folder, tmp_path):
    model = load_llama(folder, kind)
    base, before = logits(model), stored(model)
    handle = tether.attach(model, tether.LoraConfig(rank=4, use_dora=use_dora))
    assert torch.equal(logits(model), base)
    losses = train(handle)
    assert losses[-1] < losses[0] - 0.2
    live = logits(model)
    handle.save(tmp_path / "adapter.safetensors")
    tether.save_as_lora(handle, tmp_path / "lora", verify={"input_ids": tokens()})
    handle.detach()
    assert torch.equal(logits(model), base)
    assert stored(model) == before

    again = load_llama(folder, kind)
    tether.attach(again, tether.load(tmp_path / "adapter.safetensors"))
    assert torch.equal(logits(again), live)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(load_llama(folder, kind), tmp_path / "lora")
    # int8 rounds the input of each layer: a last bit before it may become a step of 1/127.
    tolerance = 1e-2 if kind == "int8" else 1e-5
    assert distance(logits(theirs), live) < tolerance < distance(base, live) / 5
    if not use_dora:  # what peft made of it, read back
        plain = tether.attach(load_llama(folder, kind), tether.load(tmp_path / "lora"))
        assert distance(logits(plain.model), live) < tolerance


def test_peft_moves_the_output_before_the_first_step_and_we_do_not(folder):
    base = logits(load_llama(folder))
    model = load_llama(folder)
    config = peft.LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="olora", target_modules="all-linear"
    )
    with quiet():
        moved = logits(peft.get_peft_model(model, config).eval())
    assert distance(moved, base) > 0.01
    model = load_llama(folder)
    tether.attach(model, tether.LoraConfig(init="olora", rank=4))
    assert torch.equal(logits(model), base)


def test_peft_refuses_pissa_where_we_start_from_the_original(folder):
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear")
    with quiet(), pytest.raises(TypeError, match="float32, float16, or bfloat16"):
        peft.get_peft_model(load_llama(folder), config)
    model = load_llama(folder)
    adapter = tether.init(model, tether.LoraConfig(rank=4), weights_from=folder)
    handle = tether.attach(model, adapter)
    losses = train(handle)
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", SETTINGS)
def test_gradient_checkpointing_gives_the_same_losses(kind, reentrant, folder):
    plain = train(tether.attach(load_llama(folder, kind), tether.LoraConfig(rank=4)), 3)
    model = load_llama(folder, kind)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    with quiet():
        handle = tether.attach(model, tether.LoraConfig(rank=4))
        assert train(handle, 3) == pytest.approx(plain, rel=1e-6)
    assert len(set(plain)) == 3


def test_a_quantised_checkpoint_is_the_same_base(folder, tmp_path):
    """Quantised when it was loaded, or before it was saved."""
    model = load_llama(folder)
    adapter = tether.init(model, tether.LoraConfig(rank=4))
    model.save_pretrained(tmp_path / "quantised")
    again = load_llama(tmp_path / "quantised", None)
    tether.attach(again, adapter)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(BaseMismatchError, match="bitsandbytes fp4"):
        tether.attach(load_llama(folder, "fp4"), adapter)
