"""`tether compare`: it says what the library measures, and writes nothing but a page."""

import html
import json
import shutil

import html5lib
import pytest
import torch

import tether
from tether import algebra, precision
from tether.integrations import hub
from tether.report.figures import drawing
from tether.training.data import load
from tether.training.evaluate import evaluate
from tiny_model import make_tokenizer

from .conftest import SHORT, contents, invoke, succeed, succeed_json


@pytest.fixture(scope="module")
def runs(finished, model_folder, text_file, tmp_path_factory):
    """A native adapter, its LoRA, a smaller one, one in bfloat16, and another run of the base."""
    folder = tmp_path_factory.mktemp("compare")
    shutil.copy(finished[0] / "adapter.safetensors", folder / "a.safetensors")
    shutil.copytree(finished[0] / "lora", folder / "lora")
    one = tether.load(folder / "a.safetensors")
    tether.save_as_lora(one, folder / "small", rank=2)
    tether.save_as_lora(one, folder / "half", dtype=torch.bfloat16)
    options = ("--data", text_file, "--out", folder / "run", "--steps", "3", "--seed", "1", *SHORT)
    succeed("train", model_folder, *options)
    return folder


def test_it_says_what_the_library_measures(runs):
    names = ["a.safetensors", "lora", "small", "run/adapter.safetensors"]
    paths = [runs / name for name in names]
    before = contents(runs)
    said = succeed_json("compare", *paths)
    values = [tether.load(path) for path in paths]
    assert [one["path"] for one in said["adapters"].values()] == list(map(str, paths))
    assert [one["name"] for one in said["adapters"].values()] == [
        "a.safetensors", "lora", "small", "adapter.safetensors"
    ]  # fmt: skip
    for letter, value in zip("ABCD", values, strict=True):
        one = said["adapters"][letter]
        losses = precision.losses(value)
        assert one["losses"].keys() == losses.keys()
        for form, loss in losses.items():
            assert one["losses"][form] == {"error": loss.error, "worst": max(loss.sites.values())}
        assert one["sites"] == len(value.layers)
    assert said["adapters"]["A"]["bytes"] == paths[0].stat().st_size
    assert list(said["pairs"]) == ["B", "C", "D"]
    for letter, value in zip("BCD", values[1:], strict=True):
        wanted = json.loads(json.dumps(tether.compare(values[0], value).to_dict()))
        assert said["pairs"][letter] == wanted
    verdicts = [pair["verdict"] for pair in said["pairs"].values()]
    assert verdicts[0].startswith("the same within float32 rounding: ")
    assert verdicts[1].startswith("a reduction to 2 directions a site")
    assert verdicts[2].startswith("different: ")
    # Native files alone remember their base.
    assert said["fingerprints_checked"] == len(values[0].layers)
    assert (said["base"], said["written"]) == (None, None)
    assert contents(runs) == before


def test_the_words_for_a_person(runs):
    said = succeed("compare", runs / "a.safetensors", runs / "half")
    assert "B against A: the same up to bfloat16 rounding: relative error " in said
    found = tether.compare(tether.load(runs / "a.safetensors"), tether.load(runs / "half"))
    (row,) = (line for line in said.splitlines() if "B – A" in line)
    for number in (f"{found.error:.2e}", f"{found.cosine:.6f}", f"{found.overlap:.4f}"):
        assert number in row
    assert found.worst in row


def test_sites_that_only_one_has_are_named(runs, tmp_path):
    value = tether.load(runs / "a.safetensors")
    paths = list(value.layers)
    part = tether.Adapter({p: value.layers[p] for p in paths[5:]}, value.provenance)
    tether.save(part, tmp_path / "part.safetensors")
    said = succeed("compare", runs / "a.safetensors", tmp_path / "part.safetensors")
    assert f"only in A: {', '.join(paths[:3])} and 2 more" in said
    back = succeed("compare", tmp_path / "part.safetensors", runs / "a.safetensors")
    assert f"only in B: {paths[0]}" in back
    assert "5 only in the second" in back


