"""Small peft models, trained for a few steps, and what is true of them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import tether

IDS = torch.arange(24).view(2, 12)
Q = "model.layers.0.self_attn.q_proj"
TARGETS = ["q_proj", "k_proj", "up_proj"]
Make = Callable[..., nn.Module]


def wrap(base: nn.Module, init: str | bool = "pissa", name: str = "default", **settings: object):
    settings = {"r": 3, "lora_alpha": 4, "target_modules": TARGETS} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=init, **settings), name)


def add(model: peft.PeftModel, name: str, init: str | bool = "pissa", **settings: object) -> None:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(name, peft.LoraConfig(init_lora_weights=init, **settings))


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr)
    for _ in range(steps):
        step(model, optimizer)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def layers(model: nn.Module) -> dict[str, nn.Module]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


def truth(model: nn.Module, base: nn.Module, path: str, name: str = "default") -> Tensor:
    """W_res + s·B·A − W in float64."""
    layer = layers(model)[path]
    a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
    now = layer.get_base_layer().weight.double() + layer.scaling[name] * (b @ a)
    return (now - base.get_submodule(path).weight.double()).detach()


def delta(layer: tether.LayerAdapter) -> Tensor:
    """s·(B·A − B0·A0) in float64."""
    a, b = layer.trainable.A.double(), layer.trainable.B.double()
    if layer.anchor is None:
        return layer.scaling * (b @ a)
    a0, b0 = layer.anchor.A.double(), layer.anchor.B.double()
    return layer.scaling * ((b0 + b) @ (a0 + a) - b0 @ a0)


def distance(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.detach().double()
    return float((found.detach().double() - wanted).norm() / wanted.norm())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def save(model: peft.PeftModel, folder: Path, **settings: object) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **settings)
    return folder


def state_of(model: peft.PeftModel) -> dict[str, object]:
    """What adopting changes, in a form that compares equal if it did not."""
    return {
        "values": {k: v.float().numpy().tobytes() for k, v in model.state_dict().items()},
        "requires_grad": {k: (id(p), p.requires_grad) for k, p in model.named_parameters()},
        "modules": {k: (id(m), m.training, len(m._forward_hooks)) for k, m in named(model)},
        "attributes": sorted(vars(model.get_base_model())),
        "active": list(model.active_adapters),
    }


def named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)})
        self.odd = nn.Conv1d(8, 8, 3, dilation=2, padding=2)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Linear(8, 8))
        self.raw = nn.Module()
        self.raw.table = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner["second"](self.inner["first"](x).tanh())
        return self.head(self.norm(self.odd(x.mT).mT.flatten(0, 1)))
