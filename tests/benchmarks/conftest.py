"""The scripts of benchmarks/, which import each other by their bare names, as when they are run."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import tiny_model
from tether.integrations import hub, smollm2

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="session")
def script():
    """Import a script by its name; afterwards their names are free again."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture(autouse=True)
def short(monkeypatch, script):
    """One call a turn, one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(script("measure"), "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(script("measure"), "_THREADS", 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def tiny_smollm2(tmp_path, monkeypatch):
    """A model of two layers where the real one is looked for."""
    folder = tiny_model.save(tmp_path / "cache" / smollm2.NAME)
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    return hub.load_model(str(folder), torch.float32, "cpu")


@pytest.fixture(scope="session")
def values():
    """Singular values: steep at the top, flat where they are cut, as of real weights."""
    return torch.cat([torch.tensor([20.0, 9.0, 5.0]), torch.linspace(3, 0.5, 37)]).double()


@pytest.fixture(scope="session")
def row(script):
    """Make a row from seconds of CPU; on the wall it took half."""

    def make(ours=1.0, theirs=20.0, errors=None, notes=None, **target):
        measure = script("measure")
        sides = {
            "tether": measure.Side([ours] * 3, [ours / 2] * 3, errors or {}, notes or {}),
            "peft": measure.Side([theirs] * 3, [theirs / 2] * 3),
        }
        wanted = measure.Target(**target) if target else None
        return measure.Row("work", "how", sides, target=wanted)

    return make
