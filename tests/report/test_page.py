"""Pages: valid, self-contained, escaped, and readable in any light."""

import base64
import hashlib
import json
import re
from itertools import pairwise

import pytest

from tether.errors import ConfigError, MissingExtraError
from tether.report import figures
from tether.report.figures import Data, Figure, drawing
from tether.report.page import (
    Cell,
    Facts,
    Page,
    Section,
    Table,
    Text,
    _resource,
    embedded,
    render,
)
from tether.report.run import page_of
from tether.report.values import DriftPoint, RunValues, site_stats

from .conftest import Parsed, adapter, layer, parsed

EVIL = "<script>alert(1)</script>\"'&{{ 7*7 }}$x$"
ADDRESS = re.compile(r"(?i:https?:|@import|\bsrc\s*=)|//\w|url\((?!#)")


def evil_run() -> RunValues:
    """A run in which every name and every text is hostile."""
    sites = site_stats(adapter({f"{EVIL}.{i}.{EVIL}": layer([4.0, 1.0]) for i in range(3)}))
    return RunValues(
        name=EVIL,
        facts={EVIL: EVIL},
        curves={"training loss": ((1, 2.0), (2, 1.0)), "held-out loss": ((0, 2.5), (2, 1.5))},
        drift=(DriftPoint(0, 0.0, 0.0), DriftPoint(1, 0.1, 1.5), DriftPoint(2, 0.2, 2.0)),
        sites=tuple(sites),
        sizes={EVIL: 1000},
        notes=(EVIL,),
    )


@pytest.fixture(scope="module")
def page() -> Parsed:
    return parsed(page_of(evil_run()))


def part(name: str, **changes: object) -> Table:
    return Table(
        **{"name": name, "title": "T", "caption": "", "columns": ("a",), "rows": ()} | changes
    )


def test_hostile_names_are_text_and_nothing_else(page):
    scripts = page.all("script")
    own = [script for script in scripts if script.get("type") is None]
    assert [page.words(script) for script in own] == [_resource("page.js")]
    assert all(script.get("type") == "application/json" for script in scripts if script not in own)
    assert not page.svg("script")
    assert EVIL in page.words(page.all("h1")[0])
    assert EVIL in [page.words(element) for element in page.all("dd")]
    assert f"{EVIL}.0.{EVIL}" in [page.words(element) for element in page.all("option")]
    assert any(title.text.startswith(f"{EVIL}.0.{EVIL}: ") for title in page.svg("title"))
    assert "49" not in page.words(page.all("h1")[0])


def test_the_policy_allows_this_style_and_this_script_alone(page):
    (meta,) = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in meta.get("content").split("; "))
    (style,) = page.all("style")
    (script,) = [s for s in page.all("script") if s.get("type") is None]

    def digest(element):
        sha = hashlib.sha256(page.words(element).encode()).digest()
        return f"'sha256-{base64.b64encode(sha).decode()}'"

    assert rules == {
        "default-src": "'none'",
        "style-src": digest(style),
        "script-src": digest(script),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # Before anything that it must hold for.
    head = list(page.all("head")[0])
    assert head.index(meta) < head.index(style)


def test_nothing_in_it_needs_what_the_policy_refuses(page):
    for element in page.root.iter():
        for name in element.attrib:
            assert not name.startswith("on")
            assert name not in ("style", "src", "srcset", "action")
        target = element.get("href")
        assert target is None or target.startswith("#")


def test_no_address_is_outside_the_page(page):
    visible = page.text.replace(EVIL, "")
    assert not ADDRESS.search(visible)
    assert "xmlns" not in visible


def test_ids_are_single_and_what_refers_to_them_finds_them(page):
    ids = [e.get("id") for e in page.root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page.text))
    for element in page.root.iter():
        for name in ("aria-labelledby", "aria-describedby"):
            wanted.update(element.get(name, "").split())
    assert wanted <= set(ids)


def test_every_figure_has_title_alt_and_data(page):
    found = page.all("figure")
    # loss, drift, its rank, two heatmaps, spectra, energy, sizes
    assert len(found) == 8
    for figure in found:
        name = figure.get("id")
        texts = {e.get("id"): page.words(e).strip() for e in figure.iter() if e.get("id")}
        assert texts[f"{name}-title"]
        assert texts[f"{name}-alt"]
        (picture,) = [e for e in figure.iter() if e.get("role") == "img"]
        assert picture.get("aria-labelledby") == f"{name}-title {name}-alt"
        data = json.loads(texts[f"data-{name}"])
        assert data["rows"]
        assert all(len(row) <= len(data["columns"]) for row in data["rows"])
        buttons = [e for e in figure.iter() if e.get("data-of") == name]
        assert [button.get("data-download") for button in buttons] == ["csv", "json"]
        assert all(texts[f"{name}-title"] in button.get("aria-label") for button in buttons)


