"""The README's example runs as printed, and its claims hold on the way."""

import re
from pathlib import Path

import torch

import tether
import tiny_model
from tether import algebra
from tether.cli import app
from tether.integrations import smollm2

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def test_the_example_runs(tmp_path, monkeypatch):
    tiny_model.save(tmp_path / "cache" / smollm2.NAME)
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    assert scope["report"].error < 1e-6
    trained, plain = tether.load("adapter.safetensors"), tether.load("lora")
    assert trained.provenance.method == "pissa"
    assert all(layer.trainable.B.any() for layer in trained.layers.values())
    assert not tether.handles(scope["model"])
    for path, layer in trained.layers.items():
        torch.testing.assert_close(algebra.delta(plain.layers[path]), algebra.delta(layer))


def test_every_command_is_shown():
    shown = set(re.findall(r"`tether (\w+) ", README))
    groups = {group.name for group in app.registered_groups}
    assert shown == groups | {command.name for command in app.registered_commands}
