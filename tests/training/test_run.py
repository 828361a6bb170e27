"""A run interrupted anywhere and resumed is the uninterrupted run, bit for bit."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tether
from tether.drift import measure_drift
from tether.errors import (
    BaseMismatchError,
    ConfigError,
    DataError,
    FormatError,
    NonFiniteError,
    TetherError,
)
from tether.training import checkpoint, loop
from tether.training import run as runs
from tether.training.report import Reporter
from tether.training.run import Run
from tether.training.settings import Settings
from tiny_model import TEXT, save

from .files import everything, metrics, tensors

LORA = tether.LoraConfig(rank=2)
STEPS = 6


class Cut(BaseException):
    """The process is killed here."""


def cut() -> None:
    raise Cut


@pytest.fixture
def settings(model_folder: Path, text_file: Path) -> Settings:
    return Settings(
        model=str(model_folder),
        data=str(text_file),
        lora=LORA,
        steps=STEPS,
        learning_rate=1e-2,
        batch_size=2,
        block=16,
        eval_limit=4,
        save_every=0,
    )


def begin(settings: Settings, out: Path, overwrite: bool = False) -> Run:
    return runs.prepare(settings, out, overwrite=overwrite, reporter=Reporter())


def go_on(out: Path, **changes: object) -> Run:
    torch.manual_seed(77)  # a new process has another random state
    return runs.resume(out, changes, Reporter())


def whole(settings: Settings, out: Path) -> dict[str, object]:
    """Everything that an uninterrupted run writes."""
    runs.execute(begin(settings, out))
    return everything(out)


def stop_after(steps: int, run: Run) -> Callable[[], bool]:
    """As Ctrl-C."""
    return lambda: run.step >= steps


def kill_after(steps: int, run: Run) -> Callable[[], bool]:
    """As kill -9: nothing more is written."""

    def stop() -> bool:
        if run.step >= steps:
            raise Cut
        return False

    return stop


def interrupt(run: Run, stop: Callable[[], bool]) -> None:
    with suppress(Cut):
        runs.execute(run, stop)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora": replace(LORA, dropout=0.5)},
    "accumulation": {"accumulation": 2, "clip": 0.1, "weight_decay": 0.1},
    "saving and evaluating": {"save_every": 2, "eval_every": 2, "lora": replace(LORA, dropout=0.5)},
    "bfloat16, no anchor": {"dtype": "bfloat16", "lora": replace(LORA, init="lora")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_after_ctrl_c_is_the_uninterrupted_run(variant, settings, tmp_path):
    settings = replace(settings, **VARIANTS[variant])
    wanted = whole(settings, tmp_path / "whole")
    for step in range(1, STEPS):
        out = tmp_path / str(step)
        run = begin(settings, out)
        interrupt(run, stop_after(step, run))
        assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
        run = go_on(out)
        assert run.step == step
        runs.execute(run)
        assert everything(out) == wanted


@pytest.mark.parametrize("step", [1, 3, 4])
def test_resuming_after_a_kill_goes_back_to_the_last_checkpoint(step, settings, tmp_path):
    settings = replace(settings, **VARIANTS["saving and evaluating"])
    wanted = whole(settings, tmp_path / "whole")
    run = begin(settings, tmp_path / "out")
    interrupt(run, kill_after(step, run))
    run = go_on(tmp_path / "out")
    assert run.step == (step - 1) // 2 * 2  # killed before the checkpoint of its step
    runs.execute(run)
    assert everything(tmp_path / "out") == wanted


def test_an_evaluation_that_was_cut_off_is_made_up_for(settings, tmp_path, monkeypatch):
    settings = replace(settings, save_every=2, eval_every=2)
    wanted = whole(settings, tmp_path / "whole")
    run = begin(settings, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", lambda *_: cut())
        interrupt(run, lambda: False)
    runs.execute(go_on(tmp_path / "out"))
    assert everything(tmp_path / "out") == wanted


def test_a_log_whose_last_line_was_cut_off_is_gone_on_with(settings, tmp_path):
    wanted = whole(settings, tmp_path / "whole")
    run = begin(settings, tmp_path / "out")
    interrupt(run, kill_after(2, run))
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    runs.execute(go_on(tmp_path / "out"))
    assert everything(tmp_path / "out") == wanted


def test_resuming_a_finished_run_changes_nothing(settings, tmp_path):
    wanted = whole(settings, tmp_path)
    runs.execute(go_on(tmp_path))
    assert everything(tmp_path) == wanted


def test_a_finished_run_is_extended(settings, tmp_path):
    whole(settings, tmp_path)
    first = metrics(tmp_path)
    run = go_on(tmp_path, steps=STEPS + 3)
    assert run.step == STEPS
    runs.execute(run)
    lines = metrics(tmp_path)
    assert lines[: len(first)] == first
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, STEPS + 4))
    rates = [loop.learning_rate(n, STEPS + 3, settings) for n in range(STEPS + 1, STEPS + 4)]
    assert [line["learning_rate"] for line in lines if "loss" in line][STEPS:] == rates
    assert tether.load(tmp_path / "adapter.safetensors").provenance.steps == STEPS + 3


def test_an_interrupted_extension_reports_no_loss_of_an_older_adapter(settings, tmp_path):
    whole(settings, tmp_path)
    run = go_on(tmp_path, steps=STEPS + 3)
    interrupt(run, stop_after(STEPS + 1, run))
    assert set(run.losses) == {"base"}
    assert set(json.loads((tmp_path / "run.json").read_text())["held_out_loss"]) == {"base"}


# What a run writes


def test_drift_is_logged_at_each_save_and_once(settings, tmp_path):
    settings = replace(settings, save_every=2, eval_every=2)
    run = begin(settings, tmp_path)
    found = {}

    def look() -> bool:
        found[run.step] = measure_drift(run.handle)
        return False

    runs.execute(run, look)
    lines = [line for line in metrics(tmp_path) if "drift" in line]
    assert lines == [
        {"step": n, "drift": found[n].relative, "effective_rank": found[n].effective_rank}
        for n in (2, 4)
    ]
    assert 0 < lines[0]["drift"] < lines[1]["drift"] < 1
    # The step at which an extended run begins has its evaluation already.
    runs.execute(go_on(tmp_path, steps=STEPS + 1))
    entries = [(line["step"], *sorted(set(line) - {"step"})) for line in metrics(tmp_path)]
    assert len(entries) == len(set(entries))
    assert [e[0] for e in entries if "drift" in e] == [2, 4, 6]


def test_the_files_say_what_was_done(settings, tmp_path, model_folder):
    settings = replace(settings, eval_every=4)
    run = begin(settings, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"
    runs.execute(run)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 6]
    steps = [line for line in lines if "loss" in line]
    wanted = {"step", "loss", "learning_rate", "gradient_norm", "tokens"}
    assert all(set(line) == wanted for line in steps)
    assert all(line["tokens"] == 2 * 15 for line in steps)  # the first of 16 is not predicted
    evaluations = [line for line in lines if "held_out_loss" in line]
    assert evaluations[-1] == {"step": 6, "held_out_loss": run.evaluate().loss}
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["steps_done"] == record["steps"] == STEPS
    assert record["held_out_loss"] == {
        "base": run.losses["base"],
        "adapter": evaluations[-1]["held_out_loss"],
    }
    assert record["sequences"] == {"train": 90, "held_out": 10}
    assert record["settings"] == json.loads(json.dumps(settings.to_dict()))
    assert record["versions"].keys() == {"tether", "torch", "transformers"}
    origin = tether.load(tmp_path / "adapter.safetensors").provenance
    assert (origin.learning_rate, origin.steps, origin.method) == (1e-2, STEPS, "pissa")
    assert origin.base_model == str(model_folder)
    assert origin.fingerprints.keys() == set(run.handle.sites)


def test_the_loss_falls_below_the_base(settings, tmp_path):
    run = begin(replace(settings, steps=30), tmp_path)
    runs.execute(run)
    assert run.losses["adapter"] < run.losses["base"] - 0.5


def test_the_base_is_never_written(settings, tmp_path, model_folder):
    files = {path: path.read_bytes() for path in model_folder.iterdir()}
    run = begin(replace(settings, save_every=2, eval_every=3), tmp_path)
    before = tether.fingerprint(run.model)
    names = set(before)
    versions = {n: p._version for n, p in run.model.named_parameters() if n in names}
    runs.execute(run)
    assert tether.fingerprint(run.model) == before
    assert {n: p._version for n, p in run.model.named_parameters() if n in names} == versions
    assert {path: path.read_bytes() for path in model_folder.iterdir()} == files
    with tether.reference(run.model):
        assert run.evaluate().loss == run.losses["base"]


def test_recomputing_activations_gives_the_same_run(settings, tmp_path):
    settings = replace(settings, lora=replace(LORA, dropout=0.5))
    one, other = tmp_path / "one", tmp_path / "other"
    whole(settings, one)
    whole(replace(settings, checkpointing=True), other)
    assert tensors(one / "adapter.safetensors") == tensors(other / "adapter.safetensors")


def test_a_run_that_diverges_keeps_its_last_checkpoint(settings, tmp_path):
    settings = replace(settings, save_every=2)
    wanted = whole(settings, tmp_path / "whole")
    run = begin(settings, tmp_path / "out")

    def poison() -> bool:
        if run.step == 3:
            run.model.lm_head.weight.data[0, 0] = torch.nan
        return False

    with pytest.raises(NonFiniteError, match=r"^step 4: loss nan"):
        runs.execute(run, poison)
    run = go_on(tmp_path / "out")
    assert run.step == 2
    runs.execute(run)
    assert everything(tmp_path / "out") == wanted


# What is refused


def test_a_run_is_replaced_only_where_that_is_asked_for(settings, tmp_path):
    wanted = whole(settings, tmp_path)
    shorter = replace(settings, steps=2)
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume.*--overwrite"):
        begin(shorter, tmp_path)
    assert everything(tmp_path) == wanted
    runs.execute(begin(shorter, tmp_path, overwrite=True))
    assert everything(tmp_path) == whole(shorter, tmp_path.parent / "fresh")


def test_a_replacement_that_was_killed_is_taken_for_neither_run(settings, tmp_path, monkeypatch):
    runs.execute(begin(replace(settings, steps=1), tmp_path))
    with monkeypatch.context() as patch, suppress(Cut):
        patch.setattr(checkpoint, "save", lambda *_: cut())
        begin(replace(settings, lora=replace(LORA, init="olora")), tmp_path, overwrite=True)
    # Here lies the anchor of the second run with the checkpoint of the first.
    with pytest.raises(TetherError):
        go_on(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "before"),
    [
        ("learning_rate", 2e-2, "0.01"),
        ("batch_size", 3, "2"),
        ("block", 32, "16"),
        ("seed", 5, "0"),
        ("dtype", "bfloat16", "'float32'"),
        ("held_out", 0.2, "0.1"),
        ("model", "elsewhere", "tiny"),
        ("lora.rank", 4, "2"),
        ("lora.init", "olora", "pissa"),
        ("lora.dropout", 0.1, "0.0"),
        ("lora.target_modules", ["q_proj"], "'all-linear'"),
    ],
)
def test_a_setting_that_would_rewrite_the_past_is_refused(name, value, before, settings, tmp_path):
    runs.execute(begin(replace(settings, steps=1), tmp_path))
    files = everything(tmp_path)
    with pytest.raises(ConfigError) as caught:
        go_on(tmp_path, **{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert repr(value) in message
    assert before.lower() in message.lower()
    assert everything(tmp_path) == files


def test_settings_that_are_repeated_are_accepted(settings, tmp_path):
    lora = replace(
        LORA,
        target_modules=["q_proj", "up_proj"],
        exclude_modules=["k_proj"],
        alpha=4.0,
        rank_pattern={"q_proj": 1},
    )
    runs.execute(begin(replace(settings, steps=1, lora=lora), tmp_path))
    repeated = {
        "model": settings.model,
        "learning_rate": 1e-2,
        "lora.init": "pissa",
        "lora.alpha": 4.0,
        "lora.target_modules": ["q_proj", "up_proj"],
        "lora.exclude_modules": ["k_proj"],
        "lora.rank_pattern": {"q_proj": 1},
    }
    assert go_on(tmp_path, **repeated).step == 1


@pytest.mark.parametrize("field", ["data", "eval_data"])
def test_another_text_is_refused(field, settings, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    runs.execute(begin(replace(settings, steps=1, **{field: str(path)}), tmp_path / "out"))
    path.write_text(TEXT.replace("green", "brown"))
    with pytest.raises(DataError, match=rf"{path}.*is not what the run began with"):
        go_on(tmp_path / "out")


def test_the_losses_of_base_and_adapter_are_over_the_same_text(settings, tmp_path):
    runs.execute(begin(replace(settings, steps=1), tmp_path))
    run = go_on(tmp_path, steps=2, eval_limit=1)
    runs.execute(run)
    with tether.reference(run.model):
        assert run.losses["base"] == run.evaluate().loss


def test_another_base_is_refused(settings, tmp_path):
    folder = save(tmp_path / "model")
    runs.execute(begin(replace(settings, steps=1, model=str(folder)), tmp_path / "out"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    files = everything(tmp_path / "out")
    with pytest.raises(BaseMismatchError, match=r"'model\.layers\.1\.mlp\.up_proj'"):
        go_on(tmp_path / "out")
    assert everything(tmp_path / "out") == files


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"init": "olora"}, "init is {'name': 'olora'}, the run began with {'name': 'pissa'"),
        ({"rank": 3}, "rank is 3, the run began with 2"),
        ({"target_modules": ["q_proj"]}, "target_modules is ['q_proj'], the run began with"),
    ],
    ids=str,
)
def test_an_adapter_of_another_run_is_refused(lora, words, settings, tmp_path):
    """Its factors may have the same names and shapes."""
    other = replace(settings, steps=1, lora=replace(LORA, **lora))
    for name, chosen in (("out", replace(settings, steps=1)), ("other", other)):
        runs.execute(begin(chosen, tmp_path / name))
    (tmp_path / "other" / "adapter.safetensors").replace(tmp_path / "out" / "adapter.safetensors")
    files = everything(tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        go_on(tmp_path / "out", steps=2)
    assert words in str(caught.value)
    assert str(tmp_path / "out" / "adapter.safetensors") in str(caught.value)
    assert "another --out" in str(caught.value)
    assert everything(tmp_path / "out") == files


@pytest.mark.parametrize("what", ["method", "seed", "base", "rank"])
def test_a_checkpoint_of_another_run_is_refused(what, settings, tmp_path):
    folder = save(tmp_path / "model")
    other = {
        "method": {"lora": replace(LORA, init="olora")},
        "seed": {"lora": replace(LORA, seed=5)},
        "base": {"model": str(folder)},
        "rank": {"lora": replace(LORA, rank=3)},
    }[what]
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name, changes in (("out", {}), ("other", other)):
        runs.execute(begin(replace(settings, steps=1, **changes), tmp_path / name))
    name = "checkpoint.safetensors"
    (tmp_path / "other" / name).replace(tmp_path / "out" / name)
    files = everything(tmp_path / "out")
    with pytest.raises(FormatError) as caught:
        go_on(tmp_path / "out", steps=2)
    message = str(caught.value)
    both = {
        "method": ("method olora,", "method pissa,"),
        "seed": ("seed 5,", "seed 0,"),
        "base": ("base sha256 ", "the one here is"),
        "rank": ("(3, ", "(2, "),
    }[what]
    assert all(word in message for word in (str(tmp_path / "out" / name), *both))
    assert "another --out" in message
    assert everything(tmp_path / "out") == files


def test_there_must_be_a_run_to_go_on_with(tmp_path):
    with pytest.raises(ConfigError, match=rf"{tmp_path}: there is no run .*run\.json is missing"):
        go_on(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-10],
        lambda text: "[]",
        lambda text: "\xff",
        lambda text: text.replace('"data_sha256"', '"data"'),
        lambda text: text.replace('"batch_size"', '"batchsize"'),
        lambda text: text.replace('"batch_size": 2', '"batch_size": "two"'),
        lambda text: text.replace('"base": ', '"base": null, "x": '),
    ],
    ids=["cut off", "a list", "not UTF-8", "a field missing", "unknown field", "type", "loss"],
)
def test_a_damaged_record_is_named(change, settings, tmp_path):
    runs.execute(begin(replace(settings, steps=1), tmp_path))
    path = tmp_path / "run.json"
    text = path.read_text()
    path.write_text(change(text), encoding="latin-1")
    assert path.read_text(encoding="latin-1") != text
    with pytest.raises(TetherError, match=r"run\.json"):
        go_on(tmp_path)


@pytest.mark.parametrize("name", ["adapter.safetensors", "checkpoint.safetensors"])
def test_a_missing_or_damaged_file_is_named(name, settings, tmp_path):
    runs.execute(begin(replace(settings, steps=1), tmp_path))
    path = tmp_path / name
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-1]), path.unlink):
        damage()
        with pytest.raises(FormatError, match=name):
            go_on(tmp_path)


def test_a_run_moves_with_its_folder(settings, tmp_path):
    wanted = whole(settings, tmp_path / "whole")
    run = begin(settings, tmp_path / "here")
    interrupt(run, stop_after(2, run))
    shutil.move(tmp_path / "here", tmp_path / "there")
    runs.execute(go_on(tmp_path / "there"))
    assert everything(tmp_path / "there") == wanted
