"""Every plain LoRA that peft writes is read, and means the same; the rest is refused by name."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from torch import nn

import tether
from tether.errors import NotAnAdapterError, PickleRefusedError, UnsupportedAdapterError

from .conftest import (
    CASES,
    IDS,
    LINEAR,
    Case,
    llama,
    notices_silenced,
    output,
    peft_factors,
    peft_load,
    peft_model,
    peft_save,
    peft_trained,
    relative,
)

PLAIN = {
    "lora": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "random": {"init_lora_weights": False},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.5},
    "all-linear": {"target_modules": "all-linear"},
    "regex of targets": {"target_modules": r".*\.1\..*(q|k)_proj"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": r".*layers\.0\.mlp.*"},
}
PATTERNS = [
    "q_proj",
    "self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    r"model\.layers\.1\.self_attn\.q_proj",
    r".*\.layers\.0\..*",
    r".*self_attn.*",
    "^model.layers.0.mlp.up_proj",
    r"^model\.layers\.1\..*proj$",
    "layers.1.mlp.gate.proj",
    "q.*_proj",
    # Beginnings and ends of names, not components: they match nothing.
    "proj",
    "self_attn.q",
]
EVA_NOTICES = (
    "ignore:`init_lora_weights` is 'eva' but `eva_config` is not specified:UserWarning",
    "ignore:lora with eva initialization used with low_cpu_mem_usage=False:UserWarning",
)


def check_read(case: Case, folder: Path, tolerance: float = 1e-5) -> tether.Adapter:
    """The folder on a fresh base: ours beside peft's."""
    theirs = output(peft_load(case.build(), folder), case.inputs)
    base = case.build()
    unchanged = output(base, case.inputs)
    adapter = tether.load(folder)
    tether.attach(base, adapter)
    assert relative(theirs, unchanged) > 0.01
    assert relative(output(base, case.inputs), theirs) < tolerance
    return adapter


@pytest.mark.filterwarnings(*EVA_NOTICES)
@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
def test_plain_settings(settings: dict, tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | settings
    model = peft_trained(llama(), **settings)
    adapter = check_read(CASES["linear"], peft_save(model, tmp_path / "a"))
    assert {layer.dropout for layer in adapter.layers.values()} == {
        model.peft_config["default"].lora_dropout
    }


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str, rslora: bool, tmp_path: Path) -> None:
    settings = {"rank_pattern": {pattern: 2}, "alpha_pattern": {pattern: 20}, "use_rslora": rslora}
    model = peft_trained(llama(), r=4, lora_alpha=6, target_modules=LINEAR, **settings)
    check_read(CASES["linear"], peft_save(model, tmp_path / "a"))


