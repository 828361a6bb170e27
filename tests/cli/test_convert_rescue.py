"""`tether convert` of a residual adapter: what it writes, says and leaves alone."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tether
from attacks.forge import WEIGHTS
from residual_files import SHAPES, Files, files, same, worst, written
from tether import rescue

from .conftest import invoke, succeed, succeed_json


@pytest.fixture
def made(tmp_path: Path) -> Files:
    return files(tmp_path / "in")


def options(made: Files, source: str) -> list[str]:
    return [word for name, path in made.given(source).items() for word in (f"--{name}", str(path))]


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file."""
    found = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f): (f.read_bytes(), f.stat().st_mtime_ns) for f in found}


@pytest.mark.parametrize("source", ["anchor", "residual", "base"])
def test_both_forms_from_every_source_and_no_input_is_touched(
    source: str, made: Files, tmp_path: Path
) -> None:
    before = state(made.root)
    given = options(made, source)
    said = succeed_json("convert", made.adapter, tmp_path / "plain", *given)
    succeed_json("convert", made.adapter, tmp_path / "native.safetensors", *given)
    assert state(made.root) == before
    value = tether.load(tmp_path / "native.safetensors")
    assert worst(value, made) < 1e-4
    tether.save_as_lora(value, tmp_path / "wanted")
    assert same(written(tmp_path / "plain"), written(tmp_path / "wanted"))
    assert said["written"] == said["path"] == str(tmp_path / "plain")
    assert (said["format"], said["rank"], said["dtype"]) == ("peft", 6, "float32")
    assert 0 < said["error"] < 1e-6
    found = said["rescue"]
    assert (found["source"], found["method"]) == (source, "pissa")
    assert said["sites"].keys() == found["sites"].keys() == SHAPES.keys()
    for site in found["sites"].values():
        assert site["uncertainty"] < 1e-4
        assert (site["left_over"] > 0) == (source == "residual")
        assert (site["gap"] is not None) == (source == "base")


def test_options_of_the_folder(made: Files, tmp_path: Path) -> None:
    given = options(made, "anchor")
    half = ("--dtype", "bfloat16", "--rank", "2")
    said = succeed_json("convert", made.adapter, tmp_path / "a", *given, *half)
    assert (said["rank"], said["dtype"]) == (2, "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "a" / WEIGHTS).values()} == {torch.bfloat16}
    said = succeed_json("convert", made.adapter, tmp_path / "b", *given, "--tolerance", "0.3")
    assert 2 <= said["rank"] < 6
    assert all(0 < site["error"] <= 0.3 for site in said["sites"].values())
    native = tmp_path / "c.safetensors"
    said = succeed_json("convert", made.adapter, native, *given, "--rank", "2")
    assert said["format"] == "native"
    assert not tether.load(native).anchored


@pytest.mark.parametrize(
    ("source", "columns", "sentence"),
    [
        ("anchor", (), "pissa: initial factors as saved, exact"),
        ("residual", ("left over",), "pissa: base − residual, cut to the adapter's rank; at most"),
        ("base", ("gap",), "pissa: start computed again from the base; estimated uncertainty"),
    ],
)
def test_the_table_says_what_was_found(
    source: str, columns: tuple[str, ...], sentence: str, made: Files, tmp_path: Path
) -> None:
    said = succeed("convert", made.adapter, tmp_path / "out", *options(made, source))
    for word in ("uncertainty", "relative error", *columns):
        assert word in said
    reports = {site.path: site.report for site in made.open(source).sites()}
    for path, report in reports.items():
        row = next(row for row in said.splitlines() if path in row)
        assert f"{report.change:.4g}" in row
        assert f"{report.change / report.anchor:.2%}" in row
        assert f"{report.uncertainty:.1e}" in row
    assert sentence in said
    if source == "residual":
        largest = max(reports, key=lambda path: reports[path].left_over)
        assert f"{reports[largest].left_over:.1e} of it is left over, at {largest}" in said
    if source == "base":
        largest = max(reports, key=lambda path: reports[path].uncertainty)
        assert f"least sure {largest} with {reports[largest].uncertainty:.1e}" in said
    assert "rank 6, float32, relative error of all" in said
    assert f"wrote{tmp_path / 'out'}" in "".join(said.split())


def test_files_in_different_precisions_are_said(made: Files, tmp_path: Path) -> None:
    path = made.root / "start" / WEIGHTS
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    said = succeed("convert", made.adapter, tmp_path / "out", *options(made, "anchor"))
    job = made.open("anchor")
    found = rescue.RescueReport(job.name, job.method, {s.path: s.report for s in job.sites()})
    assert f"that rounding may be {found.uncertainty:.1e} of the change" in said
    assert 1e-2 < found.uncertainty < 0.1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "without the initial factors their change cannot be told. Give the adapter"),
        (["--residual", "residual"], "give base (--base DIR) too"),
        (["--anchor", "nothing"], "nothing: there is no adapter_config.json in it"),
        (["--base", "start"], "start: holds neither model.safetensors nor"),
        (["--anchor", "start", "--rank", "0"], "rank 0 must be at least 1"),
        (["--anchor", "start", "--dtype", "bf16"], "'bf16' is not one. Nearest: 'bfloat16'"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(
    given: list[str], words: str, made: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.root)
    result = invoke("convert", "adapter", tmp_path / "out", *given)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("adapter", "is the adapter itself"),
        ("start/", "is the anchor itself"),
        ("base/new", "lies in the base model"),
        ("adapter/a.safetensors", "lies in the adapter"),
        (".", "holds the adapter"),
    ],
)
def test_an_out_that_would_change_an_input(
    out: str, words: str, made: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(made.root)
    monkeypatch.chdir(made.root)
    result = invoke("convert", "adapter", out, "--anchor", "start", "--base", "base")
    assert result.exit_code == 2
    assert words in result.stderr
    assert state(made.root) == before


def test_a_plain_folder_is_not_written_into_either(made: Files, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    succeed("convert", made.adapter, plain, *options(made, "anchor"))
    before = state(plain)
    result = invoke("convert", plain, plain / "out.safetensors")
    assert (result.exit_code, "lies in the adapter" in result.stderr) == (2, True)
    assert state(plain) == before
    succeed("convert", plain, tmp_path / "out.safetensors")
    assert worst(tether.load(tmp_path / "out.safetensors"), made) < 1e-5


def test_weights_that_are_pickles(made: Files, tmp_path: Path) -> None:
    for folder in ("adapter", "start"):
        shutil.copytree(made.root / folder, tmp_path / folder)
        tensors = load_file(tmp_path / folder / WEIGHTS)
        (tmp_path / folder / WEIGHTS).unlink()
        torch.save(tensors, tmp_path / folder / "adapter_model.bin")
    for adapter, anchor in ((tmp_path / "adapter", made.root / "start"),
                            (made.adapter, tmp_path / "start")):  # fmt: skip
        result = invoke("convert", adapter, tmp_path / "out", "--anchor", anchor)
        assert result.exit_code == 2
        assert "PickleRefusedError" in result.stderr
        assert 'python -c "import sys, torch, safetensors.torch' in result.stderr