def test_on_a_base_it_measures_losses_logits_and_texts(runs, model_folder, text_file):
    options = ("--base", model_folder, "--data", text_file, "--block", "16", "--limit", "5")
    before = contents(runs), contents(model_folder)
    paths = (runs / "a.safetensors", runs / "lora", runs / "run/lora")
    found = succeed_json("compare", *paths, *options, "--generate", "4")["base"]
    assert (contents(runs), contents(model_folder)) == before
    models = found["models"]
    assert list(models) == ["base", "A", "B", "C"]
    assert found["sequences"] == 5
    tokenizer = make_tokenizer()
    data = load(str(text_file), tokenizer, 16)
    for name, path in zip("ABC", paths, strict=True):
        model = hub.load_model(str(model_folder), torch.float32, "cpu")
        tether.attach(model, tether.load(path), trainable=False)
        assert models[name]["loss"] == pytest.approx(evaluate(model, data, 4, 5).loss, abs=1e-6)
    assert models["C"]["minus_a"]["value"] == pytest.approx(
        models["C"]["loss"] - models["A"]["loss"], abs=1e-9
    )
    # What was exported is the same; another run is not.
    assert models["B"]["logits"]["largest"] < 1e-4 < models["C"]["logits"]["largest"]
    assert models["B"]["logits"]["same"] == 1.0
    assert models["B"]["logits"]["divergence"] < 1e-8 < models["C"]["logits"]["divergence"]
    assert len(found["texts"]) == 3
    for each in found["texts"]:
        assert list(each["texts"]) == ["base", "A", "B", "C"]
        assert each["texts"]["A"] == each["texts"]["B"]
    said = succeed("compare", *paths, *options, "--prompt", "9 green\x1b[31m", "--generate", "2")
    assert "after '9 green\\x1b[31m':" in said
    assert "\x1b" not in said


def test_a_page_has_all_of_it(runs, model_folder, text_file, tmp_path):
    evil = tmp_path / "<script>alert(1)"
    shutil.copytree(runs / "small", evil)
    page = tmp_path / "page.html"
    options = ("--base", model_folder, "--data", text_file, "--block", "16", "--limit", "3")
    said = succeed_json(
        "compare", runs / "a.safetensors", evil, *options,
        "--prompt", "<b>9 green", "--generate", "2", "--out", page,
    )  # fmt: skip
    assert said["written"] == str(page)
    text = page.read_text("utf-8")
    root = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)
    assert [f.get("id") for f in root.iter("figure")] == ["errors-b", "energies", "precision"]
    assert [d.get("id") for d in root.iter("div") if d.get("class") == "wide"] == [
        "adapters", "pairs", "base", "sites"
    ]  # fmt: skip
    assert "<script>alert(1)" not in text
    assert "<b>" not in text
    assert html.escape(said["pairs"]["B"]["verdict"], quote=False) in text
    words = succeed("compare", runs / "a.safetensors", runs / "lora", "--out", page)
    assert f"wrote {page} (" in words


def test_other_bases_are_refused_unless_insisted(
    runs, model_folder, text_file, tiny_llama, tmp_path
):
    model = tiny_llama(vocab_size=282)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    other = tether.init(model, tether.LoraConfig(rank=2))
    first = next(iter(other.layers))
    tether.save(other, tmp_path / "other.safetensors")
    pair = (runs / "a.safetensors", tmp_path / "other.safetensors")
    result = invoke("compare", *pair)
    assert result.exit_code == 2
    assert f"BaseMismatchError: site '{first}': a.safetensors was made on" in result.stderr
    assert "--no-verify" in result.stderr
    succeed("compare", *pair, "--no-verify")
    # The one that is second in order is checked against the third too.
    result = invoke("compare", runs / "lora", *pair)
    assert "a.safetensors was made on" in result.stderr
    # And the base that they run on is checked.
    options = ("--data", text_file, "--block", "16", "--limit", "2", "--generate", "0")
    pair = (runs / "a.safetensors", runs / "lora", "--base", tmp_path / "base", *options)
    result = invoke("compare", *pair)
    assert "BaseMismatchError" in result.stderr
    assert "the base weight here" in result.stderr
    succeed("compare", *pair, "--no-verify")