def test_overlapping_patterns_mean_what_peft_reads_not_what_it_trained(tmp_path: Path) -> None:
    """peft sorts the keys when it writes them, and the first one that matches wins."""
    patterns = {"q_proj": 3, r".*layers\.0.*": 24}
    model = peft_trained(llama(), lora_alpha=6, target_modules=LINEAR, alpha_pattern=patterns)
    live = output(model)
    peft_save(model, tmp_path / "a")
    assert relative(output(peft_load(llama(), tmp_path / "a")), live) > 0.1
    check_read(CASES["linear"], tmp_path / "a")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "init_lora_weights": "gaussian"}])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_layer(case: Case, settings: dict, tmp_path: Path) -> None:
    model = peft_trained(case.build(), r=4, lora_alpha=6, target_modules=case.targets, **settings)
    check_read(case, peft_save(model, tmp_path / "a"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = peft_trained(llama(), r=4, lora_alpha=6, target_modules=LINEAR)
    for parameter in peft_factors(model):
        parameter.data = parameter.data.to(dtype)
    adapter = check_read(CASES["linear"], peft_save(model, tmp_path / "a"))
    for site, layer in adapter.layers.items():
        written = model.get_submodule(f"base_model.model.{site}").lora_A["default"].weight
        assert layer.trainable.A.dtype == torch.float32
        assert torch.equal(layer.trainable.A, written.float())


def test_another_adapter_name_and_base_name(tmp_path: Path) -> None:
    model = peft_model(llama(), target_modules=LINEAR)
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    model.peft_config["second"].base_model_name_or_path = str(tmp_path / "base")
    for parameter in peft_factors(model):
        nn.init.normal_(parameter, std=0.1)
    model.set_adapter("second")
    live = output(model)
    peft_save(model, tmp_path / "a", selected_adapters=["second"], save_embedding_layers=False)
    base = llama()
    adapter = tether.load(tmp_path / "a" / "second")
    tether.attach(base, adapter)
    assert adapter.provenance.base_model == str(tmp_path / "base")
    assert relative(output(base), live) < 1e-5


def test_what_is_read_is_trained_on_and_written_back(tmp_path: Path) -> None:
    model = peft_trained(llama(), r=4, lora_alpha=6, target_modules=LINEAR, use_rslora=True)
    base = llama()
    handle = tether.attach(base, tether.load(peft_save(model, tmp_path / "a")))
    before = output(base)
    base(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(handle.parameters(), lr=0.1).step()
    assert relative(output(base), before) > 1e-3
    tether.save_as_lora(handle, tmp_path / "b")
    assert relative(output(peft_load(llama(), tmp_path / "b")), output(base)) < 1e-5


REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices=[1, 2]"),
    "invocation": (
        {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
        "alora_invocation_tokens=[1]",
    ),
    "replication": ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication=[[0, 2], [1, 2]]"),
    "qalora": ({"use_qalora": True}, "use_qalora=True"),
    "kasa": ({"kasa_config": KasaConfig()}, "kasa_config"),
    "monteclora": (
        {"monteclora_config": MontecloraConfig()},
        "monteclora_config",
    ),
    "bdlora": (
        {"use_bdlora": BdLoraConfig(["up_proj"], ["q_proj"], nblocks=2)},
        "use_bdlora",
    ),
}


@pytest.mark.parametrize(("settings", "name"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(settings: dict, name: str, tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]} | settings
    peft_save(peft_trained(llama(), **settings), tmp_path / "a")
    with pytest.raises(UnsupportedAdapterError, match=re.escape(name)):
        tether.load(tmp_path / "a")


def test_bias_inside_the_factors_is_refused(tmp_path: Path) -> None:
    model = peft_trained(CASES["bert"].build(), target_modules=["query"], lora_bias=True)
    with pytest.warns(UserWarning, match="invalid shape"):  # of its own biases
        peft_save(model, tmp_path / "a")
    with pytest.raises(UnsupportedAdapterError, match="lora_bias=True"):
        tether.load(tmp_path / "a")


@pytest.mark.parametrize("init", ["loftq", "corda", "pissa_niter_16"])
def test_factors_of_another_base_are_refused(init: str, tmp_path: Path) -> None:
    """LoftQ and CorDA need packages and statistics to start from, so peft only names them here.

    peft's loftq_init also replaces the base's weight, by the quantised one.
    """
    peft_save(peft_trained(llama(), target_modules=LINEAR), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(UnsupportedAdapterError, match=f"init_lora_weights is '{init}'"):
        tether.load(tmp_path / "a")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = peft_trained(llama(), target_modules=LINEAR)
    peft_save(model, tmp_path / "a", safe_serialization=False)
    assert (tmp_path / "a" / "adapter_model.bin").exists()
    with pytest.raises(PickleRefusedError, match=r"adapter_model\.bin"):
        tether.load(tmp_path / "a")


def test_other_tuners_are_refused(tmp_path: Path) -> None:
    base = llama()
    config = peft.LoHaConfig(target_modules=["q_proj"])
    with notices_silenced():
        model = peft.get_peft_model(base, config)
    peft_save(model, tmp_path / "a")
    with pytest.raises(NotAnAdapterError, match="peft_type is 'LOHA'"):
        tether.load(tmp_path / "a")
