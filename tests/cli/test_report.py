"""`tether report`: the page of a run, and the one that `tether train` leaves."""

import json
import re
import shutil

import html5lib
import pytest

from tether.report.figures import drawing

from .conftest import SHORT, contents, invoke, succeed, succeed_json


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def figure_names(path):
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    return [figure.get("id") for figure in parser.parse(path.read_text("utf-8")).iter("figure")]


OWN = ["loss", "drift", "learning-rate", "gradient-norm", "time", "change", "effective-rank"]


def test_training_leaves_a_page(finished):
    out, said = finished
    assert said["written"][-1] == str(out / "report.html")
    assert figure_names(out / "report.html") == [*OWN, "spectra", "energy", "sizes"]


def test_the_page_has_the_losses_of_the_run(finished):
    out, said = finished
    text = (out / "report.html").read_text("utf-8")
    loss = json.loads(re.search(r'id="data-loss">(.*?)</script>', text)[1])
    held_out = [(step, value) for series, step, value in loss["rows"] if series == "held-out loss"]
    ends = said["held_out_loss"]
    assert held_out == [
        (0, pytest.approx(ends["base"], rel=1e-5)),
        (12, pytest.approx(ends["adapter"], rel=1e-5)),
    ]
    assert sum(series == "training loss" for series, *_ in loss["rows"]) == 12
    assert f"Held-out loss {ends['base']:.4g} at step 0, {ends['adapter']:.4g} at step 12." in text


def test_drift_is_drawn_from_the_log_of_the_run(model_folder, text_file, tmp_path):
    options = ("--data", text_file, "--out", tmp_path, "--steps", "6", "--save-every", "2", *SHORT)
    succeed("train", model_folder, *options)
    text = (tmp_path / "report.html").read_text("utf-8")
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines())
    logged = {line["step"]: line for line in lines if "drift" in line}
    drawn = {}
    for name in ("drift", "drift-rank"):
        data = json.loads(re.search(rf'id="data-{name}">(.*?)</script>', text)[1])
        drawn[name] = {step: value for _, step, value in data["rows"]}
    assert list(drawn["drift"]) == [0, 2, 4, 6]
    assert list(drawn["drift-rank"]) == [2, 4, 6]
    for step, line in logged.items():
        assert drawn["drift"][step] == pytest.approx(100 * line["drift"], rel=1e-5)
        assert drawn["drift-rank"][step] == pytest.approx(line["effective_rank"], rel=1e-5)


def test_with_a_base_the_page_has_what_its_weights_tell(run, model_folder):
    before = contents(model_folder)
    path = run / "page.html"
    said = succeed_json("report", run, "--out", path, "--base", model_folder, "--base-sites", "3")
    assert said == {"written": str(path), "bytes": path.stat().st_size}
    assert figure_names(path) == [*OWN, "spectra", "energy", "overlap", "intruders", "sizes"]
    text = path.read_text("utf-8")
    assert "Measured at 3 of 14 sites" in text
    assert text.count(", with W</option>") == 6
    assert contents(model_folder) == before


def test_the_words_at_the_end(run):
    (run / "report.html").unlink()
    before = contents(run)
    said = succeed("report", run)
    assert f"wrote {run / 'report.html'}" in said
    (run / "report.html").unlink()
    assert contents(run) == before


def test_another_base_is_refused_unless_insisted(run, model_folder, tmp_path, tiny_llama):
    tiny_llama(vocab_size=282).save_pretrained(tmp_path / "base")
    before = contents(run)
    result = invoke("report", run, "--base", tmp_path / "base")
    assert result.exit_code == 2
    assert contents(run) == before
    assert "--no-verify" in result.stderr
    succeed("report", run, "--base", tmp_path / "base", "--no-verify", "--base-sites", "1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}/lora"], "holds neither adapter.safetensors"),
        (["{run}/none"], "holds neither adapter.safetensors"),
        (["{run}", "--base-sites", "-1"], "must be a number of weights"),
        (["{run}", "--base", "{run}/lora"], "holds neither model.safetensors nor"),
        (["{run}", "--out", "{run}/lora"], "is a folder; give the name of a file"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_written(arguments, words, run):
    before = contents(run)
    result = invoke("report", *(argument.format(run=run) for argument in arguments))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert contents(run) == before


def test_without_the_extra_training_says_how_to_get_the_page(
    monkeypatch, model_folder, text_file, tmp_path
):
    out = tmp_path / "out"
    options = ("--data", text_file, "--out", out, "--steps", "1", *SHORT)
    succeed("train", model_folder, *options)
    assert (out / "report.html").exists()
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    result = invoke("train", model_folder, *options, "--overwrite")
    assert result.exit_code == 0
    assert "no page of the run: " in result.stderr
    assert "pip install '.[report]'" in result.stderr
    # Nor is there the page of the run before.
    assert not (out / "report.html").exists()
    assert "report.html" not in result.stdout
    result = invoke("report", out)
    assert result.exit_code == 2
    assert "MissingExtraError" in result.stderr
