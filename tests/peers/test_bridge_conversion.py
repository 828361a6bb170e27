"""Saving a live peft model as plain LoRA, beside peft's own conversion.

FIELD.md, "Conversion": each of its sentences is a test here. peft's conversion is
`save_pretrained(…, path_initial_model_for_weight_conversion=folder_of_the_untrained_adapter)`.
"""

import copy
import hashlib
import json
import random
import warnings
from pathlib import Path

import numpy
import peft
import pytest
import torch
from torch import Tensor

import tether
from tether.errors import ConfigError, NotAnAdapterError
from tether.integrations.peft import save_as_lora, snapshot, track

from .conftest import (
    CASES,
    IDS,
    LINEAR,
    Case,
    change,
    disturb,
    llama,
    notices_silenced,
    output,
    peft_factors,
    peft_layers,
    peft_load,
    peft_save,
    relative,
    weights,
)
from .started import EVERY_INIT, LINEAR_CASE, live_change, trained, untrained

EVERYTHING = {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "lora_only"}


def with_init_folder(
    folder: Path, case: Case = LINEAR_CASE, init: str = "pissa", **settings: object
) -> peft.PeftModel:
    """As peft's conversion needs it: saved before training, then moved. Not tracked."""
    model = untrained(case, init, **settings)
    peft_save(model, folder)
    disturb(p for p in model.parameters() if p.requires_grad)
    return model


def their_conversion(model: peft.PeftModel, folder: Path, init: Path | str) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PiSSA changes the base weights")
        return peft_save(model, folder, path_initial_model_for_weight_conversion=str(init))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def state_of(model: peft.PeftModel) -> dict[str, object]:
    """Everything that saving could change, in a form that compares equal if it did not."""
    parameters = dict(model.named_parameters())
    return {
        "values": {k: v.numpy().tobytes() for k, v in model.state_dict().items()},
        "objects": {k: id(p) for k, p in parameters.items()},
        "versions": {k: p._version for k, p in parameters.items()},
        "gradients": {
            k: None if p.grad is None else p.grad.tolist() for k, p in parameters.items()
        },
        "requires_grad": {k: p.requires_grad for k, p in parameters.items()},
        "modules": {k: (id(m), type(m), m.training) for k, m in model.named_modules()},
        "hooks": {k: len(m._forward_hooks) for k, m in model.named_modules()},
        "attributes": set(vars(model)) | set(vars(model.get_base_model())),
        "configs": {k: (id(c), copy.deepcopy(c.to_dict())) for k, c in model.peft_config.items()},
        "active": list(model.active_adapters),
        "torch": torch.get_rng_state().tolist(),
        "numpy": numpy.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["factors", "everything"])
