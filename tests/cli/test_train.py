"""`tether train`: one command from text to files, that can be interrupted at any time."""

import json
import shutil
import signal
import time
from dataclasses import fields
from pathlib import Path

import pytest

import tether
from start.cases import counting
from start.conftest import anchors
from tether.integrations import smollm2
from tether.start import site
from tether.training import log
from tether.training.loop import Step
from tether.training.settings import Settings
from training.files import everything, metrics

from .conftest import SHORT, invoke, start, succeed, succeed_json

__all__ = ["anchors"]

WRITTEN = (
    "adapter.safetensors",
    "lora",
    "checkpoint.safetensors",
    "metrics.jsonl",
    "run.json",
    "report.html",
)


def test_json_says_what_was_done(finished):
    out, said = finished
    assert said == {
        "status": "finished",
        "steps_done": 12,
        "steps": 12,
        "held_out_loss": said["held_out_loss"],
        "sequences": {"train": 90, "held_out": 10},
        "left_out": 0,
        "sites": 14,
        "written": [str(out / name) for name in WRITTEN],
    }
    assert said["held_out_loss"].keys() == {"base", "adapter"}
    assert said["held_out_loss"]["adapter"] < said["held_out_loss"]["base"] - 0.1
    assert sorted(path.name for path in out.iterdir()) == sorted(WRITTEN)
    assert tether.load(out / "adapter.safetensors").provenance.learning_rate == 0.01


def test_the_table_says_the_same(finished, model_folder, text_file, tmp_path):
    out = tmp_path / "run[a]"  # no markup
    said = succeed(
        "train", model_folder, "--data", text_file, "--out", out, "--steps", "12", *SHORT
    )
    for name, loss in finished[1]["held_out_loss"].items():
        assert any(name in line and f"{loss:.4f}" in line for line in said.splitlines())
    assert "pissa, 12 steps" in said
    for name in WRITTEN:
        assert f"wrote{out / name}" in "".join(said.split())


OPTIONS = {
    "--init": ("lora.init", "olora"),
    "--rank": ("lora.rank", 3),
    "--alpha": ("lora.alpha", 6.0),
    "--rslora": ("lora.use_rslora", True),
    "--dropout": ("lora.dropout", 0.25),
    "--target": ("lora.target_modules", ["q_proj"]),
    "--exclude": ("lora.exclude_modules", ["*.k_proj"]),
    "--layers": ("lora.layers_to_transform", [1]),
    "--rank-pattern": ("lora.rank_pattern", {"q_proj": 2}),
    "--alpha-pattern": ("lora.alpha_pattern", {"q_proj": 5.0}),
    "--dora": ("lora.use_dora", True),
    "--bias": ("lora.bias", "none"),
    "--save-module": ("lora.modules_to_save", ["model.norm"]),
    "--after": ("lora.after_save", "detach"),
    "--steps": ("steps", 1),
    "--epochs": ("epochs", 2.0),
    "--learning-rate": ("learning_rate", 0.003),
    "--warmup": ("warmup", 0.25),
    "--batch-size": ("batch_size", 3),
    "--accumulation": ("accumulation", 2),
    "--block": ("block", 12),
    "--weight-decay": ("weight_decay", 0.125),
    "--clip": ("clip", 0.5),
    "--dtype": ("dtype", "bfloat16"),
    "--device": ("device", "cpu"),
    "--checkpointing": ("checkpointing", True),
    "--seed": ("seed", 7),
    "--eval-data": ("eval_data", ""),
    "--held-out": ("held_out", 0.25),
    "--eval-limit": ("eval_limit", 3),
    "--eval-every": ("eval_every", 1),
    "--save-every": ("save_every", 2),
}


def test_every_option_reaches_the_run(model_folder, text_file, tmp_path):
    wanted = OPTIONS | {"--eval-data": ("eval_data", str(text_file))}
    arguments: list[object] = []
    for option, (_, value) in wanted.items():
        match value:
            case True:
                arguments += [option]
            case [one]:
                arguments += [option, one]
            case dict():
                arguments += [option, *(f"{name}={number}" for name, number in value.items())]
            case _:
                arguments += [option, value]
    succeed_json("train", model_folder, "--data", text_file, "--out", tmp_path, *arguments)
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    lora = settings.pop("lora")
    assert lora.pop("seed") == 7
    flat = settings | {f"lora.{name}": value for name, value in lora.items()}
    flat["lora.init"] = flat["lora.init"]["name"]
    assert {name: flat[name] for name, _ in wanted.values()} == dict(wanted.values())
    covered = {name for name, _ in wanted.values()}
    assert {field.name for field in fields(Settings)} <= covered | {"model", "data", "lora"}
    assert {f"lora.{field.name}" for field in fields(tether.LoraConfig)} <= covered | {"lora.seed"}


def test_a_bias_setting_reaches_the_model(model_folder, text_file, tmp_path):
    options = ("--out", tmp_path, *SHORT, "--bias", "all")
    result = invoke("train", model_folder, "--data", text_file, *options)
    assert result.exit_code == 2
    assert "bias='all': no such module of the model has a bias" in result.stderr


