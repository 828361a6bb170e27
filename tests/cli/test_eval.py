"""`tether eval`: live, native and plain LoRA are the same model, also in another process."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tether
from tether.cli import scores
from tether.integrations import hub
from tether.statistics import Scores

from .conftest import DATA, contents, invoke, start, succeed, succeed_json

TEXTS = ("one green bottle", "nothing at all", "two, hanging", "it falls", "a wall", "six of them")
# The tiny model has 256 bytes and few merges: a label is many tokens, and the newline ends it.
TEMPLATE = "{text}\\nAnswer: {label}\\n"


@pytest.fixture
def command(model_folder, text_file) -> tuple[object, ...]:
    return ("eval", model_folder, "--data", text_file, *DATA)


@pytest.fixture
def adapters(finished) -> tuple[str, str]:
    return str(finished[0] / "adapter.safetensors"), str(finished[0] / "lora")


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "labelled.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = [[text, ("yes", "no")[i % 2]] for i, text in enumerate(TEXTS)]
        csv.writer(file).writerows([["text", "label"], *rows])
    return path


def test_every_form_has_the_loss_of_the_live_adapter(finished, adapters, command):
    process = start(*command, *adapters, "--json")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    said = json.loads(stdout)
    live = finished[1]["held_out_loss"]
    assert said["adapters"][adapters[0]]["loss"] == pytest.approx(live["adapter"], rel=1e-6)
    assert said["adapters"][adapters[1]]["loss"] == pytest.approx(live["adapter"], rel=1e-5)
    assert said["base"]["loss"] == pytest.approx(live["base"], rel=1e-6)
    assert {mean["tokens"] for mean in said["adapters"].values()} == {8 * 15}
    assert (said["unit"], said["used"], said["total"]) == ("sequences", 8, 10)


def test_all_at_once_is_each_alone(adapters, command):
    together = succeed_json(*command, *adapters)
    for path in adapters:
        alone = succeed_json(*command, path)
        assert alone["base"] == together["base"] == succeed_json(*command)["base"]
        assert alone["adapters"][path] == together["adapters"][path]
        assert alone["differences"][0] in together["differences"]


def test_differences_are_of_every_two(adapters, command):
    said = succeed_json(*command, *adapters)
    pairs = [(pair["adapter"], pair["minus"]) for pair in said["differences"]]
    assert pairs == [(adapters[0], None), (adapters[1], None), (adapters[1], adapters[0])]
    gained = said["differences"][0]["loss"]
    losses = said["adapters"][adapters[0]]["loss"], said["base"]["loss"]
    assert gained["value"] == pytest.approx(losses[0] - losses[1])
    low, high = gained["interval"]
    assert low < gained["value"] < high < 0  # it was trained on text of this kind
    assert not gained["within_noise"]


def test_the_base_is_loaded_once(adapters, command, monkeypatch):
    calls = []
    original = hub.load_model
    monkeypatch.setattr(hub, "load_model", lambda *a: calls.append(a) or original(*a))
    succeed(*command, *adapters)
    assert len(calls) == 1


def test_the_tables_say_the_same(adapters, command):
    wanted = succeed_json(*command, *adapters)
    text = succeed(*command, *adapters)
    for mean in (wanted["base"], *wanted["adapters"].values()):
        numbers = [f"{mean['loss']:.6f}", f"{mean['loss_error']:.6f}", f"{mean['perplexity']:.3f}"]
        assert any(all(n in row for n in [*numbers, "120"]) for row in text.splitlines())
    for pair in wanted["differences"]:
        low, high = pair["loss"]["interval"]
        assert f"{low:+.6f} to {high:+.6f}" in text
    assert "lower" in text
    assert "8 of 10 sequences" in text
    assert "fewer than 20 sequences: the intervals are too narrow; raise --limit" in text


def test_without_an_adapter_it_is_the_base(command):
    said = succeed_json(*command)
    assert (said["adapters"], said["differences"]) == ({}, [])
    assert "difference" not in succeed(*command)


def test_other_text_is_used_whole(model_folder, text_file):
    options = ("--eval-data", text_file, "--block", "16", "--limit", "100")
    assert succeed_json("eval", model_folder, *options)["base"]["tokens"] == 100 * 15


def test_one_sequence_has_no_error(adapters, command):
    said = succeed_json(*command, adapters[0], "--limit", "1")
    assert said["base"]["loss_error"] is None
    assert said["differences"][0]["loss"]["interval"] is None
    text = succeed(*command, adapters[0], "--limit", "1")
    assert "unknown" in text
    assert "raise --limit" in text


def test_bfloat16_is_near(adapters, command):
    exact = succeed_json(*command, *adapters)
    rounded = succeed_json(*command, *adapters, "--dtype", "bfloat16", "--no-verify")
    assert rounded != exact
    for path in adapters:
        # bfloat16 has 8 bits: logits near 1 are off by about 2⁻⁸.
        assert rounded["adapters"][path]["loss"] == pytest.approx(
            exact["adapters"][path]["loss"], abs=0.05
        )


def test_labels_give_an_accuracy(model_folder, adapters, labelled):
    command = ("eval", model_folder, *adapters, "--data", labelled, "--template", TEMPLATE)
    said = succeed_json(*command)
    assert (said["unit"], said["used"], said["total"]) == ("rows", 6, 6)
    assert said["labels"] == ["no", "yes"]
    assert said["majority"] == {"label": "no", "accuracy": 0.5}
    for mean in (said["base"], *said["adapters"].values()):
        share = mean["accuracy"]
        assert share in {n / 6 for n in range(7)}
        assert mean["accuracy_error"] == pytest.approx(math.sqrt(share * (1 - share) / 5))
    for pair in said["differences"]:
        first, second = said["adapters"][pair["adapter"]], said["base"]
        if pair["minus"] is not None:
            second = said["adapters"][pair["minus"]]
        gained = first["accuracy"] - second["accuracy"]
        assert pair["accuracy"]["value"] == pytest.approx(gained)
    text = succeed(*command)
    assert "6 of 6 rows" in text
    assert "fewer than 20 rows: the intervals are too narrow; give more data" in text
    assert "2 labels; always answering 'no' is right in 0.5000" in text


def test_accuracy_is_taken_from_accuracy():
    losses = Scores({None: np.array([2.0, 4.0]), "1-a": np.array([1.0, 1.0])}, np.array([1, 2]))
    correct = Scores({None: np.zeros(2), "1-a": np.array([1.0, 0.0])}, np.ones(2, dtype=np.int64))
    said = scores.facts({"a": "1-a"}, losses, correct)
    (pair,) = said["differences"]
    assert (pair["adapter"], pair["minus"]) == ("a", None)
    assert pair["accuracy"]["value"] == said["adapters"]["a"]["accuracy"] == 0.5
    assert pair["loss"]["value"] == pytest.approx(2 / 3 - 2)
    assert said["base"]["accuracy"] == 0


def test_adapters_that_would_replace_each_other_take_turns(command, model_folder, tmp_path):
    model = hub.load_model(str(model_folder), torch.float32, "cpu")
    paths = [tmp_path / f"{n}.safetensors" for n in (1, 2)]
    for path in paths:
        config = tether.LoraConfig(rank=1, modules_to_save=["lm_head"])
        handle = tether.attach(model, config)
        with torch.no_grad():
            for factor in handle.parameters():
                factor.normal_(std=0.1)
        tether.save(handle.detach(), path)
    said = succeed_json(*command, *paths)
    for path in paths:
        assert succeed_json(*command, path)["adapters"][str(path)] == said["adapters"][str(path)]


def test_a_template_changes_what_is_read(model_folder, labelled):
    command = ("eval", model_folder, "--data", labelled, "--template")
    one = succeed_json(*command, TEMPLATE)
    other = succeed_json(*command, "{text} = {label}\\n")
    assert one["base"]["loss"] != other["base"]["loss"]
    # "\n" on the command line is one character, a new line.
    assert one == succeed_json(*command, TEMPLATE.replace("\\n", "\n"))


def test_nothing_is_written(finished, adapters, command, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = (finished[0], model_folder, tmp_path)
    before = [contents(folder) for folder in folders]
    succeed(*command, *adapters)
    assert [contents(folder) for folder in folders] == before


def test_another_base_is_refused_unless_it_is_insisted_on(
    model_folder, text_file, adapters, tmp_path
):
    other = shutil.copytree(model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    command = ("eval", other, adapters[0], "--data", text_file, *DATA)
    result = invoke(*command)
    assert result.exit_code == 2
    assert "BaseMismatchError: site 'model.layers.0.self_attn.q_proj'" in result.stderr
    assert "--no-verify" in result.stderr
    assert succeed_json(*command, "--no-verify")["adapters"].keys() == {adapters[0]}


def test_an_adapter_in_the_place_of_the_base_is_one_line(adapters, text_file):
    for path, what in zip(adapters, ("a file", "an adapter"), strict=True):
        result = invoke("eval", path, "--data", text_file)
        assert result.exit_code == 2
        assert f"base model, and is {what}. Give the base first" in result.stderr
        assert f"tether eval default {path}" in result.stderr


def test_an_adapter_given_twice_is_one_line(command, adapters):
    result = invoke(*command, adapters[0], adapters[1], adapters[0])
    assert result.exit_code == 2
    assert f"ConfigError: adapter {adapters[0]} is given 2 times" in result.stderr


def test_a_template_for_running_text_is_one_line(command):
    result = invoke(*command, "--template", TEMPLATE)
    assert result.exit_code == 2
    assert "--template is for labelled files" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--limit", "0"), "ConfigError: --limit must be at least 1, not 0"),
        (("--template", "{label}"), "must hold {text} once and, after it, {label} once"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_loaded(labelled, options, said):
    result = invoke("eval", "no/such/model", "--data", labelled, *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_row_that_cannot_be_used_is_one_line(model_folder, labelled):
    labelled.write_text(labelled.read_text("utf-8") + "a, b,yes\n", "utf-8")
    result = invoke("eval", model_folder, "--data", labelled, "--json")
    assert result.exit_code == 2
    said = json.loads(result.stdout)
    assert said["error"] == "DataError"
    assert f"{labelled}, line 8: has 3 fields" in said["message"]


def test_an_adapter_that_spoils_the_output_is_named(model_folder, finished, command, tmp_path):
    folder = shutil.copytree(finished[0] / "lora", tmp_path / "too large")
    factors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t * 1e30 for n, t in factors.items()}, folder / "adapter_model.safetensors")
    result = invoke(*command, folder)
    assert result.exit_code == 2
    assert "NonFiniteError: adapter '1-" in result.stderr
    assert "too_large', sequence 1: the loss is nan" in result.stderr


def test_a_name_does_not_steer_the_terminal(finished, command, tmp_path):
    folder = shutil.copytree(finished[0] / "lora", tmp_path / "red\x1b[31m")
    text = succeed(*command, folder)
    assert "\x1b" not in text
    assert "x1b[31m" in "".join(text.split())
    assert str(folder) in succeed_json(*command, folder)["adapters"]
