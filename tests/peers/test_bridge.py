"""Live peft models: what is taken from them, saved, and adopted, beside the original base."""

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

import tether
from tether.errors import UnsupportedAdapterError
from tether.integrations.peft import adopt, save_as_lora, snapshot, track

from .conftest import (
    CASES,
    LINEAR,
    Case,
    change,
    disturb,
    gpt2,
    llama,
    output,
    peft_factors,
    peft_layers,
    peft_load,
    relative,
    tied_llama,
    weights,
)
from .started import (
    EVERY_INIT,
    LINEAR_CASE,
    PATTERNS,
    SPLITTING,
    live_change,
    trained,
    untrained,
)


@pytest.mark.parametrize("settings", [{}, PATTERNS], ids=["alpha", "rslora with patterns"])
@EVERY_INIT
def test_the_change_is_that_of_the_original_weight(init: str | bool, settings: dict) -> None:
    model = trained(LINEAR_CASE, init, **settings)
    base, adapter = llama(), snapshot(model)
    assert set(adapter.layers) == set(peft_layers(model))
    assert adapter.anchored is (init in SPLITTING)
    for path, layer in adapter.layers.items():
        truth = live_change(model, base, path)
        assert relative(change(layer), truth) < 3e-6
        if layer.anchor is not None:  # the displacement is the moves of training, no more
            moved = layer.trainable.A
            assert float(moved.norm()) == pytest.approx(0.05 * moved.numel() ** 0.5, rel=0.3)
    names = {True: "lora"}
    assert adapter.provenance.method == names.get(init, init)


@pytest.mark.parametrize("settings", [{}, PATTERNS], ids=["alpha", "rslora with patterns"])
@EVERY_INIT
def test_saved_it_gives_the_live_model_s_outputs(
    init: str | bool, settings: dict, tmp_path: Path
) -> None:
    model = trained(LINEAR_CASE, init, **settings)
    live = output(model)
    assert relative(live, output(llama())) > 0.01
    report = save_as_lora(model, tmp_path / "lora")
    assert set(report.sites) == set(peft_layers(model))
    theirs = peft_load(llama(), tmp_path / "lora")
    assert relative(output(theirs), live) < 1e-5
    raw = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert type(raw["lora_alpha"]) is int


@pytest.mark.parametrize("from_folder", [False, True], ids=["computed", "re-read"])
@EVERY_INIT
def test_adopted_it_is_the_same_model_on_the_original_base(
    init: str | bool, from_folder: bool, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = trained(LINEAR_CASE, init)
    before, factors = output(model), snapshot(model)
    handle = adopt(model, base=tmp_path / "base" if from_folder else None)
    base = handle.model
    assert type(base) is type(llama())
    assert not any(type(m).__module__.startswith("peft") for m in base.modules())
    assert relative(output(base), before) < 2e-6
    original, written = dict(llama().named_parameters()), 0
    for path, report in handle.restored.items():
        weight = base.get_submodule(path).weight
        error = relative(weight.detach(), original[f"{path}.weight"].detach())
        assert error <= report.error < 2e-6
        assert report.exact is from_folder
        assert from_folder is (error == 0) is (report.error == 0)
        written += 1
    assert written == (len(factors.layers) if init in SPLITTING else 0)
    own = {n: p for n, p in base.named_parameters() if ".tether." not in n}
    assert own.keys() == original.keys()
    for name, parameter in own.items():
        if from_folder or name.removesuffix(".weight") not in handle.restored:
            assert torch.equal(parameter, original[name])
    for path, layer in handle.snapshot().layers.items():
        assert torch.equal(layer.trainable.A, factors.layers[path].trainable.A)
    with handle.disabled():
        assert relative(output(base), output(llama())) < 2e-6


KINDS = {
    "bias of the sites": (CASES["bert"], {"bias": "lora_only"}),
    "all biases": (CASES["bert"], {"bias": "all"}),
    "biases of conv1d": (CASES["conv1d of gpt-2"], {"bias": "lora_only"}),
    "biases of convolutions": (CASES["convolutions"], {"bias": "all"}),
    "head trained whole": (LINEAR_CASE, {"modules_to_save": ["lm_head"]}),
    "norm trained whole": (LINEAR_CASE, {"modules_to_save": ["model.norm"], "bias": "all"}),
    "tied head trained whole": (Case(tied_llama, LINEAR), {"modules_to_save": ["lm_head"]}),
    "dora": (LINEAR_CASE, {"use_dora": True}),
    "dora of conv1d": (CASES["conv1d of gpt-2"], {"use_dora": True}),
    "dora of convolutions": (CASES["convolutions"], {"use_dora": True}),
    "dora of embeddings": (CASES["scaled embedding"], {"use_dora": True}),
    "all of it": (
        LINEAR_CASE,
        PATTERNS | {"use_dora": True, "modules_to_save": ["lm_head"], "lora_dropout": 0.1},
    ),
    "embedding": (CASES["embedding"], {}),
    "tied embedding": (CASES["tied embedding"], {}),
    "embedding of gpt-2": (CASES["embedding of gpt-2"], {}),
    "scaled embedding": (CASES["scaled embedding"], {}),
    "convolutions": (CASES["convolutions"], {}),
    "conv1d": (CASES["conv1d of gpt-2"], {}),
}


# peft has no PiSSA for convolutions, and a wrong one for tied weights.
STARTED_KINDS = [(True, kind) for kind in KINDS] + [
    ("pissa", kind) for kind in KINDS if "convolutions" not in kind and kind != "tied embedding"
]


@pytest.mark.parametrize(("init", "kind"), STARTED_KINDS, ids=str)
def test_everything_that_is_trained(init: str | bool, kind: str, tmp_path: Path) -> None:
    """Saved, and read by peft; adopted; each beside the live model."""
    case, settings = KINDS[kind]
    model = trained(case, init, **settings)
    live = output(model, case.inputs)
    assert relative(live, output(case.build(), case.inputs)) > 0.005
    save_as_lora(model, tmp_path / "lora")
    assert torch.equal(output(model, case.inputs), live)
    theirs = peft_load(case.build(), tmp_path / "lora")
    assert relative(output(theirs, case.inputs), live) < 1e-5
    handle = adopt(model)
    assert relative(output(handle.model, case.inputs), live) < 2e-6
    tether.save_as_lora(handle, tmp_path / "again")
    first, second = weights(tmp_path / "lora"), weights(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(relative(second[k], t) < 1e-6 for k, t in first.items() if t.any())
    handle.detach()
    assert relative(output(handle.model, case.inputs), output(case.build(), case.inputs)) < 1e-6


TWO = pytest.mark.parametrize("second", ["pissa", "olora", True], ids=str)


def two_adapters(second: str | bool) -> tuple[peft.PeftModel, dict[str, dict[str, Tensor]]]:
    """A PiSSA and another adapter on one base, both moved; s·B0·A0 of each."""
    model = untrained(LINEAR_CASE, "pissa")
    track(model)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], init_lora_weights=second
    )
    model.add_adapter("other", config)
    track(model)
    starts = {
        name: {
            path: layer.get_delta_weight(name).detach().double()
            for path, layer in peft_layers(model).items()
            if name in layer.scaling
        }
        for name in ("default", "other")
    }
    disturb(peft_factors(model))
    return model.eval(), starts


