"""Half precision: the base keeps its bits, and a small ΔW survives being written.

FIELD.md, "Half precision". peft's figures are measured in each test, beside ours.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tether

from .conftest import (
    IDS,
    LINEAR,
    change,
    llama,
    output,
    peft_layers,
    peft_load,
    peft_model,
    peft_save,
    relative,
    weights,
)

METHODS = pytest.mark.parametrize("init", ["pissa", "olora"])


def bfloat16_llama() -> nn.Module:
    return llama(dtype=torch.bfloat16)


def settings(init: str) -> dict:
    return {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "init_lora_weights": init}


def ours(init: str, base: nn.Module) -> tether.Handle:
    config = tether.LoraConfig(init, rank=4, alpha=6, target_modules=LINEAR)
    return tether.attach(base, config)


def train(model: nn.Module, parameters: Iterable[nn.Parameter], rate: float) -> None:
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0)
    for _ in range(10):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()


@METHODS
@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=["bf16", "fp16"]
)
def test_start_on_a_half_precision_base(init: str, dtype: torch.dtype, step: float) -> None:
    """peft rounds the residual, and then the factors, so its start is beside the base."""
    base, theirs = llama(dtype=dtype), peft_model(llama(dtype=dtype), **settings(init))
    exact = peft_layers(peft_model(llama(dtype=dtype).float(), **settings(init)))
    for site, layer in peft_layers(theirs).items():
        weight = base.get_submodule(site).weight.detach().double()
        lost = layer.base_layer.weight.double() - exact[site].base_layer.weight.double()
        assert step / 5 < float(lost.norm() / weight.norm()) < step / 2
        factor = layer.lora_A["default"].weight.detach()
        assert torch.equal(factor, factor.to(dtype).float())
        assert relative(factor, exact[site].lora_A["default"].weight.detach()) > step / 5
    assert relative(output(theirs), output(base)) > 2 * step

    wanted, before = output(base), tether.fingerprint(base)
    ours(init, base)
    assert torch.equal(output(base), wanted)
    assert tether.fingerprint(base) == before


def product(state: dict[str, Tensor], site: str, dtype: torch.dtype) -> Tensor:
    """B·A of a file's factors after rounding them to `dtype`, in float64."""
    a, b = (
        state[f"base_model.model.{site}.{name}.weight"].to(dtype).double()
        for name in ("lora_A", "lora_B")
    )
    return b @ a


@METHODS
@pytest.mark.parametrize(
    ("dtype", "limit", "lost"),
    [
        (torch.bfloat16, 5e-3, {2e-5: 0.5, 1e-3: 0.01}),
        (torch.float16, 1e-3, {2e-5: 0.05, 1e-3: 2e-3}),
    ],
    ids=["bf16", "fp16"],
)
@pytest.mark.parametrize("rate", [2e-5, 1e-3])
def test_small_changes_survive_conversion(
    init: str, rate: float, dtype: torch.dtype, limit: float, lost: dict, tmp_path: Path
) -> None:
    """[B, dB]·[dA; A0] does not cancel; peft's [B, −B0]·[A; A0] does."""
    theirs = peft_model(bfloat16_llama(), **settings(init))
    theirs.peft_config["default"].init_lora_weights = True  # as its guide says, before saving
    peft_save(theirs, tmp_path / "start")
    start = {name: tensor.double() for name, tensor in weights(tmp_path / "start").items()}
    train(theirs, [p for p in theirs.parameters() if p.requires_grad], rate)
    peft_save(theirs, tmp_path / "end")
    end = weights(tmp_path / "end")
    peft_save(
        theirs,
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    converted = weights(tmp_path / "converted")

    base = bfloat16_llama()
    handle = ours(init, base)
    train(base, handle.parameters(), rate)
    report = tether.save_as_lora(handle, tmp_path / "ours", dtype=dtype)
    written = weights(tmp_path / "ours")

    for site, layer in handle.snapshot().layers.items():
        truth = product(end, site, torch.float64) - product(start, site, torch.float64)
        assert relative(product(converted, site, torch.float32), truth) < 1e-6
        assert relative(product(converted, site, dtype), truth) > lost[rate]

        truth = change(layer)
        error = relative(product(written, site, dtype), truth)
        assert error < limit
        assert error == pytest.approx(report.sites[site].error, rel=0.01)
    live, served = output(base), output(peft_load(bfloat16_llama(), tmp_path / "ours"))
    assert relative(served, live) < 0.02  # bfloat16's own noise