def test_a_reader_by_keyboard_or_ear_finds_the_way(page):
    (html,) = page.all("html")
    assert html.get("lang") == "en"
    assert page.words(page.all("title")[0])
    levels = [int(e.tag[-1]) for e in page.root.iter() if re.search(r"}h[1-6]$", str(e.tag))]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    for element in page.all("div"):
        if "scroll" in element.get("class", "").split():
            assert element.get("tabindex") == "0"
            assert element.get("aria-labelledby")
    assert all(select.get("aria-label") for select in page.all("select"))
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert all(button.get("type") == "button" for button in page.all("button"))


def test_choices_begin_with_the_chosen_site(page):
    for select in page.all("select"):
        chosen = [option for option in select if option.get("selected") is not None]
        assert len(chosen) == 1
        figure = next(f for f in page.all("figure") if select in list(f.iter()))
        curves = [e for e in figure.iter() if e.get("data-choice")]
        shown = {e.get("data-choice") for e in curves if e.get("class") != "off"}
        assert shown == {chosen[0].get("value")}


def test_rows_of_the_table_lead_to_their_site(page):
    (table,) = page.all("table")
    links = [e for e in table.iter() if e.get("data-opens")]
    assert [link.get("data-opens") for link in links] == ["0", "1", "2"]
    assert {link.get("href") for link in links} == {"#spectra"}
    options = [page.words(option) for option in page.all("select")[0]]
    assert [page.words(link) for link in links] == options


def test_a_table_sorts_by_value_not_by_what_is_shown():
    rows = ((Cell.word("x"), Cell.number(0.5, ".0%")), (Cell.word("y"), Cell.number(None)))
    table = part("t", columns=("name", "share"), rows=rows)
    page = parsed(Page("p", (), (Section("s", (table,)),)))
    cells = [(page.words(td), td.get("data-value"), td.get("class")) for td in page.all("td")]
    assert cells == [("50%", "0.5", "number"), ("–", "", "number")]
    assert [th.get("class") for th in page.all("th")][:2] == ["", "number"]
    assert table.data == Data(("name", "share"), (("x", 0.5), ("y", None)))


def test_other_parts_and_empty_sections():
    page = parsed(
        Page(
            "p",
            ("One.", "Two."),
            (
                Section("first", (Text(EVIL), Facts({"name": EVIL}))),
                Section("empty", ()),
            ),
            foot="The end.",
        )
    )
    words = page.words(page.root)
    assert words.count(EVIL) == 2
    assert "The end." in words
    assert [page.words(h) for h in page.all("h2")] == ["first"]


def test_the_same_values_give_the_same_page():
    def make():
        return render(page_of(run))

    run = evil_run()
    assert make() == make()


@pytest.mark.parametrize("name", ["", "A", "1a", "a b", "a<", "a\n"])
def test_names_of_parts_are_names(name):
    with pytest.raises(ConfigError, match="a-z, 0-9"):
        render(Page("p", (), (Section("s", (part(name),)),)))


def test_names_of_parts_are_single():
    with pytest.raises(ConfigError, match="two parts of the page are named 'a'"):
        render(Page("p", (), (Section("s", (part("a"),)), Section("t", (part("a"),)))))


def test_data_cannot_end_its_element():
    text = embedded(Data(("</script>",), (("<!--<script>&", None, 1.5),)))
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"columns": ["</script>"], "rows": [["<!--<script>&", None, 1.5]]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded(Data(("a",), ((float("nan"),),)))


def test_without_the_libraries_there_is_no_page_but_a_word(monkeypatch):
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'matplotlib'.*'\.\[report\]'"):
        render(Page("p", (), ()))


def colors(query: str | None) -> dict[str, str]:
    """The colours of the page in one light."""
    style = _resource("page.css")
    start = style.index(f"@media {query}") if query else 0
    block = style[style.index(":root", start) : style.index("}", style.index(":root", start))]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("query", [None, "(prefers-color-scheme: dark)", "print"])
def test_text_and_lines_stand_out(query):
    found = colors(query)
    assert found.keys() == colors(None).keys()
    for name, color in found.items():
        least = {"back": 0, "sheet": 0, "line": 0, "ink": 7, "soft": 4.5, "link": 4.5}.get(name, 3)
        for ground in ("back", "sheet"):
            assert contrast(color, found[ground]) >= least, (name, ground)


def test_every_colour_of_a_picture_has_a_value(page):
    used = set()
    for element in page.root.iter():
        if element.get("class") and "svg" in str(element.tag):
            used.update(element.get("class").split())
    used -= {"plot", "off"}
    assert used
    style = _resource("page.css")
    for name in used:
        kind, color = name.split("-")
        assert f".{name} {{ {'fill' if kind == 'f' else 'stroke'}: var(--{color}); }}" in style
    # No other colour is left in the pictures.
    paints = {e.get(a) for e in page.root.iter() for a in ("fill", "stroke")} - {None}
    assert paints == {"none"}


def test_a_picture_alone_is_a_figure_of_any_page():
    figure = figures.bars("m", "M", "How.", ["x"], {"a": [1.0]})
    assert isinstance(figure, Figure)
    page = parsed(Page("p", (), (Section("s", (figure,)),)))
    assert [f.get("id") for f in page.all("figure")] == ["m"]
