"""`tether eval`: live, native and plain LoRA are the same model, also in another process."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from .conftest import DATA, contents, invoke, start, succeed, succeed_json


@pytest.fixture
def command(model_folder, text_file) -> tuple[object, ...]:
    return ("eval", model_folder, "--data", text_file, *DATA)


def test_every_form_has_the_loss_of_the_live_adapter(finished, command):
    out, said = finished
    process = start(*command, "--adapter", out / "adapter.safetensors", "--json")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    native = json.loads(stdout)
    plain = succeed_json(*command, "--adapter", out / "lora")
    live = said["held_out_loss"]
    assert native["adapter"]["loss"] == pytest.approx(live["adapter"], rel=1e-6)
    assert plain["adapter"]["loss"] == pytest.approx(live["adapter"], rel=1e-5)
    assert native["base"]["loss"] == pytest.approx(live["base"], rel=1e-6)
    assert native["base"] == plain["base"] == succeed_json(*command)["base"]
    assert native["adapter"]["tokens"] == 8 * 15


def test_the_table_says_the_same(finished, command):
    adapter = ("--adapter", finished[0] / "adapter.safetensors")
    wanted = succeed_json(*command, *adapter)
    rows = succeed(*command, *adapter).splitlines()
    for name, values in wanted.items():
        numbers = [f"{values['loss']:.6f}", f"{values['perplexity']:.3f}", str(values["tokens"])]
        assert any(all(word in row for word in [name, *numbers]) for row in rows)


def test_without_an_adapter_it_is_the_base(command):
    assert succeed_json(*command).keys() == {"base"}


def test_other_text_is_used_whole(finished, model_folder, text_file, command):
    options = ("--eval-data", text_file, *DATA, "--eval-limit", "100")
    assert succeed_json("eval", model_folder, *options)["base"]["tokens"] == 100 * 15


def test_nothing_is_written(finished, command, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = (finished[0], model_folder, tmp_path)
    before = [contents(folder) for folder in folders]
    succeed(*command, "--adapter", finished[0] / "adapter.safetensors")
    assert [contents(folder) for folder in folders] == before


def test_another_base_is_refused_unless_it_is_insisted_on(
    finished, model_folder, text_file, tmp_path
):
    other = shutil.copytree(model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    adapter = ("--adapter", finished[0] / "adapter.safetensors")
    command = ("eval", other, "--data", text_file, *DATA, *adapter)
    result = invoke(*command)
    assert result.exit_code == 2
    assert "BaseMismatchError: site 'model.layers.0.self_attn.q_proj'" in result.stderr
    assert "--no-verify" in result.stderr
    assert succeed_json(*command, "--no-verify").keys() == {"base", "adapter"}
