"""Anchors from the weights before they were quantised, and what is said of the gap."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tether
from tether import formats
from tether.errors import BaseMismatchError, ConfigError, HeaderError, MetaTensorError
from tether.merged import save_merged
from tether.provenance import Provenance
from tether.start import Search, find, site
from tether.start import adapter as starting

from .bases import SETTINGS, bitsandbytes, expanded, load_llama, save_llama, tokens

SITES = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def logits(model) -> torch.Tensor:
    return model(input_ids=tokens()).logits


@pytest.mark.parametrize("kind", SETTINGS)
def test_anchors_of_the_original_on_the_quantised_base(kind, folder):
    quantised, full = load_llama(folder, kind), load_llama(folder, None)
    config = tether.LoraConfig(rank=4)
    adapter = tether.init(quantised, config, weights_from=folder)
    plain = tether.init(full, config)
    for path, layer in plain.layers.items():
        assert torch.equal(adapter.layers[path].anchor.A, layer.anchor.A)
        assert torch.equal(adapter.layers[path].anchor.B, layer.anchor.B)
    held = tether.init(quantised, config).provenance
    assert adapter.provenance.fingerprints == held.fingerprints
    gaps = adapter.provenance.gaps
    assert len(gaps) == SITES
    for path, gap in gaps.items():
        exact = full.get_submodule(path).weight.detach().double()
        apart = expanded(quantised.get_submodule(path)).double() - exact
        norm = torch.linalg.vector_norm
        assert gap == pytest.approx(float(norm(apart) / norm(exact)), rel=1e-4)
    low, high = {"nf4": (0.08, 0.11), "fp4": (0.1, 0.16), "int8": (0.005, 0.02)}[kind]
    assert low < min(gaps.values()) < max(gaps.values()) < high
    base = logits(quantised)
    tether.attach(quantised, adapter)
    assert torch.equal(logits(quantised), base)
    with pytest.raises(BaseMismatchError):
        tether.attach(full, adapter)


def test_magnitudes_are_the_quantised_base_s(folder):
    model = load_llama(folder)
    config = tether.LoraConfig(rank=4, use_dora=True, target_modules=["q_proj"])
    adapter = tether.init(model, config, weights_from=folder)
    held = tether.init(model, config)
    for path, layer in adapter.layers.items():
        assert torch.equal(layer.magnitude.anchor, held.layers[path].magnitude.anchor)


def test_another_model_s_weights_are_refused(folder, tmp_path):
    other = save_llama(tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatchError, match=r"\(bitsandbytes nf4\) lies 1\.\d of \|W\|"):
        tether.init(load_llama(folder), tether.LoraConfig(rank=4), weights_from=other)


def test_a_quantised_folder_is_refused(folder, tmp_path):
    model = load_llama(folder)
    model.save_pretrained(tmp_path / "quantised")
    with pytest.raises(tether.errors.TetherError, match=r"same model|before quantisation"):
        tether.init(model, tether.LoraConfig(rank=4), weights_from=tmp_path / "quantised")


def test_an_unquantised_model_has_no_gap(folder):
    model = load_llama(folder, None)
    adapter = tether.init(model, tether.LoraConfig(rank=4), weights_from=folder)
    assert not adapter.provenance.gaps
    assert adapter.provenance.quantization == ()
    assert "gaps" not in formats.native.provenance_to_dict(adapter.provenance)
    assert adapter.provenance == tether.init(model, tether.LoraConfig(rank=4)).provenance


def test_the_cache_keeps_anchors_of_the_original_as_such(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TETHER_NO_CACHE", "0")
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path))
    monkeypatch.setattr(site, "_CACHED", 1)
    config = tether.LoraConfig(rank=4)
    assert find(load_llama(folder, None), config, Search()).cached == 0
    model = load_llama(folder)
    found = find(model, config, Search(weights_from=folder))
    assert found.cached == SITES  # what the unquantised model left there
    assert len(found.adapter.provenance.gaps) == SITES
    assert find(model, config, Search()).cached == 0
    tether.attach(model, found.adapter)


def test_what_is_written_says_which_base_and_how_far(folder, tmp_path):
    model = load_llama(folder)
    adapter = tether.init(model, tether.LoraConfig(rank=4), weights_from=folder)
    tether.save(adapter, tmp_path / "a.safetensors")
    loaded = tether.load(tmp_path / "a.safetensors")
    assert loaded.provenance == adapter.provenance
    assert loaded.provenance.gaps == adapter.provenance.gaps
    report = tether.save_as_lora(loaded, tmp_path / "lora")
    assert report.quantization == ("bitsandbytes nf4",)
    assert report.gaps == adapter.provenance.gaps
    values = report.to_dict()
    assert json.loads(json.dumps(values))["gaps"] == dict(report.gaps)
    low, high = min(report.gaps.values()), max(report.gaps.values())
    assert "for the base quantised as bitsandbytes nf4" in str(report)
    assert f"lies {low:.2g} to {high:.2g} of |W|" in str(report)
    card = (tmp_path / "lora" / "README.md").read_text("utf-8")
    assert "| base | quantised as bitsandbytes nf4 |" in card
    assert f"original weights: {low:.2g} to {high:.2g} of their norm" in card
    assert "Load that base quantised in the same way" in card

    plain = tether.init(load_llama(folder, None), tether.LoraConfig(rank=4))
    report = tether.save_as_lora(plain, tmp_path / "plain")
    assert not {"quantization", "gaps"} & set(report.to_dict())
    assert "quantised" not in str(report)
    assert "quantised" not in (tmp_path / "plain" / "README.md").read_text("utf-8")


def test_without_the_original_weights_no_gap_is_claimed(folder, tmp_path):
    adapter = tether.init(load_llama(folder), tether.LoraConfig(rank=4))
    report = tether.save_as_lora(adapter, tmp_path / "lora")
    assert report.quantization == ("bitsandbytes nf4",)
    assert report.gaps == {}
    assert "|W|" not in str(report)
    assert "gap" not in (tmp_path / "lora" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("gap", [float("nan"), float("inf"), -0.1, 1, True, "0.1"])
def test_a_gap_that_is_none_is_refused(gap):
    with pytest.raises(ConfigError, match="the gap of 'site' cannot be"):
        Provenance("pissa", gaps={"site": gap})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gaps", {"q": "0.1"}, "field 'gaps' must be float"),
        ("gaps", {"q": -1.0}, "the gap of 'q' cannot be -1.0"),
        ("gaps", [], "field 'gaps' must be dict"),
    ],
)
def test_a_file_with_gaps_that_are_none_is_refused(key, value, message):
    provenance = formats.native.provenance_to_dict(Provenance("pissa", gaps={"q": 0.1}))
    assert provenance["gaps"] == {"q": 0.1}
    with pytest.raises((ConfigError, HeaderError), match=message):
        formats.native_read._decode_provenance({**provenance, key: value})


def test_merging_into_the_original_is_refused_until_insisted(folder, tmp_path):
    model = load_llama(folder)
    adapter = tether.init(model, tether.LoraConfig(rank=4))
    moved = {
        path: replace(layer, trainable=replace(layer.trainable, B=layer.trainable.B + 0.01))
        for path, layer in adapter.layers.items()
    }
    adapter = replace(adapter, layers=moved)
    with pytest.raises(BaseMismatchError, match="made on bitsandbytes nf4"):
        save_merged(folder, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    save_merged(folder, adapter, tmp_path / "merged", verify=False)


@pytest.mark.parametrize("original", [False, True])
def test_ranks_with_differently_quantised_bases_disagree(original, folder):
    def said(kind: str) -> str:
        config, search = tether.LoraConfig(rank=4), Search(folder if original else None)
        model = load_llama(folder, kind)
        task = starting._prepare(model, config, search)
        return starting._described(task, model, config, search)[1]

    assert said("nf4") == said("nf4")
    assert said("nf4") != said("fp4") != said("int8")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_quantised_base_without_values_cannot_be_named(dtype, folder):
    model = load_llama(folder)
    codes = torch.empty(4096, 1, dtype=dtype, device="meta")
    weight = bitsandbytes.nn.Params4bit(codes, requires_grad=False)
    model.model.layers[1].mlp.up_proj.weight = weight
    with pytest.raises(MetaTensorError, match=r"layers.1.mlp.up_proj.*Load the quantised model"):
        tether.init(model, tether.LoraConfig(rank=4), weights_from=folder)
