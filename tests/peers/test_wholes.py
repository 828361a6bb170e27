"""DoRA, trained biases and modules_to_save beside peft: the same losses, files read both ways."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tether
from tether.errors import TetherError

from .conftest import (
    CASES,
    LINEAR,
    Case,
    disturb,
    gpt2,
    llama,
    output,
    peft_load,
    peft_model,
    peft_save,
    relative,
    weights,
)
from .test_trajectories import graded_llama, losses

STEPS = 20
SAVED = {
    "linear": ["lm_head"],
    "bert": ["pooler"],
    "conv1d of gpt-2": ["ln_f"],
    "embedding": ["model.norm"],
    "tied embedding": ["model.norm"],
    "embedding of gpt-2": ["ln_f", "lm_head"],
    "scaled embedding": ["model.norm"],
    "convolutions": ["head"],
}
PARTS = {
    "dora": {"use_dora": True},
    "biases of sites": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "modules": {"modules_to_save": None},
    "everything": {"use_dora": True, "bias": "all", "modules_to_save": None},
}
PATTERNS = {
    "conv1d of gpt-2": {"rank_pattern": {"c_fc": 6}, "alpha_pattern": {"c_attn": 20, "c_fc": 3}},
    "bert": {"rank_pattern": {"query": 2}, "alpha_pattern": {"intermediate.dense": 20}},
    "convolutions": {"rank_pattern": {"plane": 3}, "alpha_pattern": {"line": 20}},
}


def combinations() -> Iterator[object]:
    """Settings and a case; those that leave nothing to train are not there."""
    for case in CASES:
        no_bias = case in ("linear", "embedding", "tied embedding", "scaled embedding")
        for part, settings in PARTS.items():
            found = dict(settings)
            if "modules_to_save" in found:
                found["modules_to_save"] = SAVED[case]
            if no_bias and "bias" in found:
                del found["bias"]
                if part != "everything":
                    continue
            yield pytest.param(case, found, id=f"{case}-{part}")


def settings_of(name: str, parts: dict) -> dict:
    saved = parts.get("modules_to_save", [])
    return {
        "target_modules": [t for t in CASES[name].targets if t not in saved],
        "use_rslora": True,
        **PATTERNS.get(name, {}),
        **parts,
    }


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "parts"), list(combinations()))
def test_what_peft_saved_is_read_to_the_same_outputs(name, parts, tmp_path: Path) -> None:
    case = CASES[name]
    model = peft_model(case.build(), r=4, lora_alpha=6, **settings_of(name, parts))
    disturb(trained(model))
    peft_save(model, tmp_path / "a")
    live, unchanged = output(model, case.inputs), output(case.build(), case.inputs)
    assert relative(live, unchanged) > 0.01

    base = case.build()
    adapter = tether.load(tmp_path / "a")
    handle = tether.attach(base, adapter)
    assert relative(output(base, case.inputs), live) < 2e-6
    assert all(layer.magnitude is not None for layer in adapter.layers.values()) == bool(
        parts.get("use_dora")
    )
    assert bool(adapter.biases) == ("bias" in parts)
    with handle.disabled():
        assert torch.equal(output(base, case.inputs), unchanged)


@pytest.mark.parametrize(("name", "parts"), list(combinations()))
def test_what_is_exported_peft_loads_to_the_same_outputs(name, parts, tmp_path: Path) -> None:
    case = CASES[name]
    base = case.build()
    handle = tether.attach(base, tether.LoraConfig(rank=4, alpha=6, **settings_of(name, parts)))
    disturb(handle.parameters())
    live, unchanged = output(base, case.inputs), output(case.build(), case.inputs)
    assert relative(live, unchanged) > 0.01
    tether.save_as_lora(handle, tmp_path / "a")
    peer = peft_load(case.build(), tmp_path / "a")
    assert relative(output(peer, case.inputs), live) < 2e-6
    # And back: peft's own copy of what it read.
    peft_save(peer, tmp_path / "b")
    again = case.build()
    tether.attach(again, tether.load(tmp_path / "b"))
    assert relative(output(again, case.inputs), live) < 2e-6


GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"]}
RUNS = {
    "dora": (graded_llama, {"use_dora": True, "target_modules": LINEAR}),
    "all of gpt-2": (
        gpt2,
        {"use_dora": True, "bias": "all", "modules_to_save": ["ln_f"], **GPT2},
    ),
    "patterns": (
        graded_llama,
        {
            "use_dora": True,
            "rank_pattern": {"up_proj": 6},
            "alpha_pattern": {"down_proj": 3},
            "target_modules": LINEAR,
        },
    ),
    "a head": (llama, {"use_dora": True, "modules_to_save": ["lm_head"], "target_modules": LINEAR}),
}


@pytest.mark.parametrize("init", ["lora", "pissa"])
@pytest.mark.parametrize(("build", "settings"), RUNS.values(), ids=RUNS)
def test_losses_are_peft_s(build, settings: dict, init: str, tmp_path: Path) -> None:
    theirs = peft_model(
        build(), r=4, lora_alpha=6, init_lora_weights=True if init == "lora" else init, **settings
    )
    base = build()
    if init == "lora":  # from peft's own random factors
        start = tether.load(peft_save(theirs, tmp_path / "start"))
    else:
        start = tether.LoraConfig(init=init, rank=4, alpha=6, **settings)
    handle = tether.attach(base, start)
    # At peft's start magnitudes and biases are those of the base, in a file as values.
    assert relative(output(base), output(build())) < 1e-6
    wanted = losses(theirs, list(trained(theirs)), STEPS)
    found = losses(base, handle.parameters(), STEPS)
    assert wanted[-5:].mean() < wanted[0] - 0.1  # it has learnt
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)

    tether.save_as_lora(handle, tmp_path / "a")
    assert relative(output(peft_load(build(), tmp_path / "a")), output(base)) < 2e-6
    assert relative(output(base), output(theirs)) < 2e-5
    if init == "lora":
        again = build()
        tether.attach(again, tether.load(peft_save(theirs, tmp_path / "b")))
        assert relative(output(again), output(theirs)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_files_keep_the_magnitudes(dtype, tmp_path: Path) -> None:
    base = gpt2()
    parts = {"use_dora": True, "bias": "all", "modules_to_save": ["ln_f"]}
    handle = tether.attach(base, tether.LoraConfig(rank=4, **parts, **GPT2))
    disturb(handle.parameters(), 0.02)
    tether.save_as_lora(handle, tmp_path / "a", dtype=dtype)
    for key, tensor in weights(tmp_path / "a").items():
        wide = key.endswith("lora_magnitude_vector")
        assert tensor.dtype == (torch.float32 if wide else dtype), key
    limit = {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert relative(output(peft_load(gpt2(), tmp_path / "a")), output(base)) < limit


def test_a_smaller_rank_keeps_biases_modules_and_magnitudes(tmp_path: Path) -> None:
    base = gpt2()
    parts = {"use_dora": True, "bias": "all", "modules_to_save": ["ln_f"]}
    handle = tether.attach(base, tether.LoraConfig(rank=4, **parts, **GPT2))
    disturb(handle.parameters(), 0.02)
    tether.save_as_lora(handle, tmp_path / "a", rank=3)
    small = peft_load(gpt2(), tmp_path / "a")
    again = gpt2()
    tether.attach(again, tether.load(tmp_path / "a"))
    assert relative(output(again), output(small)) < 2e-6
    before, after = handle.snapshot(), tether.load(tmp_path / "a")
    for path, bias in before.biases.items():
        assert torch.equal(bias.current, after.biases[path].trainable)
    for path, layer in before.layers.items():
        assert torch.equal(layer.magnitude.current, after.layers[path].magnitude.trainable)
        assert after.layers[path].rank == 3


def test_a_name_that_ends_inside_another_selects_what_peft_selects(tmp_path: Path) -> None:
    """peft's modules_to_save takes any module whose path ends in the text."""
    model = peft_model(llama(), r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    disturb(trained(model))
    base = llama()
    adapter = tether.load(peft_save(model, tmp_path / "a"))
    tether.attach(base, adapter)
    assert set(adapter.modules) == {
        *(f"model.layers.{i}.{name}_layernorm" for i in (0, 1) for name in ENDS),
        "model.norm",
    }
    assert relative(output(base), output(model)) < 2e-6


ENDS = ("input", "post_attention")


class Norms(nn.Module):
    """The end of one module's path is the whole path of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.prenorm, self.norm = nn.Linear(6, 6), nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.prenorm(self.up(x)))


def test_a_module_that_peft_cannot_name_alone_is_refused_or_written_so_that_it_can(
    tmp_path: Path,
) -> None:
    base, x = Norms(), torch.randn(3, 6)
    config = tether.LoraConfig(rank=2, target_modules="up", modules_to_save=["norm"])
    handle = tether.attach(base, config)
    disturb(handle.parameters())
    refusal = ""
    try:
        tether.save_as_lora(handle, tmp_path / "a")
    except TetherError as error:
        refusal = str(error)
    assert (tmp_path / "a").exists() == (not refusal)
    if refusal:
        assert "'norm'" in refusal
        return
    assert relative(output(peft_load(Norms(), tmp_path / "a"), x), output(base, x)) < 2e-6


def test_an_exported_folder_says_what_was_trained(tmp_path: Path) -> None:
    case = Case(gpt2, ["c_attn"])
    for parts, expected in (
        ({}, (False, "none", None)),
        ({"use_dora": True}, (True, "none", None)),
        ({"bias": "lora_only"}, (False, "lora_only", None)),
        ({"bias": "all", "modules_to_save": ["ln_f"]}, (False, "all", ["transformer.ln_f"])),
    ):
        settings = tether.LoraConfig(rank=2, target_modules="c_attn", **parts)
        handle = tether.attach(case.build(), settings)
        tether.save_as_lora(handle, tmp_path / "a")
        config = peft_load(case.build(), tmp_path / "a").peft_config["default"]
        saved = list(config.modules_to_save) if config.modules_to_save else None
        assert (config.use_dora, config.bias, saved) == expected
