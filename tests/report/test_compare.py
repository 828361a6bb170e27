"""The page of a comparison: what it shows is what was measured, and names are only text."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tether import algebra, compare, fs
from tether.report import compare as pages
from tether.report.compare import page_of
from tether.report.compared import energy, measure
from tether.report.page import render
from tether.statistics import Scores
from tether.training.agreement import Agreement
from tether.training.behaviour import Behaviour
from tether.training.generate import Generation

from .conftest import Parsed, adapter, layer

PATHS = tuple(f"model.layers.{n}.{kind}" for n in range(3) for kind in ("q_proj", "mlp.up_proj"))
EVIL = '<script>alert(1)</script>&"\u202e'


def made(paths=PATHS):
    return adapter({path: layer([3.0, 2.0, 1.0]) for path in paths})


def cut(value, rank):
    layers = {path: algebra.compress(one, rank).layer for path, one in value.layers.items()}
    return replace(value, layers=layers)


def behaviour(text="so"):
    agreements = {
        None: Agreement(2.0, 0.25, 0.5, 64),
        "B": Agreement(0.5, 0.125, 0.75, 64),
    }
    sums = {None: np.array([6.0, 8.0]), "A": np.array([4.0, 6.0]), "B": np.array([5.0, 6.0])}
    texts = {None: text, "A": text + "!", "B": text + "?"}
    return Behaviour(agreements, Scores(sums, np.array([2, 2])), (Generation("then", texts),))


def compared(values, found=None):
    return measure(values, dict.fromkeys(values, 1_500_000), found)


def table(page, name):
    """The downloadable rows of a table or a figure."""
    data = json.loads(re.search(rf'id="data-{name}">(.*?)</script>', page.text)[1])
    return [dict(zip(data["columns"], row, strict=False)) for row in data["rows"]]


@pytest.fixture(scope="module")
def two():
    torch.manual_seed(0)
    one = made()
    return {"run/a": one, "run/b": cut(one, 2)}


@pytest.fixture(scope="module")
def page(two):
    return Parsed(render(page_of(compared(two, behaviour()))))


def test_the_numbers_are_those_of_the_comparison(page, two):
    found = compare(two["run/a"], two["run/b"])
    (pair,) = table(page, "pairs")
    assert pair["adapter"] == "B: run/b"
    assert pair["relative error"] == pytest.approx(found.error, rel=1e-5)
    assert pair["overlap"] == pytest.approx(1.0, abs=1e-5)
    assert pair["sites shared"] == 6
    sites = table(page, "sites")
    assert [row["site"] for row in sites] == list(PATHS)
    for row in sites:
        site = found.sites[row["site"]]
        assert row["|ΔA|"] == pytest.approx(site.norm_a, rel=1e-5)
        assert row["B: error"] == pytest.approx(site.error, rel=1e-5)
        assert row["B: rank"] == 2
    errors = table(page, "errors-b")
    assert {row["site"]: row["value"] for row in errors} == {
        path: pytest.approx(site.error, rel=1e-5) for path, site in found.sites.items()
    }
    assert "B: run/b against A: a reduction to 2 directions a site" in page.text


def test_what_fewer_ranks_and_bits_cost(page, two):
    kept = {row["adapter"]: row for row in table(page, "energies")}
    assert [kept["A"][str(k)] for k in (1, 2, 3)] == pytest.approx([9 / 14, 13 / 14, 1.0])
    assert [kept["B"][str(k)] for k in (1, 2)] == pytest.approx([9 / 13, 1.0])
    values = compared(two)
    rows = {row["name"]: row for row in table(page, "precision")}
    for letter, about in values.adapters.items():
        for form, loss in about.losses.items():
            assert rows[f"{letter}: {about.name}"][form] == pytest.approx(
                100 * loss.error, rel=1e-5
            )


def test_energy_is_of_all_sites_cut_to_one_rank():
    torch.manual_seed(0)
    value = adapter({"u": layer([4.0, 1.0]), "v": layer([2.0, 2.0, 1.0])})
    assert energy(value) == pytest.approx([20 / 26, 25 / 26, 1.0])
    for rank, share in enumerate(energy(value)[:2], start=1):
        assert compare(value, cut(value, rank)).error ** 2 == pytest.approx(1 - share)


def test_losses_logits_and_texts_stand_side_by_side(page):
    base, a, b = table(page, "base")
    assert [row["adapter"] for row in (base, a, b)] == ["base alone", "A: run/a", "B: run/b"]
    assert [row["loss"] for row in (base, a, b)] == [3.5, 2.5, 2.75]
    assert (base["minus A"], a["minus A"], b["minus A"]) == (1.0, None, 0.25)
    assert (b["max |Δlogit|"], b["KL, nats"], b["same first choice"]) == (0.5, 0.125, 0.75)
    facts = {
        page.words(d): page.words(e) for d, e in zip(page.all("dt"), page.all("dd"), strict=True)
    }
    assert facts == {"base alone": "“so”", "A: run/a": "“so!”", "B: run/b": "“so?”"}


def test_without_a_base_there_is_no_word_of_it(two):
    page = Parsed(render(page_of(compared(two))))
    headings = [page.words(h) for h in page.all("h2")]
    assert "On the base" not in headings
    assert "Texts" not in headings


def test_names_are_only_text():
    torch.manual_seed(0)
    one = made((f"layers.0.{EVIL}", "layers.1.b"))
    values = {f"a{EVIL}": one, f"b{EVIL}": adapter({f"layers.0.{EVIL}": layer([1.0])})}
    page = Parsed(render(page_of(compared(values, behaviour(EVIL)))))
    scripts = page.all("script")
    assert [s.get("type") for s in scripts[:-1]] == ["application/json"] * (len(scripts) - 1)
    assert scripts[-1].get("type") is None
    assert "<script>alert" not in page.text
    assert "\u202e" not in page.text
    assert page.text.count("&lt;script&gt;alert(1)") > 5


def test_sites_that_only_one_has_are_named():
    torch.manual_seed(0)
    one = made()
    values = {"a": one, "b": adapter({path: one.layers[path] for path in PATHS[1:]})}
    text = Parsed(render(page_of(compared(values)))).text
    assert f"Only in A: a: {PATHS[0]}." in text
    values = {"a": made(PATHS[:1]), "b": made(PATHS[1:])}
    page = Parsed(render(page_of(compared(values))))
    assert {row["B: error"] for row in table(page, "sites")} == {1.0, None}


def test_equal_adapters_and_those_at_their_start_have_pages():
    torch.manual_seed(0)
    one = made()
    page = Parsed(render(page_of(compared({"a": one, "b": one}))))
    assert "B: b is A at every site, but for rounding." in page.text
    assert not [f for f in page.all("figure") if f.get("id") == "errors-b"]
    still = adapter({path: layer([0.0]) for path in PATHS})
    page = Parsed(render(page_of(compared({"a": still, "b": still}))))
    assert "nothing has changed" in page.text
    page = Parsed(render(page_of(compared({"a": still, "b": one}))))
    assert "B: b shares no changed site with A." in page.text


def test_eight_adapters_have_a_page():
    torch.manual_seed(0)
    values = {f"n{n}": made(PATHS[:2]) for n in range(8)}
    page = Parsed(render(page_of(compared(values))))
    assert [row["adapter"] for row in table(page, "energies")] == list("ABCDEFGH")


def test_a_page_is_written_whole_or_not_at_all(two, tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("old", "utf-8")

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(fs.os, "replace", fail)
        with pytest.raises(RuntimeError, match="stop"):
            pages.write(compared(two), target)
    assert target.read_text("utf-8") == "old"
    assert pages.write(compared(two), target) == target
    assert target.read_text("utf-8").startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
