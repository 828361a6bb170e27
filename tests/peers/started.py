"""peft models with a LoRA of every start, untrained or moved."""

import dataclasses
import importlib
import sys
import warnings
from types import ModuleType, SimpleNamespace
from unittest import mock

import peft
import pytest
from peft.tuners.lora import preprocess_loraga
from torch import Tensor, nn

from tether.integrations.peft import track

from .conftest import CASES, IDS, Case, disturb, notices_silenced, peft_layers

LINEAR_CASE = CASES["linear"]
SPLITTING = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"]
PLAIN = [True, "gaussian", "orthogonal", "mica"]
PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.up_proj": 2},
    "alpha_pattern": {"down_proj": 3, "v_proj": 20},
}
EVERY_INIT = pytest.mark.parametrize("init", SPLITTING + PLAIN, ids=str)


# What peft says of these starts, besides what it says in every test.
MORE_NOTICES = ("Using Rank-Stabilized LoRA with rank_pattern", "Full backward hook is firing when")


def untrained(
    case: Case, init: str | bool = True, adapter_name: str = "default", **settings: object
) -> peft.PeftModel:
    base = case.build()
    settings = {"r": 4, "lora_alpha": 6, "target_modules": case.targets} | settings
    if init == "corda":
        settings["corda_config"] = peft.tuners.lora.config.CordaConfig(corda_method="ipm")
    if init == "lora_ga":
        settings["lora_ga_config"] = peft.LoraGAConfig()
    with notices_silenced():
        for notice in MORE_NOTICES:
            warnings.filterwarnings("ignore", message=notice)
        config = peft.LoraConfig(init_lora_weights=init, **settings)
        if init == "corda":
            corda().preprocess_corda(base, config, lambda: [base(ids[None]) for ids in IDS])
        if init == "lora_ga":

            def step() -> None:
                base(IDS, labels=IDS).loss.backward()

            preprocess_loraga(base, config, step)
        return peft.get_peft_model(base, config, adapter_name).eval()


def corda() -> ModuleType:
    """A module of peft that imports attrs, for which peft does not ask."""
    stand_in = SimpleNamespace(dataclass=dataclasses.dataclass)
    with mock.patch.dict(sys.modules, {"attr": sys.modules.get("attr", stand_in)}):
        return importlib.import_module("peft.tuners.lora.corda")


def trained(case: Case, init: str | bool = True, **settings: object) -> peft.PeftModel:
    """Tracked, then moved in everything that is trained."""
    model = untrained(case, init, **settings)
    track(model)
    disturb(p for p in model.parameters() if p.requires_grad)
    return model


def live_change(model: peft.PeftModel, base: nn.Module, path: str, *names: str) -> Tensor:
    """W_live + Σ s·B·A − W in float64."""
    layer = peft_layers(model)[path]
    weight = layer.get_base_layer().weight.detach().double()
    for name in names or ("default",):
        weight = weight + layer.get_delta_weight(name).detach().double()
    return weight - base.get_submodule(path).weight.detach().double()