def test_names_are_as_short_as_they_can_be(runs, tmp_path):
    one, two = tmp_path / "x/lora", tmp_path / "y/lora"
    for path in (one, two):
        shutil.copytree(runs / "small", path)
    said = succeed_json("compare", one, two, runs / "a.safetensors", one)
    assert [each["name"] for each in said["adapters"].values()] == [
        "x/lora", "y/lora", "a.safetensors", "x/lora (2)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{runs}/lora"], "1 adapters: give two to 8."),
        (["{runs}/lora"] * 9, "9 adapters: give two to 8."),
        (["{runs}/lora", "{runs}/none"], "{runs}/none"),
        (["{runs}/lora", "{runs}/lora", "--data", "x.txt"], "--data needs a model"),
        (["{runs}/lora", "{runs}/lora", "--prompt", "x"], "--prompt needs a model"),
        (["{runs}/lora", "{runs}/lora", "--base", "{base}", "--limit", "0"], "--limit 0 must be"),
        (
            ["{runs}/lora", "{runs}/lora", "--base", "{base}", "--generate", "-1"],
            "--generate -1",
        ),
        (
            ["{runs}/lora", "{runs}/lora", "--base", "{base}", "--prompt", "x", "--generate", "0"],
            "leave one out",
        ),
        (["{runs}/lora", "{runs}/lora", "--base", "{runs}/none"], "no such folder"),
        (["{runs}/lora", "{runs}/small", "--out", "{runs}/small"], "adapter that is only read"),
        (["{runs}/lora", "{runs}/small", "--out", "{runs}/small/page.html"], "only read"),
        (["{runs}/lora", "{runs}/small", "--out", "{runs}/run"], "is a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_written(arguments, words, runs, model_folder):
    before = contents(runs)
    places = {"runs": runs, "base": model_folder}
    result = invoke("compare", *(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert words.format(**places) in " ".join(result.stderr.split())
    assert result.stderr.count("error: ") == 1
    assert contents(runs) == before


def test_other_models_and_damaged_files_are_refused_by_name(runs, tmp_path):
    value = tether.load(runs / "a.safetensors")
    path, one = next(iter(value.layers.items()))
    layout = tether.Layout("linear", (4, 3))
    factors = tether.Factors(torch.ones(1, 3), torch.ones(4, 1))
    other = {path: tether.LayerAdapter(factors, None, one.scaling, layout)}
    tether.save(tether.Adapter(other, tether.Provenance("lora")), tmp_path / "b.safetensors")
    result = invoke("compare", runs / "a.safetensors", tmp_path / "b.safetensors")
    assert f"ShapeMismatchError: site '{path}'" in result.stderr
    (tmp_path / "c.safetensors").write_bytes(b"\x08" + bytes(30))
    result = invoke("compare", runs / "a.safetensors", tmp_path / "c.safetensors")
    assert result.exit_code == 2
    assert "c.safetensors" in result.stderr


def test_without_the_extra_only_the_page_is_missing(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    pair = (runs / "a.safetensors", runs / "lora")
    # Said at once, not after the work: the base that is not there is not looked for.
    options = ("--base", tmp_path / "none", "--out", tmp_path / "page.html")
    result = invoke("compare", *pair, *options)
    assert result.exit_code == 2
    assert "MissingExtraError" in result.stderr
    assert "pip install '.[report]'" in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert "the same within float32 rounding" in succeed("compare", *pair)


def test_an_adapter_at_its_start_is_compared(runs, model_folder, tmp_path):
    zero = {p: algebra.compress(one).layer for p, one in tether.load(runs / "small").layers.items()}
    for one in zero.values():
        one.trainable.B.zero_()
    tether.save(tether.Adapter(zero, tether.Provenance("lora")), tmp_path / "zero.safetensors")
    for pair in (("zero.safetensors", runs / "small"), (runs / "small", "zero.safetensors")):
        paths = [tmp_path / path for path in pair]
        assert "different: " in succeed("compare", *paths, "--out", tmp_path / "page.html")
        said = succeed_json("compare", *paths)
        assert said["pairs"]["B"]["cosine"] is None
