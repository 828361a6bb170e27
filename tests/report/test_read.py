"""Folders of runs: whose logs are of others, and may be anything."""

import json

import pytest
import torch

import tether
from tether.errors import ConfigError, HeaderError
from tether.report.read import adapter_of, read
from tether.report.run import page_of, write

from .conftest import Parsed, adapter, layer


@pytest.fixture
def run(tmp_path):
    """A folder as of an adapted Trainer: two checkpoints, no log yet."""
    folder = tmp_path / "run"
    for step, size in ((2, 0.5), (10, 2.0)):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        value = adapter({"a": layer([size]), "b": layer([size])}, steps=step)
        tether.save(value, folder / f"checkpoint-{step}" / "adapter.safetensors")
    return folder


def log(run, *entries, step=10):
    text = json.dumps({"log_history": entries})
    (run / f"checkpoint-{step}" / "trainer_state.json").write_text(text)


def values(run):
    return read(run, adapter_of(run))


def test_the_newest_checkpoint_is_the_end(run):
    found = values(run)
    assert [site.norm for site in found.sites] == pytest.approx([2, 2])
    assert found.name == "run"
    assert found.facts["steps"] == "10"
    assert found.sizes.keys() == {"checkpoint-2", "checkpoint-10"}


def test_drift_comes_from_the_checkpoints(run):
    steps = [(point.step, point.relative) for point in values(run).drift]
    # Two sites of norm 10 each; without anchors the start is not known.
    assert steps == [(2, pytest.approx(0.05)), (10, pytest.approx(0.2))]


def test_of_many_checkpoints_some_are_measured(run):
    for step in range(11, 111):
        (run / f"checkpoint-{step}").mkdir()
        path = run / f"checkpoint-{step}" / "adapter.safetensors"
        path.hardlink_to(run / "checkpoint-10" / "adapter.safetensors")
    drift = values(run).drift
    assert len(drift) == 21  # the end says which step it is of
    assert (drift[0].step, drift[-1].step) == (2, 110)


def test_what_the_trainer_logged_is_drawn(run):
    log(
        run,
        {"step": 1, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": 0.5},
        {"step": 2, "loss": 2.0, "epoch": 1},
        {"step": 2, "eval_loss": 2.5},
        {"step": 2, "tether/drift": 0.25, "tether/effective_rank": 1.5},
    )
    found = values(run)
    assert found.curves == {
        "training loss": ((1, 3.0), (2, 2.0)),
        "learning rate": ((1, 1e-3),),
        "gradient norm": ((1, 0.5),),
        "held-out loss": ((2, 2.5),),
    }
    assert [(p.step, p.relative) for p in found.drift] == [(2, 0.25), (10, pytest.approx(0.2))]


def test_what_is_no_number_is_left_out(run):
    bad = [float("nan"), float("inf"), "3", None, True, [1], {}, 10**400]
    log(
        run,
        *({"step": 1, "loss": value} for value in bad),
        *({"step": step, "loss": 1.0} for step in (-1, 1.5, "2", True, 2**60, None)),
        {"loss": 1.0},
        "text",
        {"step": 7, "loss": 4.0},
    )
    assert values(run).curves == {"training loss": ((7, 4.0),)}


@pytest.mark.parametrize("history", [None, 3, {"a": 1}, "text"])
def test_a_log_of_another_kind_is_no_log(run, history):
    (run / "checkpoint-10" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert values(run).curves == {}


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 100000])
def test_a_damaged_log_is_named(run, text):
    (run / "checkpoint-10" / "trainer_state.json").write_bytes(text)
    with pytest.raises(HeaderError, match=r"trainer_state\.json: not valid"):
        values(run)


def test_a_log_that_is_no_file_is_refused(run):
    (run / "checkpoint-10" / "trainer_state.json").mkdir()
    with pytest.raises(HeaderError, match="is no file of at most"):
        values(run)


def test_folders_that_only_look_like_checkpoints_are_none(run):
    for name in ("checkpoint-x", "checkpoint-", "checkpoint-²", "checkpoint-1-2", "checkpoint-99"):
        (run / name).mkdir()
    assert len(values(run).drift) == 2


def test_without_an_adapter_there_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"holds neither adapter\.safetensors"):
        adapter_of(tmp_path)


def test_a_page_of_it_is_written(run):
    log(run, {"step": 1, "loss": 3.0}, {"step": 10, "loss": 2.0})
    path = write(run)
    assert path == run / "report.html"
    page = Parsed(path.read_text("utf-8"))
    names = [figure.get("id") for figure in page.all("figure")]
    assert names == [
        "loss",
        "drift",
        "drift-rank",
        "change",
        "effective-rank",
        "spectra",
        "energy",
        "sizes",
    ]
    # The page does not count itself.
    before = path.read_bytes()
    assert write(run).read_bytes() == before


def test_an_adapter_at_its_start_has_a_page(tiny_llama, tmp_path):
    value = tether.init(tiny_llama(initializer_range=0.15), tether.LoraConfig(rank=2))
    tether.save(value, tmp_path / "adapter.safetensors")
    found = values(tmp_path)
    assert [(p.step, p.relative, p.effective_rank) for p in found.drift] == [(0, 0, 0)]
    names = [
        part.name for s in page_of(found).sections for part in s.parts if hasattr(part, "name")
    ]
    assert names == ["change", "effective-rank", "sites", "sizes"]
    write(tmp_path)


def test_of_an_unknown_base_the_norms_are_shown(tmp_path):
    value = adapter({"a": layer([2.0]), "b": layer([1.0])}, weight=None)
    tether.save(value, tmp_path / "adapter.safetensors")
    found = values(tmp_path)
    (change, *_) = page_of(found).sections[1].parts
    assert change.title == "Size of the change, |ΔW|"
    assert [row[1] for row in change.data.rows] == pytest.approx([2, 1])
    write(tmp_path)


def test_measuring_changes_no_random_state(run):
    before = torch.get_rng_state()
    write(run)
    assert torch.equal(torch.get_rng_state(), before)
