"""Every page of docs/ runs as printed, on the model that it names, and names only what exists."""

import importlib
import inspect
import re
import shlex
import traceback
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
from pages import PAGES, Reader, blocks

import tether
from tether.cli import app
from tether.integrations import smollm2

PEFT_NOTICE = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
# On a machine that is busy with other things a page takes minutes.
pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
@pytest.mark.filterwarnings(PEFT_NOTICE)
def test_evaluate_after_saving(read_page, tmp_path):
    scope = read_page("guides/evaluate-after-saving.md")
    assert scope["live"] < scope["base"] - 0.1
    assert set(tether.handles(scope["model"])) == {"default"}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"lora", "small", "adapter.safetensors"}


@pytest.mark.slow
def test_continue_after_saving(read_page, tmp_path):
    scope = read_page("guides/continue-after-saving.md")
    assert scope["live"] < scope["base"] - 0.1
    assert not tether.handles(scope["model"])
    assert (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").count('"step": 4,') >= 1


@pytest.mark.slow
def test_compare_with_lora(read_page, tmp_path):
    scope = read_page("guides/compare-with-lora.md")
    assert scope["differences"][8].error > 0.01
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"lora", "lora-8"}


@pytest.mark.slow
def test_anchors(read_page, tmp_path, monkeypatch):
    model = smollm2.folder()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / model.name).symlink_to(model)
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TETHER_NO_CACHE", "0")
    scope = read_page("guides/anchors.md")
    assert len(scope["quick"].layers) == 210
    kept = list((tmp_path / "cache" / "anchors").rglob("r16-s1.0.safetensors"))
    assert len(kept) == 14 + 210  # by two methods, which differ in their settings


@pytest.mark.slow
def test_look(read_page, tmp_path):
    scope = read_page("guides/look.md")
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert ">Intruder dimensions<" in text
    assert 'id="memory"' in scope["html"]


@pytest.mark.slow
def test_quantized(read_page, tmp_path):
    scope = read_page("guides/quantized.md")
    assert len(scope["gaps"]) == 14
    assert scope["losses"][-1] < scope["losses"][0] - 0.1
    assert "bitsandbytes nf4" in (tmp_path / "lora" / "README.md").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:.*gradient_checkpointing\w*` is deprecated:FutureWarning")
def test_trainer(read_page, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no telemetry of TRL's
    scope = read_page("guides/trainer.md")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "lora"}
    assert not (tmp_path / "dpo" / "adapter.safetensors").exists()
    assert scope["preferring"].state.global_step == 2


@pytest.mark.slow
def test_several_processes(read_page, tmp_path):
    read_page("guides/several-processes.md")
    moved = tether.load(tmp_path / "run" / "adapter.safetensors")
    shared = tether.load(tmp_path / "ddp.safetensors")
    # Three steps in two processes, then three more in one.
    change = tether.compare(shared, moved)
    assert 0.1 < change.norm_a < change.norm_b
    assert (tmp_path / "run" / "lora" / "adapter_model.safetensors").is_file()
    names = {path.name for path in (tmp_path / "trainer" / "checkpoint-2").iterdir()}
    assert {"adapter.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= names


@pytest.mark.slow
@pytest.mark.filterwarnings(PEFT_NOTICE)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_coming_from_peft(read_page):
    scope = read_page("coming-from-peft.md")
    assert not torch.allclose(scope["a"], scope["base"], atol=1e-2)
    assert scope["handle"].restored


def test_every_page_is_in_the_index_and_every_link_leads_somewhere():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8"))
        assert all((page.parent / link).is_file() for link in links), page
        if page.name == "README.md":
            assert {(page.parent / link).resolve() for link in links} == set(PAGES) - {page}


def spans(page: Path) -> Iterator[str]:
    """What a page shows as code: in backticks, and the lines of its blocks."""
    text = page.read_text("utf-8")
    for block in blocks(page):
        yield from block.text.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def resolve(name: str) -> object:
    """What a dotted name stands for."""
    parts = name.split(".")
    thing: object = tether
    for n, part in enumerate(parts[1:], start=2):
        if not hasattr(thing, part):
            importlib.import_module(".".join(parts[:n]))
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_name_on_a_page_exists(page):
    code = "\n".join(spans(page))
    for name in re.findall(r"\btether(?:\.[A-Za-z_]\w*)+", code):
        assert resolve(name) is not None
    for module, names in re.findall(r"from (tether[\w.]*) import ([\w, ]+)", code):
        assert all(resolve(f"{module}.{name.strip()}") for name in names.split(","))
    for name in re.findall(r"\bhandle\.([a-z_]\w*)\(", code):
        assert callable(getattr(tether.Handle, name, None)), name
    for call, options in re.findall(r"\btether\.(\w+)\(((?:[^()]|\([^()]*\))*)\)", code):
        target = tether.LoraConfig if call == "LoraConfig" else getattr(tether, call)
        known = set(inspect.signature(target).parameters)
        nested = re.sub(r"\([^()]*\)", "", options)
        assert set(re.findall(r"\b(\w+)=", nested)) <= known, (call, options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_and_option_on_a_page_exists(page):
    commands = typer.main.get_command(app).commands
    shown = [re.sub(r"^\$ ", "", span) for span in spans(page)]
    for line in (span for span in shown if re.match(r"tether [a-z]+", span)):
        _, name, *rest = shlex.split(line)
        command = commands[name]
        if hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        options = {option for p in command.params for option in p.opts + p.secondary_opts}
        assert {word for word in rest if word.startswith("--")} <= options, line
    if page.stem == "coming-from-peft":
        text = page.read_text("utf-8")
        table = text[text.index("## Configuration") : text.index("## Life of")]
        rows = re.findall(r"^\| (.*?) \| (.*?) \|", table, re.MULTILINE)
        ours = [theirs if mine.startswith("the same") else mine for theirs, mine in rows]
        named = {name for cell in ours for name in re.findall(r"`(\w+)(?:=[^`]*)?`", cell)}
        assert named - {"tether"} <= {field.name for field in fields(tether.LoraConfig)}
        assert len(named) > 12


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```python\nassert 1 == 2\n```\n", "1 == 2"),
        ("```python\nprint('one 1')\n```\n\n```text\ntwo 1\n```\n", "not printed: 'two 1'"),
        ("```python\n# In a new process\nassert 1 == 3\n```\n", "assert 1 == 3"),
        ("```console\n$ tether inspect nothing-here\n```\n", "NotAnAdapterError"),
        ("```console\n$ rm -r /nothing\n```\n", "not a command"),
        ("```python\npass\n", "not closed"),
    ],
)
def test_a_page_that_is_wrong_fails(text, reason, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text, "utf-8")
    with pytest.raises(AssertionError) as caught:
        Reader(page).read()
    assert reason in "".join(traceback.format_exception(caught.value)) + str(caught.value)


def test_numbers_on_a_page_may_differ_from_what_is_printed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('one', 1)\nx = 3\n```\n\n```text\none 2.5e-3\n…\n```\n")
    assert Reader(page).read()["x"] == 3
