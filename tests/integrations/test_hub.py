"""A model is loaded, or one line says why not; pickles and foreign code are refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from torch import nn

from tether.errors import MissingExtraError, ModelError
from tether.integrations import hub

LOADERS = (hub.load_tokenizer, lambda name: hub.load_model(name, torch.float32, "cpu"))


def load(name: object) -> tuple[Any, nn.Module]:
    tokenizer, model = (call(str(name)) for call in LOADERS)
    return tokenizer, model


@pytest.fixture
def copied(model_folder, tmp_path) -> Path:
    """A model folder that may be changed."""
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_in_eval_mode_and_its_dtype_without_a_word(dtype, model_folder, capfd):
    levels = transformers.utils.logging.get_verbosity()
    model = hub.load_model(str(model_folder), dtype, "cpu")
    tokenizer = hub.load_tokenizer(str(model_folder))
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert tokenizer.decode(tokenizer("wall")["input_ids"]) == "wall"
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == levels
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skeleton_is_the_model_without_its_values(dtype, model_folder, copied, capfd):
    hub.load_model(str(model_folder), dtype, "cpu").save_pretrained(copied)
    capfd.readouterr()
    levels = transformers.utils.logging.get_verbosity()
    model, empty = load(copied)[1], hub.skeleton(str(copied))
    assert type(empty) is type(model)
    assert not empty.training
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in empty.named_parameters()} == shapes
    assert empty.config._name_or_path == str(copied)
    assert torch.empty(0).device.type == "cpu"
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == levels


def test_a_skeleton_needs_no_weights(copied):
    (copied / "model.safetensors").unlink()
    assert isinstance(hub.skeleton(str(copied)), transformers.LlamaForCausalLM)


def test_a_model_that_is_no_language_model_is_its_own_skeleton(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    transformers.ViTConfig(**small, num_attention_heads=2).save_pretrained(tmp_path)
    assert isinstance(hub.skeleton(str(tmp_path)), transformers.ViTModel)


def kind(name: str, base: type[Exception] = OSError) -> type[Exception]:
    """An exception class as huggingface_hub has it."""
    return type(name, (base,), {})


UNREACHABLE = "It is not in the local cache and the hub cannot be reached; give a folder"
NOT_FOUND = kind("RepositoryNotFoundError")


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        (kind("GatedRepoError", NOT_FOUND), "It is gated: accept its terms .* `hf auth login`"),
        (NOT_FOUND, "Check the id; for a private model log in with `hf auth login`"),
        (kind("LocalEntryNotFoundError"), UNREACHABLE),
        (kind("OfflineModeIsEnabled"), UNREACHABLE),
        (kind("ConnectError"), UNREACHABLE),
        (ValueError, r"Give a folder with config\.json and safetensors weights"),
    ],
)
def test_what_the_hub_says_becomes_one_line_with_advice(cause, advice, monkeypatch):
    def fail(name: str, **_: object) -> None:
        try:
            raise cause("deep down")
        except Exception as error:
            raise OSError("First\nline.\n\nA long explanation.") from error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for kind_of_file in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(kind_of_file, "from_pretrained", fail)
    for call in (hub.fetch, *LOADERS):
        with pytest.raises(
            ModelError, match=rf"^org/name: cannot be loaded: First line\. {advice}"
        ):
            call("org/name")


def test_too_little_memory_is_said_so(model_folder, monkeypatch):
    def fail(name: str, **_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"tiny: not enough memory: tried to allocate 9 GiB"):
        hub.load_model(str(model_folder), torch.float32, "cpu")


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "../none", "~/none", "a/b/c"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name):
    for call in (hub.fetch, hub.skeleton, *LOADERS):
        with pytest.raises(ModelError, match=f"^{name}: no such folder"):
            call(name)


def put_into_cache(cache: Path, folder: Path) -> None:
    """As if org/name had been downloaded."""
    repository, commit = cache / "models--org--name", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """The hub's cache, empty, where the hub is known to be out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["org/unheard-of", "unheard-of"])
def test_offline_an_id_that_is_not_cached_is_refused_at_once(name, offline):
    began = time.monotonic()
    for call in (hub.fetch, *LOADERS):
        with pytest.raises(ModelError, match=rf"^{name}: .*{UNREACHABLE}"):
            call(name)
    assert time.monotonic() - began < 5


def test_offline_an_id_that_is_cached_is_loaded(offline, model_folder):
    put_into_cache(offline, model_folder)
    hub.fetch("org/name")
    tokenizer, model = load("org/name")
    assert tokenizer.decode(tokenizer("wall")["input_ids"]) == "wall"
    assert model.config._name_or_path == "org/name"


def without_a_hub(home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`tether eval org/name` in a process that nobody told that the hub is out of reach."""
    return subprocess.run(
        [sys.executable, "-m", "tether", "eval", "org/name", "--json", *options],
        check=False,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home)},
        timeout=25,  # the imports included; one round of retries alone takes 23
        capture_output=True,
        text=True,
    )


def test_an_unreachable_hub_is_named_soon(tmp_path):
    done = without_a_hub(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ModelError: org/name: cannot be loaded: ")
    assert line.endswith(f"{UNREACHABLE}.")
    assert json.loads(done.stdout)["error"] == "ModelError"


def test_an_unreachable_hub_does_not_hold_up_a_cached_model(tmp_path, model_folder, text_file):
    put_into_cache(tmp_path / "hub", model_folder)
    done = without_a_hub(tmp_path, "--data", str(text_file), "--block", "16")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["base"]["tokens"] == 10 * 15


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def foreign_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("open('ran', 'w')")


def cut_off_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (pickle_weights, "safetensors"),
        (foreign_code, "code"),
        (cut_off_weights, "incomplete"),
        (lambda folder: (folder / "config.json").write_text("{"), "config"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_a_folder_that_is_no_safe_model_is_refused(damage, words, copied, monkeypatch):
    monkeypatch.chdir(copied)
    load(copied)
    damage(copied)
    with pytest.raises(ModelError, match=rf"^{copied}: .*(?i:{words})"):
        load(copied)
    assert not (copied / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (foreign_code, "code"),
        (lambda folder: (folder / "config.json").write_text("{"), "config"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
)
def test_a_folder_that_tells_no_known_architecture_has_no_skeleton(
    damage, words, copied, monkeypatch
):
    monkeypatch.chdir(copied)
    damage(copied)
    with pytest.raises(ModelError, match=rf"^{copied}: .*(?i:{words})"):
        hub.skeleton(str(copied))
    assert not (copied / "ran").exists()
    assert torch.empty(0).device.type == "cpu"


def test_a_file_is_no_model(copied):
    path = copied / "model.safetensors"
    with pytest.raises(ModelError, match=f"^{path}: is a file. Give the folder"):
        load(path)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (load, hub.skeleton):
        with pytest.raises(MissingExtraError, match=r"'transformers'.*pip install '\.\[train\]'"):
            call("org/name")


def test_activations_are_recomputed_where_the_architecture_can(model_folder):
    _, model = load(model_folder)
    hub.enable_checkpointing(model)
    assert model.model.layers[0].gradient_checkpointing
    with pytest.raises(ModelError, match="Linear cannot recompute"):
        hub.enable_checkpointing(nn.Linear(1, 1))
