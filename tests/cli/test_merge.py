"""`tether merge`: a model that needs no adapter any more."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

import tether
from tether.algebra import delta
from tether.checkpoint import Checkpoint
from tether.merged import arithmetic

from .conftest import contents, invoke, succeed, succeed_json


@pytest.fixture
def adapter(finished):
    return finished[0] / "adapter.safetensors"


def loss(folder, text_file, *adapters):
    said = succeed_json("eval", folder, *adapters, "--data", text_file, "--block", "16")
    return [said["base"], *said["adapters"].values()][len(adapters)]["loss"]


@pytest.mark.parametrize("form", ["adapter.safetensors", "lora"])
def test_the_merged_model_has_the_loss_of_base_and_adapter(
    finished, model_folder, text_file, tmp_path, form
):
    source, out = finished[0] / form, tmp_path / "out"
    before = contents(model_folder), contents(finished[0])
    said = succeed_json("merge", model_folder, source, out)
    assert (contents(model_folder), contents(finished[0])) == before
    alone = loss(model_folder, text_file)
    wanted = loss(model_folder, text_file, source)
    assert abs(alone - wanted) > 0.1
    assert loss(out, text_file) == pytest.approx(wanted, abs=1e-5)
    assert contents(out).keys() == contents(model_folder).keys()
    assert said["written"] == said["path"] == str(out)
    assert not said["untied"]
    assert said["left_out"] == []
    assert said["size"] == sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    layers = tether.load(source).layers
    assert said["changes"].keys() == layers.keys()
    for path, layer in layers.items():
        norm = float(delta(layer).norm())
        assert said["changes"][path]["norm"] == pytest.approx(norm, rel=1e-5)
        assert said["changes"][path]["error"] < 1e-6


def test_another_dtype(adapter, model_folder, tmp_path):
    said = succeed_json("merge", model_folder, adapter, tmp_path / "out", "--dtype", "bfloat16")
    assert 1e-4 < said["error"] < 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_words_at_the_end(finished, adapter, model_folder, tmp_path):
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"")
    out = tmp_path / "out[b]"  # no markup
    said = succeed("merge", base, adapter, out)
    for path in tether.load(adapter).layers:
        assert any(path in row for row in said.splitlines())
    assert "of all changes' norm" in said
    assert "tie_word_embeddings" not in said
    assert "left out of the base's folder: pytorch_model.bin" in said
    assert f"wrote{out}" in "".join(said.split())


def test_a_head_that_was_tied_is_told_of(tiny_llama, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    tether.save(
        tether.init(model, tether.LoraConfig(rank=2, target_modules=["embed_tokens"])),
        tmp_path / "a.safetensors",
    )
    said = succeed("merge", tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    assert "output head and embedding are two tensors now (tie_word_embeddings: false)" in said
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in Checkpoint.open(tmp_path / "out")


def test_another_base_is_refused_unless_insisted(adapter, model_folder, tmp_path):
    base = shutil.copytree(model_folder, tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data += 1e-3
    model.save_pretrained(base)
    result = invoke("merge", base, adapter, tmp_path / "out")
    assert result.exit_code == 2
    assert "insist with verify=False (--no-verify)" in result.stderr
    assert not (tmp_path / "out").exists()
    succeed("merge", base, adapter, tmp_path / "out", "--no-verify")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{base}", "{run}/adapter.safetensors", "{base}/out"], "lies in the folder of the base"),
        (["{base}", "{run}/adapter.safetensors", "{base}"], "lies in the folder of the base"),
        (["{base}", "{run}/lora", "{run}/lora/out"], "lies in the folder of the adapter"),
        (["{base}", "{run}/lora", "{run}"], "holds 'adapter.safetensors'"),
        (["{base}", "{run}/lora", "{out}/mine.txt"], "mine.txt: is a file"),
        (["{base}", "{run}/lora", "{out}"], "holds 'mine.txt'; give a new folder"),
        (["{base}", "{run}/lora", "{out}/a", "--dtype", "float23"], "Nearest: 'float32'"),
        (["{out}/none/at/all", "{run}/lora", "{out}/a"], "no such folder"),
        (["{out}", "{run}/lora", "{out}/a"], "holds neither model.safetensors nor"),
        (["{base}", "{out}/none", "{out}/a"], "no such file or folder"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_written(
    arguments, words, finished, model_folder, tmp_path
):
    (tmp_path / "mine.txt").write_text("keep me")
    places = {"base": model_folder, "run": finished[0], "out": tmp_path}
    before = [contents(place) for place in places.values()]
    result = invoke("merge", *(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert [contents(place) for place in places.values()] == before


def test_an_interrupt_leaves_nothing(monkeypatch, adapter, model_folder, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(arithmetic, "add", interrupted)
    result = invoke("merge", model_folder, adapter, tmp_path / "out")
    assert result.exit_code == 130
    assert list(tmp_path.iterdir()) == []
