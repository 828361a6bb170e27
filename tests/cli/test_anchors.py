"""`tether anchors`: the starts of a model on disk, which is never loaded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tether
from start.cases import counting, everything, llama
from start.conftest import anchors
from tether.integrations import hub, smollm2
from tether.training import report

from .conftest import invoke, succeed, succeed_json

__all__ = ["anchors"]

# Ten sites of the two layers are cached, four are too small.
SITES, CACHED = 14, 10


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A saved Llama with weights large enough to be cached; not to be changed."""
    folder = tmp_path_factory.mktemp("anchors") / "llama"
    llama().save_pretrained(folder)
    return folder


def loaded(model: Path) -> torch.nn.Module:
    return hub.load_model(str(model), torch.float32, "cpu")


def test_it_writes_the_adapter_of_the_loaded_model(model, anchors, tmp_path):
    out = tmp_path / "new" / "a.safetensors"
    said = succeed_json("anchors", model, "--out", out, "--rank", "4")
    base, adapter = loaded(model), tether.load(out)
    expected = tether.init(base, tether.LoraConfig(rank=4), cache=False)
    assert everything(adapter) == everything(expected)
    seconds = said.pop("seconds")
    errors = [c.product_error for c in expected.provenance.certificates.values()]
    assert 0 < seconds < 60
    assert said == {
        "method": "pissa",
        "sites": SITES,
        "cached": 0,
        "worst_product_error": max(errors),
        "not_unique": [],
        "fallback": {},
        # Two pairs of factors a site, in float32.
        "bytes": 4 * 2 * 4 * sum(sum(layer.layout.shape) for layer in adapter.layers.values()),
        "written": [str(out)],
    }
    ids = torch.arange(8)[None]
    before = base(ids).logits
    handle = tether.attach(base, adapter)
    assert torch.equal(base(ids).logits, before)
    assert len(handle.sites) == SITES


def test_the_second_time_it_takes_them_out_of_the_cache(model, anchors, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    succeed_json("anchors", model, "--out", one)
    assert len(list(anchors.rglob("*.safetensors"))) == CACHED
    with counting() as calls:
        said = succeed("anchors", model, "--out", two)
    assert len(calls) == SITES - CACHED
    lines = [" ".join(line.strip("│").split()) for line in said.splitlines()]
    assert "method │ pissa" in lines
    assert f"sites │ {SITES}, {CACHED} of them out of the cache" in lines
    assert any(line.startswith("largest error of an anchor │ 6.0e-08 of") for line in lines)
    # Rank 16, two pairs: 2 · 4 bytes · 16 · the sum of all sides.
    assert lines[-1] == f"wrote {two} (0.5 MB)"
    assert everything(tether.load(one)) == everything(tether.load(two))


def test_without_the_cache_nothing_is_kept(model, anchors, tmp_path):
    for name in ("one", "two"):
        said = succeed_json("anchors", model, "--out", tmp_path / name, "--no-cache")
        assert said["cached"] == 0
    assert not anchors.exists()


def test_every_option_reaches_the_adapter(model, tmp_path):
    out = tmp_path / "a.safetensors"
    options = {
        "--init": "milora",
        "--rank": "3",
        "--alpha": "6",
        "--target": "*_proj",
        "--exclude": "o_proj",
        "--layers": "1",
        "--rank-pattern": "q_proj=2",
        "--alpha-pattern": "k_proj=5",
        "--seed": "7",
        "--workers": "2",
    }
    arguments = [each for pair in options.items() for each in pair]
    succeed_json("anchors", model, "--out", out, *arguments, "--rslora", "--dora")
    wanted = tether.LoraConfig(
        init="milora",
        rank=3,
        alpha=6.0,
        use_rslora=True,
        use_dora=True,
        target_modules=["*_proj"],
        exclude_modules=["o_proj"],
        layers_to_transform=[1],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"k_proj": 5.0},
        seed=7,
    )
    adapter = tether.load(out)
    assert adapter.config == wanted.to_dict()
    assert everything(adapter) == everything(tether.init(loaded(model), wanted))


def test_a_method_without_an_anchor_has_no_error_to_show(model, tmp_path):
    said = succeed("anchors", model, "--init", "lora", "--out", tmp_path / "one")
    assert "largest error" not in said
    options = ("--init", "lora", "--out", tmp_path / "two")
    assert succeed_json("anchors", model, *options)["worst_product_error"] is None


def test_what_is_special_about_an_anchor_is_said(tmp_path):
    zeroed = llama()
    torch.nn.init.zeros_(zeroed.model.layers[1].mlp.up_proj.weight)
    zeroed.save_pretrained(tmp_path / "model")
    options = (tmp_path / "model", "--rank", "2")
    path = "model.layers.1.mlp.up_proj"
    said = succeed_json("anchors", *options, "--out", tmp_path / "one")
    assert said["not_unique"] == [path]
    said = succeed("anchors", *options, "--out", tmp_path / "two")
    assert f"{path}: the rank cuts a cluster of equal singular values" in said


