"""Layers and settings that peft refuses obscurely or gets wrong in silence.

FIELD.md, "Coverage". peft's wrong value is measured in each test, beside ours.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tether
from tether.errors import (
    ConfigError,
    NonFiniteError,
    RankTooLargeError,
    UnknownMethodError,
    UnsupportedModuleError,
)

from .conftest import (
    CASES,
    Case,
    attached,
    gpt2,
    llama,
    output,
    peft_layers,
    peft_load,
    peft_model,
    peft_save,
    peft_trained,
    relative,
)

METHODS = pytest.mark.parametrize("init", ["pissa", "olora"])
Q = "model.layers.0.self_attn.q_proj"


def check_starts_at_base_and_learns(case: Case, init: str) -> None:
    """An anchor that carries a part of the weight, a bitwise start, a gradient in both factors."""
    base = case.build()
    handle = tether.attach(base, tether.LoraConfig(init, rank=2, target_modules=case.targets))
    assert torch.equal(output(base, case.inputs), output(case.build(), case.inputs))
    for layer in handle.snapshot().layers.values():
        assert (layer.anchor.B @ layer.anchor.A).norm() > 0.1
    result = base(case.inputs)
    (result if isinstance(result, Tensor) else result[0]).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in handle.parameters())


@METHODS
@pytest.mark.parametrize("target", ["volume", "plane", "line"])
def test_convolutions(init: str, target: str) -> None:
    case = CASES["convolutions"]
    with pytest.raises(ValueError, match=f"Unknown initialization init_lora_weights='{init}'"):
        peft_model(case.build(), r=2, target_modules=[target], init_lora_weights=init)
    check_starts_at_base_and_learns(Case(case.build, [target], case.inputs), init)


@pytest.mark.parametrize("init", ["pissa", "olora", "nonsense"])
def test_embedding(init: str) -> None:
    """peft takes any name and starts from zero and a normal, as if none had been given."""
    model = peft_model(llama(), r=2, target_modules=["embed_tokens"], init_lora_weights=init)
    (layer,) = peft_layers(model).values()
    assert not layer.lora_embedding_A["default"].any()
    assert float(layer.lora_embedding_B["default"].detach().std()) == pytest.approx(1, abs=0.3)

    if init == "nonsense":
        with pytest.raises(UnknownMethodError, match="init 'nonsense' is not a method"):
            tether.LoraConfig(init, target_modules=["embed_tokens"])
    else:
        check_starts_at_base_and_learns(Case(llama, ["embed_tokens"]), init)


@pytest.mark.parametrize("target", ["c_attn", "c_fc", "mlp.c_proj", "attn.c_proj"])
def test_olora_on_gpt2(target: str) -> None:
    """peft forgets that Conv1D is stored transposed: it crashes, or is wrong where square."""
    model = peft_model(gpt2(), r=2, target_modules=[target], init_lora_weights="olora")
    if target == "attn.c_proj":
        assert relative(output(model), output(gpt2())) > 0.5
    else:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            output(model)
    check_starts_at_base_and_learns(Case(gpt2, [target]), "olora")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.attention(x, x, x)[0]


class Experts(nn.Module):
    """As in mixtures: one parameter, and no module, for all experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight_of_all = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eij->btj", x, self.weight_of_all)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        self.experts = Experts()

    def forward(self, ids: Tensor) -> Tensor:
        return self.experts(self.embed(ids))


@METHODS
@pytest.mark.parametrize(
    ("build", "target", "peer"),
    [
        (Attention, "attention", {"target_modules": ["attention"]}),
        (Mixture, "experts", {"target_parameters": ["experts.weight_of_all"]}),
    ],
    ids=["attention", "experts"],
)
def test_modules_without_one_weight_are_refused_by_name(
    init: str, build: type[nn.Module], target: str, peer: dict
) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        peft_model(build(), r=2, init_lora_weights=init, **{"target_modules": []} | peer)
    base = build()
    with pytest.raises(UnsupportedModuleError, match=f"site '{target}'.*cannot carry an adapter"):
        tether.attach(base, tether.LoraConfig(init, rank=2, target_modules=[target]))
    assert torch.equal(output(base), output(build()))


