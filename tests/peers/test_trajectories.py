"""Training from an anchor is peft's training: the same start, the same losses."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tether

from .conftest import (
    IDS,
    LINEAR,
    VOCAB,
    llama,
    output,
    peft_layers,
    peft_model,
    peft_save,
    relative,
)

STEPS = 30
SETTINGS = {
    "alpha": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"up_proj": 6, "layers.1.self_attn.v_proj": 2},
        "alpha_pattern": {"down_proj": 3, "up_proj": 10},
    },
}


def graded_llama() -> nn.Module:
    """Singular values well apart, or float32, in which peft decomposes, cannot tell their vectors.

    (On plain random weights peft's own factors are off by up to 2e-5.)
    """
    model = llama()
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data *= 3 * 0.8 ** torch.arange(weight.shape[1])
    return model


def losses(model: nn.Module, parameters: Iterable[nn.Parameter], steps: int = STEPS) -> Tensor:
    """AdamW without weight decay on counting modulo VOCAB, a new batch in every step."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0)
    found = []
    for _ in range(steps):
        ids = (torch.randint(VOCAB, (4, 1), generator=generator) + torch.arange(16)) % VOCAB
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def ours(settings: dict) -> dict:
    """peft's settings under tether's names."""
    names = {"r": "rank", "lora_alpha": "alpha", "init_lora_weights": "init"}
    return {names.get(key, key): value for key, value in settings.items()}


@pytest.mark.parametrize("extra", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_anchored_start_and_losses(init: str, extra: dict) -> None:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "init_lora_weights": init}
    theirs = peft_model(graded_llama(), **settings, **extra)
    base = graded_llama()
    handle = tether.attach(base, tether.LoraConfig(**ours(settings | extra)))

    layers = peft_layers(theirs)
    assert list(layers) == list(handle.sites)
    for site, layer in handle.snapshot().layers.items():
        a, b = (
            getattr(layers[site], name)["default"].weight.detach() for name in ("lora_A", "lora_B")
        )
        # A pair of singular vectors has no sign of its own.
        sign = (a * layer.anchor.A).sum(1).sign()
        assert relative(sign[:, None] * layer.anchor.A, a) < 1e-5
        assert relative(layer.anchor.B * sign, b) < 1e-5
        assert layer.scaling == layers[site].scaling["default"]
    assert relative(output(theirs), output(base)) < 1e-5

    wanted = losses(theirs, (p for p in theirs.parameters() if p.requires_grad))
    found = losses(base, handle.parameters())
    assert wanted[-5:].mean() < wanted[0] - 0.1  # it has learnt
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("extra", SETTINGS.values(), ids=SETTINGS)
def test_plain_losses_from_the_same_factors(extra: dict, tmp_path: Path) -> None:
    theirs = peft_model(graded_llama(), r=4, lora_alpha=6, target_modules=LINEAR, **extra)
    base = graded_llama()
    handle = tether.attach(base, tether.load(peft_save(theirs, tmp_path / "start")))
    assert torch.equal(output(base), output(graded_llama()))

    wanted = losses(theirs, (p for p in theirs.parameters() if p.requires_grad))
    found = losses(base, handle.parameters())
    assert wanted[-5:].mean() < wanted[0] - 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert relative(output(base, IDS), output(theirs, IDS)) < 1e-5