@EVERY_INIT
def test_the_live_model_stays_as_it_was(init: str | bool, settings: dict, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    if init == "mica":  # which peft does not combine with DoRA
        settings = {key: value for key, value in settings.items() if key != "use_dora"}
    model = untrained(LINEAR_CASE, init, **settings)
    with notices_silenced():
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    peft_save(model, tmp_path / "init", selected_adapters=["default"])
    track(model)
    disturb(p for p in model.parameters() if p.requires_grad)
    model.train()
    model.base_model.model.model.layers[0].eval()
    model(IDS, labels=IDS).loss.backward()
    read = {name: digests(tmp_path / name) for name in ("base", "init")}
    before = state_of(model)
    snapshot(model, "default")
    save_as_lora(model, tmp_path / "a", adapter_name="default")
    save_as_lora(model, tmp_path / "b", adapter_name="default", anchor=tmp_path / "init")
    save_as_lora(model, tmp_path / "c", adapter_name="default", base=tmp_path / "base")
    for key, value in state_of(model).items():
        assert value == before[key], key
    assert {name: digests(tmp_path / name) for name in read} == read
    # The optimizer's next step still moves the live factors.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()
    assert state_of(model)["values"] != before["values"]


def test_theirs_does_not(tmp_path: Path) -> None:
    """Flips the model to eval, consumes random numbers, rewrites the folder that it reads."""
    model = with_init_folder(tmp_path / "init")
    model.train()
    before, read = state_of(model), digests(tmp_path / "init")
    their_conversion(model, tmp_path / "theirs", tmp_path / "init")
    after = state_of(model)
    assert not any(training for _, _, training in after["modules"].values())
    assert after["torch"] != before["torch"]
    changed = {name for name, digest in digests(tmp_path / "init").items() if digest != read[name]}
    assert changed == {"adapter_config.json"}

    model.train()
    before, read = state_of(model), digests(tmp_path / "init")
    save_as_lora(model, tmp_path / "ours", anchor=tmp_path / "init")
    assert state_of(model) == before
    assert digests(tmp_path / "init") == read


@pytest.mark.parametrize("recipe", [False, True], ids=["as saved", "with init set to True"])
def test_init_folder_named_like_the_adapter(recipe: bool, tmp_path: Path) -> None:
    """Theirs deletes the trained adapter and raises, or writes zeros. The recipe is peft's own."""
    init = tmp_path / "default"
    model = untrained(LINEAR_CASE, "pissa")
    if recipe:
        model.peft_config["default"].init_lora_weights = True
    peft_save(model, init)
    disturb(peft_factors(model))
    live, truth = output(model), copy.deepcopy(model)
    save_as_lora(model, tmp_path / "ours", anchor=init)
    assert relative(output(peft_load(llama(), tmp_path / "ours")), live) < 1e-5
    assert torch.equal(output(model), live)

    if recipe:
        their_conversion(model, tmp_path / "theirs", init)
        factors = weights(tmp_path / "theirs")
        for key in (key for key in factors if ".lora_A." in key):
            a, b = factors[key], factors[key.replace("lora_A", "lora_B")]
            assert (b @ a).norm() < 1e-5 * b.norm() * a.norm()
    else:
        with pytest.raises(ValueError, match="initial adapter should be set to `True`"):
            their_conversion(model, tmp_path / "theirs", init)
    assert not model.peft_config
    assert not any(layer.scaling for layer in peft_layers(model).values())
    assert all(layer.scaling for layer in peft_layers(truth).values())


def test_a_trailing_slash(tmp_path: Path) -> None:
    model = with_init_folder(tmp_path / "init")
    with pytest.raises(ValueError, match="Adapter  does not exist"):
        their_conversion(model, tmp_path / "theirs", f"{tmp_path}/init/")
    save_as_lora(model, tmp_path / "ours", anchor=f"{tmp_path}/init/")
    assert relative(output(peft_load(llama(), tmp_path / "ours")), output(model)) < 1e-5


def test_a_missing_folder(tmp_path: Path) -> None:
    """Theirs makes the folder, writes into it, then asks the hub for it."""
    model = with_init_folder(tmp_path / "init")
    with pytest.raises(ValueError, match="Repo id must be in the form"):
        their_conversion(model, tmp_path / "theirs", tmp_path / "nothing")
    assert (tmp_path / "nothing" / "adapter_config.json").exists()
    missing = tmp_path / "missing"
    with pytest.raises(NotAnAdapterError, match="missing: there is no"):
        save_as_lora(model, tmp_path / "ours", anchor=missing)
    assert not missing.exists()
    assert not (tmp_path / "ours").exists()


def test_the_folder_of_another_adapter_s_name(tmp_path: Path) -> None:
    """An adapter that is not named default is saved in a folder of its name, in the one given."""
    model = untrained(LINEAR_CASE, "pissa", adapter_name="mine")
    peft_save(model, tmp_path / "init")
    disturb(peft_factors(model))
    with pytest.raises(NotAnAdapterError, match=r"peft saves this adapter in .*init/mine"):
        snapshot(model, anchor=tmp_path / "init")
    save_as_lora(model, tmp_path / "ours", anchor=tmp_path / "init" / "mine")
    assert relative(output(peft_load(llama(), tmp_path / "ours")), output(model)) < 1e-5


def test_trained_biases(tmp_path: Path) -> None:
    case = CASES["bert"]
    model = with_init_folder(tmp_path / "init", case, bias="lora_only")
    live = output(model)
    with pytest.raises(ValueError, match="Adapter init does not exist"):
        their_conversion(model, tmp_path / "theirs", tmp_path / "init")
    save_as_lora(model, tmp_path / "ours", anchor=tmp_path / "init")
    assert relative(output(peft_load(case.build(), tmp_path / "ours")), live) < 1e-5
    biases = snapshot(model, anchor=tmp_path / "init").biases
    for path, bias in biases.items():
        assert torch.equal(bias.anchor, case.build().get_submodule(path).bias)
        assert float(bias.trainable.norm()) > 0.1


LOST = {
    "embeddings": (CASES["embedding"], {}, "embed_tokens.lora_embedding_A"),
    "modules trained whole": (LINEAR_CASE, {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    "magnitudes": (LINEAR_CASE, {"use_dora": True}, "q_proj.lora_magnitude_vector"),
}


@pytest.mark.parametrize(("case", "settings", "key"), LOST.values(), ids=LOST)
def test_what_theirs_loses(case: Case, settings: dict, key: str, tmp_path: Path) -> None:
    model = with_init_folder(tmp_path / "init", case, **settings)
    live = output(model)
    their_conversion(model, tmp_path / "theirs", tmp_path / "init")
    kinds = {name.split(".")[-2] for name in weights(tmp_path / "theirs")}
    assert kinds == {"lora_A", "lora_B"}
    save_as_lora(model, tmp_path / "ours", anchor=tmp_path / "init")
    assert any(name.endswith(key) for name in weights(tmp_path / "ours"))
    assert relative(output(peft_load(case.build(), tmp_path / "ours")), live) < 1e-5


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_rslora_with_patterns(pattern: str, tmp_path: Path) -> None:
    settings = {"use_rslora": True, pattern: {"q_proj": 6}}
    model = with_init_folder(tmp_path / "init", **settings)
    with pytest.raises(ValueError, match="not supported when using `rank_pattern` or"):
        their_conversion(model, tmp_path / "theirs", tmp_path / "init")
    save_as_lora(model, tmp_path / "ours", anchor=tmp_path / "init")
    assert relative(output(peft_load(llama(), tmp_path / "ours")), output(model)) < 1e-5


def test_alpha_is_a_whole_number(tmp_path: Path) -> None:
    model = with_init_folder(tmp_path / "init", use_rslora=True)
    their_conversion(model, tmp_path / "theirs", tmp_path / "init")
    save_as_lora(model, tmp_path / "ours", anchor=tmp_path / "init")
    found = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())["lora_alpha"]
        for name in ("theirs", "ours")
    ]
    assert found[0] == pytest.approx(6 * 2**0.5)
    assert found[1] == 8
    assert type(found[1]) is int


def test_several_adapters(tmp_path: Path) -> None:
    """Theirs takes the one initial adapter away from all of them."""
    model = untrained(LINEAR_CASE, "pissa")
    with notices_silenced():
        model.add_adapter("other", peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR))
    peft_save(model, tmp_path / "init", selected_adapters=["default"])
    disturb(peft_factors(model))
    base = llama()
    path = "model.layers.0.self_attn.q_proj"
    truth = 1.5 * plain_product(model, path, "other")
    their_conversion(model, tmp_path / "theirs", tmp_path / "init")
    theirs = peft_layers(peft_load(llama(), tmp_path / "theirs" / "other"))[path]
    assert relative(theirs.get_delta_weight("default").detach(), truth) > 1

    track(model, "default", anchor=tmp_path / "init")
    model.set_adapter("default")
    assert relative(change(snapshot(model, "other").layers[path]), truth) < 1e-6
    found = change(snapshot(model).layers[path])
    assert relative(found, live_change(model, base, path)) < 3e-6