@METHODS
def test_a_module_that_is_never_called_is_refused(init: str) -> None:
    """MultiheadAttention reads out_proj's weight: peft halves the model and never trains it."""
    settings = {"r": 2, "target_modules": ["out_proj"], "init_lora_weights": init}
    start = output(peft_model(Attention(), **settings))
    assert relative(start, output(Attention())) > 0.3
    assert torch.equal(output(peft_trained(Attention(), size=1.0, **settings)), start)

    with pytest.raises(UnsupportedModuleError, match="never calls this module"):
        tether.init(Attention(), tether.LoraConfig(init, rank=2, target_modules=["out_proj"]))


@METHODS
def test_rank_above_the_smaller_side(init: str, tmp_path: Path) -> None:
    """peft writes a config whose rank, and so whose scaling, is not that of the factors."""
    settings = {"r": 20, "target_modules": ["k_proj"], "init_lora_weights": init}
    model = peft_model(llama(), **settings)
    (first, _) = peft_layers(model).values()
    assert first.lora_A["default"].weight.shape == (16, 32)
    peft_save(model, tmp_path / "a")
    assert peft_load(llama(), tmp_path / "a").peft_config["default"].r == 20

    with pytest.raises(RankTooLargeError, match=r"rank 20 exceeds min\(shape\) 16.*k_proj': 16"):
        tether.init(llama(), tether.LoraConfig(init, rank=20, target_modules=["k_proj"]))
    pattern = {"*.k_proj": 16}
    config = tether.LoraConfig(init, rank=20, target_modules=["k_proj"], rank_pattern=pattern)
    assert {layer.rank for layer in tether.init(llama(), config).layers.values()} == {16}


@pytest.mark.parametrize(("init", "share"), [("pissa", 1), ("olora", 0), ("lora", 0)])
def test_alpha_zero(init: str, share: float) -> None:
    """peft: NaN at once with PiSSA, with the others an adapter that can never act."""
    name = True if init == "lora" else init
    settings = {"r": 2, "lora_alpha": 0, "target_modules": ["q_proj"], "init_lora_weights": name}
    found = output(peft_trained(llama(), **settings))
    assert float(found.isnan().float().mean()) == share
    assert share == 1 or torch.equal(found, output(llama()))
    for alpha in (0, -1, math.nan):
        with pytest.raises(ConfigError, match=f"alpha must be a positive number, not {alpha}"):
            tether.LoraConfig(init, rank=2, alpha=alpha)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    """peft's OLoRA takes them and spreads one bad value over a whole factor."""

    def broken() -> nn.Module:
        base = llama()
        base.get_submodule(Q).weight.data[3, 5] = value
        return base

    model = peft_model(broken(), r=2, target_modules=["q_proj"], init_lora_weights="olora")
    factor = peft_layers(model)[Q].lora_A["default"].weight
    assert not factor.isfinite().all(dim=0)[5]
    for init in ("olora", "pissa", "lora"):
        with pytest.raises(NonFiniteError, match=rf"site '{Q}'.*1 of 1024 values.*at \(3, 5\)"):
            tether.init(broken(), tether.LoraConfig(init, rank=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("case", ["linear", "embedding of gpt-2", "convolutions"])
def test_what_peft_cannot_start_it_can_serve(case: str, tmp_path: Path) -> None:
    """An OLoRA on every layer that peft's own OLoRA gets wrong, read by peft as plain LoRA."""
    case = CASES[case]
    handle = attached(case.build(), init="olora", rank=2, target_modules=case.targets)
    tether.save_as_lora(handle, tmp_path / "a")
    theirs = output(peft_load(case.build(), tmp_path / "a"), case.inputs)
    assert relative(theirs, output(handle.model, case.inputs)) < 1e-5