@TWO
def test_each_of_two_adapters_has_its_own_change(second: str | bool, tmp_path: Path) -> None:
    """peft took two parts out of one weight: its single adapters are wrong, their sum is not."""
    model, starts = two_adapters(second)
    adapters = {name: snapshot(model, name) for name in ("default", "other")}
    for path in adapters["other"].layers:
        both = live_change(model, llama(), path, "default", "other")
        one, other = (change(adapters[name].layers[path]) for name in ("default", "other"))
        assert relative(one + other, both) < 3e-6
        # Alone in peft, an adapter lacks the other's part of the original weight.
        alone = live_change(model, llama(), path, "default")
        assert relative(alone + starts["other"][path], one) < 3e-6
        if second is not True:
            assert relative(alone, one) > 0.5
    for name, adapter in adapters.items():
        save_as_lora(model, tmp_path / name, adapter_name=name)
        ours = tether.attach(llama(), adapter).model
        theirs = peft_load(llama(), tmp_path / name)
        assert relative(output(theirs), output(ours)) < 1e-5


@TWO
def test_all_adapters_are_adopted(second: str | bool, tmp_path: Path) -> None:
    model, _ = two_adapters(second)
    llama().save_pretrained(tmp_path / "base")
    adapters = {name: snapshot(model, name) for name in ("default", "other")}
    model.base_model.set_adapter(["default", "other"])
    both = output(model)
    handle = adopt(model, "other", base=tmp_path / "base")
    assert handle.name == "other"
    base = handle.model
    assert relative(output(base), both) < 2e-6
    assert list(tether.handles(base)) == ["default", "other"]
    for name in ("default", "other"):
        with tether.only(base, name):
            wanted = output(tether.attach(llama(), adapters[name]).model)
            assert torch.equal(output(base), wanted)
    with tether.reference(base):
        assert torch.equal(output(base), output(llama()))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_was_wrong_before_training_is_refused(init: str) -> None:
    """A part taken out of tied weights, or the wrong way round: peft's start is not the base."""
    tied = Case(tied_llama, ["lm_head"])
    model = untrained(tied, init)
    assert relative(output(model), output(tied_llama())) > 0.3
    with pytest.raises(UnsupportedAdapterError, match=r"'lm_head'.*tied.*'model.embed_tokens'"):
        track(model)
    square = Case(gpt2, ["attn.c_proj"])
    model = untrained(square, init)
    if init == "pissa":
        assert relative(output(model), output(gpt2())) < 1e-5
        track(model)
    else:
        assert relative(output(model), output(gpt2())) > 0.5
        with pytest.raises(UnsupportedAdapterError, match=r"attn.c_proj'.*wrong way round"):
            track(model)
