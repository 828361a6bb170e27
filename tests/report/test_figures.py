"""Pictures: what is drawn has the values, as hover texts, and as data."""

import json
import re
import warnings
from itertools import pairwise

import pytest

from tether.report import figures
from tether.report.figures import Cell, Data, Figure
from tether.report.page import Page, Section
from tether.report.values import site_stats

from .conftest import SVG, adapter, layer, parsed


def page_with(*parts: Figure):
    return parsed(Page("title", (), (Section("section", parts),)))


def titles(figure: Figure) -> list[str]:
    return [title.text for title in page_with(figure).svg("title")]


def test_curves_tell_every_point_and_keep_all_data():
    points = [(step, 1 / step) for step in range(1, 6)]
    figure = figures.curves("loss", "Loss", "How.", {"a": points, "b": [(2, 7.5)]}, unit=" s")
    told = titles(figure)
    assert told[0] == "a"
    assert [text for text in told if text.startswith("a, ")] == [
        f"a, step {x}: {y:.5g} s" for x, y in points
    ]
    assert "b, step 2: 7.5 s" in told
    assert figure.data == Data(
        ("series", "step", "value"),
        (*(("a", x, float(f"{y:.6g}")) for x, y in points), ("b", 2, 7.5)),
    )
    assert figure.alt.startswith("a: 1 s at step 1, 0.2 s at step 5, lowest 0.2 s.")


def test_a_long_curve_is_thinned_but_its_data_is_whole():
    points = [(step, float(step)) for step in range(5000)]
    figure = figures.curves("loss", "Loss", "How.", {"a": points})
    told = titles(figure)
    assert len(told) == 401
    assert (told[1], told[-1]) == ("a, step 0: 0", "a, step 4999: 4999")
    assert len(figure.data.rows) == 5000


def test_a_logarithmic_curve_leaves_out_zeros():
    figure = figures.curves("x", "X", "How.", {"a": [(0, 0.0), (1, 1e-5), (2, 1.0)]}, log=True)
    assert titles(figure) == ["a", "a, step 1: 1e-05", "a, step 2: 1"]
    text = " ".join(page_with(figure).words(e) for e in page_with(figure).svg("text"))
    assert "10⁻⁵" in text
    assert "$" not in text


def test_there_are_no_half_steps_and_the_highest_dot_has_room():
    flat = [(1, 2.0), (2, 2.0), (3, 1.99)]
    page = page_with(figures.curves("x", "X", "How.", {"a": flat}, zero=True))
    words = [page.words(e) for e in page.svg("text")]
    assert words[: words.index("step")] == ["1", "2", "3"]
    paths = [[float(n) for n in re.findall(r"[\d.]+", p.get("d"))] for p in page.svg("path")]
    frame = next(path for path in paths if len(path) >= 6 and path[0] > 20)  # of the axes
    curve = next(path for path in paths if len(path) == 6 and path[1] == path[3])
    assert min(curve[1::2]) > min(frame[1::2]) + 5


def test_bars_have_their_values_and_lengths():
    figure = figures.bars("m", "Memory", "How.", ["x", "y"], {"a": [1, 2], "b": [4, 0]}, unit=" MB")
    assert titles(figure) == [
        "x, a: 1 MB",
        "y, a: 2 MB",
        "x, b: 4 MB",
        "y, b: 0 MB",
    ]
    widths = []
    for group in page_with(figure).svg("g"):
        if any(child.tag == f"{SVG}title" for child in group):
            numbers = [float(n) for n in group.find(f"{SVG}path").get("d").split()[1::3]]
            widths.append(max(numbers) - min(numbers))
    assert widths[1] / widths[0] == pytest.approx(2, rel=1e-4)
    assert widths[2] / widths[0] == pytest.approx(4, rel=1e-4)
    assert widths[3] == 0
    assert figure.data == Data(("name", "a", "b"), (("x", 1, 4), ("y", 2, 0)))
    assert figure.alt == "a: largest 2 MB (y). b: largest 4 MB (x)."


def test_more_than_forty_bars_are_told_of():
    names = [f"n{i}" for i in range(50)]
    figure = figures.bars("m", "M", "How.", names, {"a": list(range(50))})
    assert len(titles(figure)) == 40
    assert figure.caption.endswith("10 more are in the data.")
    assert len(figure.data.rows) == 50


