"""`tether residual`: another base, and the adapter that belongs to it."""

import json

import bitsandbytes.nn
import pytest

import tether

from .conftest import contents, invoke, succeed, succeed_json


@pytest.fixture(autouse=True)
def _no_packing(monkeypatch):
    """Which bitsandbytes does on some processors, and only for sizes that this model lacks."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


def test_it_writes_a_base_to_train_on(model_folder, text_file, tmp_path):
    before, out = contents(model_folder), tmp_path / "out"
    said = succeed_json("residual", model_folder, "--out", out, "--rank", "4")
    assert contents(model_folder) == before
    assert said["quantization"] == ["bitsandbytes nf4"]
    assert said["written"] == [str(out), str(out / "adapter.safetensors")]
    adapter = tether.load(out / "adapter.safetensors")
    assert said["sites"].keys() == adapter.layers.keys()
    assert {layer.rank for layer in adapter.layers.values()} == {4}
    assert all(site["residual"] < site["plain"] for site in said["sites"].values())
    # The tokenizer came along.
    measured = succeed_json(
        *("eval", out, out / "adapter.safetensors"),
        *("--data", text_file, "--block", "16", "--eval-limit", "8"),
    )
    alone = succeed_json(
        *("eval", model_folder, "--data", text_file, "--block", "16", "--eval-limit", "8")
    )
    assert next(iter(measured["adapters"].values()))["loss"] == pytest.approx(
        alone["base"]["loss"], abs=0.1
    )
    assert abs(measured["base"]["loss"] - alone["base"]["loss"]) > 0.2


def test_it_says_what_was_gained(model_folder, tmp_path):
    settings = ("--quantize", "fp4", "--rounds", "2", "--target", "q_proj", "--alpha", "8")
    said = succeed("residual", model_folder, "--out", tmp_path / "out", "--rank", "4", *settings)
    assert "bitsandbytes fp4: " in said
    assert "% of the error of quantising is gone" in said
    assert said.count("q_proj") == 2
    adapter = tether.load(tmp_path / "out" / "adapter.safetensors")
    assert {layer.scaling for layer in adapter.layers.values()} == {2.0}


def test_a_wrong_kind_is_one_line(model_folder, tmp_path):
    result = invoke(
        "residual", model_folder, "--out", tmp_path / "out", "--quantize", "nf3", "--json"
    )
    assert result.exit_code == 2
    said = json.loads(result.stdout)
    assert said["error"] == "ConfigError"
    assert "'nf3' is none of nf4, fp4, int8" in said["message"]
    assert not (tmp_path / "out").exists()