def plain_product(model: peft.PeftModel, path: str, name: str) -> Tensor:
    layer = peft_layers(model)[path]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return b.detach().double() @ a.detach().double()


def test_nothing_need_be_saved_beforehand(tmp_path: Path) -> None:
    """track() keeps the start in memory; nothing is on disk, and no second adapter is loaded."""
    model = trained(LINEAR_CASE, "pissa")
    live, layers = output(model), peft_layers(model)
    assert list(tmp_path.iterdir()) == []
    save_as_lora(model, tmp_path / "ours")
    assert relative(output(peft_load(llama(), tmp_path / "ours")), live) < 1e-5
    assert {name for layer in layers.values() for name in layer.scaling} == {"default"}


def test_a_folder_that_is_read_is_not_written(tmp_path: Path) -> None:
    model = with_init_folder(tmp_path / "init")
    read = digests(tmp_path / "init")
    with pytest.raises(ConfigError, match="is read, and would be replaced"):
        save_as_lora(model, tmp_path / "x" / ".." / "init", anchor=tmp_path / "init")
    assert digests(tmp_path / "init") == read


def test_half_precision_options_go_through(tmp_path: Path) -> None:
    """FIELD.md: what the halves that cancel lose in bfloat16, these do not."""
    model = untrained(LINEAR_CASE, "pissa")
    peft_save(model, tmp_path / "init")
    disturb(peft_factors(model), 1e-3)
    truth = {p: live_change(model, llama(), p) for p in peft_layers(model)}
    report = save_as_lora(model, tmp_path / "ours", anchor=tmp_path / "init", dtype=torch.bfloat16)
    assert report.error < 4e-3
    their_conversion(model, tmp_path / "theirs", tmp_path / "init")
    for name, low, high in (("ours", 0, 4e-3), ("theirs", 0.05, 9)):
        rounded = {k: v.bfloat16() for k, v in weights(tmp_path / name).items()}
        errors = []
        for path, wanted in truth.items():
            stem = f"base_model.model.{path}.lora_"
            a, b = (rounded[f"{stem}{side}.weight"].double() for side in "AB")
            scaling = 1.0 if name == "ours" else 1.5
            errors.append(relative(scaling * (b @ a), wanted))
        assert low < max(errors) < high


@pytest.mark.parametrize("what", ["live model", "value"])
def test_tether_save_as_lora_takes_them(what: str, tmp_path: Path) -> None:
    model = trained(LINEAR_CASE, "pissa")
    source = model if what == "live model" else snapshot(model)
    report = tether.save_as_lora(source, tmp_path / "ours", rank=4)
    assert report.rank == 4
    assert 0 < report.error < 0.8
    truth = {path: live_change(model, llama(), path) for path in report.sites}
    theirs = peft_layers(peft_load(llama(), tmp_path / "ours"))
    for path, site in report.sites.items():
        written = theirs[path].get_delta_weight("default").detach()
        assert relative(written, truth[path]) == pytest.approx(site.error, rel=1e-3)
    with pytest.raises(ConfigError, match="after='detach' needs a live adapter of tether's"):
        tether.save_as_lora(source, tmp_path / "ours", after="detach")