def test_anchors_are_kept_for_the_next_run_unless_told_not_to(
    model_folder, text_file, tmp_path, anchors, monkeypatch
):
    monkeypatch.setattr(site, "_CACHED", 1)  # the model's weights are tiny
    command = ("train", model_folder, "--data", text_file, "--steps", "1", *SHORT)
    succeed_json(*command, "--out", tmp_path / "without", "--no-cache")
    assert not anchors.exists()
    succeed_json(*command, "--out", tmp_path / "first")
    assert len(list(anchors.rglob("*.safetensors"))) == 14
    with counting() as calls:
        succeed_json(*command, "--out", tmp_path / "second")
    assert not calls
    with counting() as calls:
        succeed_json(*command, "--out", tmp_path / "again", "--no-cache")
    assert len(calls) == 14
    whole = everything(tmp_path / "without")
    assert all(everything(tmp_path / out) == whole for out in ("first", "second", "again"))


def test_without_a_model_and_data_it_is_a_first_look_at_the_default(
    model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(smollm2, "folder", lambda: model_folder)
    monkeypatch.chdir(tmp_path)
    said = succeed_json("train", *SHORT)
    assert (said["steps_done"], said["sequences"]["train"] > 5000) == (40, True)
    assert said["written"][0] == "tether-out/adapter.safetensors"
    assert Path(said["written"][0]).exists()


def test_the_length_of_a_run_over_ones_own_text_is_its_epochs(model_folder, text_file, tmp_path):
    options = ("--out", tmp_path, *SHORT, "--batch-size", "30", "--epochs", "2")
    assert succeed_json("train", model_folder, "--data", text_file, *options)["steps"] == 6


def test_a_run_is_gone_on_with_by_its_folder_alone(finished, model_folder, text_file, tmp_path):
    data = ("train", model_folder, "--data", text_file, "--out", tmp_path, *SHORT)
    succeed_json(*data, "--steps", "4")
    said = succeed_json("train", "--resume", "--out", tmp_path, "--steps", "6")
    assert (said["steps_done"], said["sequences"]) == (6, {"train": 90, "held_out": 10})
    # The whole command again, with --resume added.
    assert succeed_json(*data, "--init", "pissa", "--steps", "7", "--resume")["steps_done"] == 7


@pytest.fixture
def signalled(monkeypatch):
    """Raise signals after a step, as a terminal does."""

    append_step = log.append_step

    def at(number: int, *signals: int) -> None:
        def append_and_signal(out: Path, step: Step, seconds: float) -> None:
            append_step(out, step, seconds)
            if step.number == number:
                for each in signals:
                    signal.raise_signal(each)

        monkeypatch.setattr(log, "append_step", append_and_signal)

    return at


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_step_and_saves(
    number, signalled, model_folder, text_file, tmp_path
):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signalled(3, number)
    result = invoke(
        "train", model_folder, "--data", text_file, "--out", tmp_path, "--steps", "6", *SHORT
    )
    assert result.exit_code == 130
    assert "stopped after step 3" in result.stdout
    assert f"tethertrain--resume--out{tmp_path}" in "".join(result.stdout.split())
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    assert (
        tether.load(tmp_path / "lora").layers.keys()
        == tether.load(tmp_path / "adapter.safetensors").layers.keys()
    )
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_the_second_signal_stops_at_once_and_the_last_checkpoint_stays(
    signalled, model_folder, text_file, tmp_path
):
    command = ("train", model_folder, "--data", text_file, "--steps", "6", "--save-every", "2")
    succeed_json(*command, "--out", tmp_path / "whole", *SHORT)
    signalled(3, signal.SIGINT, signal.SIGINT)
    result = invoke(*command, "--out", tmp_path / "out", *SHORT)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"
    signalled(0)
    assert succeed_json("train", "--resume", "--out", tmp_path / "out")["steps_done"] == 6
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_process_that_is_interrupted_goes_on_as_if_it_had_not_been(
    model_folder, text_file, tmp_path
):
    out = tmp_path / "out"
    command = ("train", model_folder, "--data", text_file, *SHORT, "--dropout", "0.1", "--json")
    process = start(*command, "--steps", "200", "--out", out)
    log = out / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    # Libraries that transformers loads may log before.
    said_last = stderr.splitlines()[-1]
    assert said_last == "stopping after this step; the run is saved and can be resumed"
    said = json.loads(stdout)
    assert said["status"] == "interrupted"
    done = said["steps_done"]
    assert 3 <= done < 200
    assert len(metrics(out)) == done
    assert succeed_json("train", "--resume", "--out", out)["steps_done"] == 200
    succeed_json(*command[:-1], "--steps", "200", "--out", tmp_path / "whole")
    assert everything(out) == everything(tmp_path / "whole")


@pytest.mark.parametrize("options", [(), ("--resume",), ("--overwrite",)])
def test_under_a_launcher_nothing_is_begun(options, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    if options:
        shutil.copytree(finished[0], out)
    before = everything(out) if options else None
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = invoke("train", "no-such-model", "--out", out, *options)
    assert done.exit_code == 2
    words = " ".join(done.output.split())
    assert "DistributedError" in words
    assert "runs in one process, and a launcher started 2" in words
    assert "adapt(Trainer)" in words
    assert (everything(out) if options else None) == before
    assert out.exists() == bool(options)


@pytest.mark.parametrize("size", ["1", "", "many"])
def test_one_process_of_a_launcher_is_as_good_as_none(size, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    done = invoke("train", tmp_path / "none", "--out", tmp_path / "run")
    assert "ModelError" in done.output