def test_a_heatmap_shades_by_value():
    cells = [
        Cell("r", "0", 1.0, "one", 5),
        Cell("r", "1", 0.5, "half", 6),
        Cell("s", "0", 0.0, "none"),
        Cell("s", "1", None, "unknown"),
    ]
    figure = figures.heatmap("h", "H", "How.", cells, lambda value: f"{value:.1f}")
    page = page_with(figure)
    marks = {
        m.find(f"{SVG}title").text: m for m in page.svg("g") if m.find(f"{SVG}title") is not None
    }
    assert list(marks) == ["one: 1.0", "half: 0.5", "none: 0.0", "unknown: not known"]
    assert [m.get("data-opens") for m in marks.values()] == ["5", "6", None, None]
    shade = [float(m.find(f"{SVG}path").get("opacity", 1)) for m in marks.values()]
    assert shade[:3] == pytest.approx([1.0, 0.53, 0.06])
    assert marks["unknown: not known"].find(f"{SVG}path").get("fill") == "none"
    assert figure.data.rows == (("one", 1), ("half", 0.5), ("none", 0), ("unknown", None))
    assert figure.alt == "2 kinds of sites by 2 layers. From 0.0 to 1.0 (one)."


def test_layers_are_in_the_order_of_numbers():
    sites = site_stats(
        adapter({f"layers.{i}.up": layer([1.0]) for i in (10, 2, 1)} | {"head": layer([2.0])})
    )
    figure = figures.site_heatmap("h", "H", "How.", sites, lambda s: s.norm, str)
    assert [row[0] for row in figure.data.rows] == [
        "layers.1.up",
        "layers.2.up",
        "layers.10.up",
        "head",
    ]
    page = page_with(figure)
    opens = [m.get("data-opens") for m in page.svg("g") if m.get("data-opens")]
    assert opens == ["2", "1", "0", "3"]


def test_one_site_is_shown_and_all_are_there():
    sites = site_stats(
        adapter({"a": layer([4.0, 1.0]), "b": layer([3.0, 2.0, 1e-12]), "c": layer([0.0])})
    )
    for make in (figures.spectra, figures.energy_by_rank):
        figure = make(sites, ["a", "b", "c"], 1)
        groups = [g for g in page_with(figure).svg("g") if g.get("data-choice")]
        assert [(g.get("data-choice"), g.get("class")) for g in groups] == [
            ("0", "off"),
            ("1", None),
        ]
        assert (figure.choices, figure.chosen) == (("a", "b", "c"), 1)
    told = titles(figures.spectra(sites, ["a", "b", "c"], 0))
    # Below 1e-7 of the largest there is only rounding.
    assert told == ["ΔW", "ΔW, σ1 = 4", "ΔW, σ2 = 1", "ΔW", "ΔW, σ1 = 3", "ΔW, σ2 = 2"]


def test_energy_says_which_ranks_are_needed():
    sites = site_stats(adapter({"a": layer([3.0, 1.0]), "b": layer([3.0, 1.0])}))
    figure = figures.energy_by_rank(sites, ["a", "b"], 0)
    assert figure.alt == (
        "Mean of all sites: rank 1 holds 90.0%; rank 2 holds 99.0%; rank 2 holds 99.9%."
    )
    assert figure.data.rows == (("a", 0.9, 1.0), ("b", 0.9, 1.0))
    assert "rank 1: 90.00%" in titles(figure)


def test_curves_lie_where_the_axes_say():
    sites = site_stats(adapter({"a": layer([4.0, 2.0, 1.0, 0.5])}))
    page = page_with(figures.spectra(sites, ["a"], 0))
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in page.svg("circle")]
    steps = [(x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in pairwise(places)]
    # Halves are equally far apart on a logarithmic axis, downwards; places are rounded to 0.1.
    assert [y for _, y in steps] == pytest.approx([steps[0][1]] * 3, abs=0.11)
    assert steps[0][1] > 10
    assert steps[0][0] == pytest.approx(steps[1][0] + steps[2][0], abs=25)
    assert steps[0][0] > steps[1][0] > steps[2][0] > 0


def test_the_same_values_give_the_same_bytes():
    def make():
        sites = site_stats(adapter({"a": layer([4.0, 1.0])}))
        return figures.energy_by_rank(sites[:1], ["a"], 0).svg

    assert make() == make()


@pytest.mark.parametrize("name", ["$\\frac{$", "日本語", "\ud800\x00\x1b", "a\u202eb", "<b>&amp;"])
def test_names_are_drawn_as_they_are(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.bars("m", "M", "How.", [name], {"a": [1.0]})
    shown = "".join("�" if c in "\ud800\x00\x1b\u202e" else c for c in name)
    page = page_with(figure)
    assert shown in [page.words(text) for text in page.svg("text")]
    assert titles(figure) == [f"{shown}, a: 1"]
    embedded = [s for s in page.all("script") if s.get("type") == "application/json"]
    assert json.loads(page.words(embedded[0]))["rows"] == [[name, 1]]


def test_settings_of_matplotlib_stay_as_they_were():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figures.bars("m", "M", "How.", ["x"], {"a": [1.0]})
    assert dict(mpl.rcParams) == before