def test_without_a_model_it_is_the_default_one(model, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "folder", lambda: model)
    monkeypatch.chdir(tmp_path)
    assert succeed_json("anchors", "--rank", "2")["written"] == ["anchors.safetensors"]
    adapter = tether.load("anchors.safetensors")
    assert adapter.provenance.base_model == str(model)


def test_a_file_is_replaced_only_if_asked(model, tmp_path):
    out = tmp_path / "a.safetensors"
    out.write_text("mine")
    result = invoke("anchors", model, "--rank", "2", "--out", out)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: ConfigError: {out}: is there already. Choose another --out, or --overwrite.\n"
    )
    assert out.read_text() == "mine"
    succeed_json("anchors", model, "--rank", "2", "--out", out, "--overwrite")
    assert len(tether.load(out).layers) == SITES


PATTERN = "is not NAME=NUMBER, such as k_proj=8."
MISTAKES = {
    "--rank 129": "RankTooLargeError: site 'model.layers.0.self_attn.q_proj': rank 129 exceeds",
    "--init pisa": "UnknownMethodError: init 'pisa' is not a method. Nearest: 'pissa'.",
    "--target q_prj": "UnknownNameError: target_modules: 'q_prj' matches no module of the model.",
    "--target lm_head": "UnknownNameError: {model}: has no 'lm_head.weight' of its own",
    "--rank-pattern q_proj": f"ConfigError: --rank-pattern: 'q_proj' {PATTERN}",
    "--rank-pattern 8": f"ConfigError: --rank-pattern: '8' {PATTERN}",
    "--rank-pattern =8": f"ConfigError: --rank-pattern: '=8' {PATTERN}",
    "--rank-pattern q_proj=1.5": f"ConfigError: --rank-pattern: 'q_proj=1.5' {PATTERN}",
    "--alpha-pattern q_proj=x": f"ConfigError: --alpha-pattern: 'q_proj=x' {PATTERN}",
    "--alpha-pattern q_proj=nan": "ConfigError: alpha_pattern['q_proj'] must be a positive number",
    "--rank-pattern q_prj=2": "UnknownNameError: rank_pattern: 'q_prj' matches none of the 14",
    "--workers 0": "ConfigError: workers must be a whole number, at least 1, not 0.",
    "--overwrite --out {folder}": "ConfigError: {folder}: is a folder. Give --out the name of a",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line(options, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with counting() as calls:
        result = invoke("anchors", model, *options.format(folder=tmp_path).split())
    (line,) = result.stderr.splitlines()
    words = MISTAKES[options].format(model=model, folder=tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert line.startswith(f"error: {words}")
    assert not calls
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_models_is_one_line(tmp_path):
    for name, words in ((tmp_path, "has no config.json"), ("/no/such", "no such folder")):
        result = invoke("anchors", name, "--out", tmp_path / "a", "--json")
        assert result.exit_code == 2
        assert words in result.stderr
        assert json.loads(result.stdout)["error"] == "ModelError"
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_one_word_and_keeps_what_was_found(model, anchors, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "a.safetensors"
    command = ("anchors", model, "--out", out, "--workers", "1")
    with monkeypatch.context() as patch:
        patch.setattr(report._Silent, "__call__", interrupt)  # once a site is done
        result = invoke(*command)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert not out.exists()
    kept = len(list(anchors.rglob("*.safetensors")))
    assert kept >= 1
    assert succeed_json(*command)["cached"] == kept


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A Llama of 14 weights 512×512, each of which takes a while."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    llama(hidden_size=512, intermediate_size=512, num_key_value_heads=2).save_pretrained(folder)
    return folder


def test_a_run_that_was_killed_goes_on_where_it_stopped(wide, anchors, tmp_path, monkeypatch):
    out = tmp_path / "a.safetensors"
    command = ("anchors", str(wide), "--out", str(out), "--workers", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "tether", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list(anchors.rglob("r16-*.safetensors"))) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    kept = len(list(anchors.rglob("r16-*.safetensors")))
    assert 3 <= kept < 14
    with counting() as calls:
        assert succeed_json(*command)["cached"] == kept
    assert len(calls) == 14 - kept
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "another"))
    whole = tmp_path / "whole.safetensors"
    assert succeed_json("anchors", wide, "--out", whole)["cached"] == 0
    assert everything(tether.load(out)) == everything(tether.load(whole))


def test_a_cache_that_cannot_be_written_is_one_line_and_no_obstacle(model, tmp_path):
    (tmp_path / "cache").write_text("a file where the cache should be")
    environment = os.environ | {"TETHER_CACHE": str(tmp_path / "cache"), "TETHER_NO_CACHE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tether", "anchors", model, "--rank", "2", "--out", "a.safetensors"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "tether" in line.lower()]
    assert [line[:32] for line in lines] == ["warning: anchors are not kept in"]
    assert "TETHER_NO_CACHE=1" in lines[0]
    assert (tmp_path / "a.safetensors").exists()
