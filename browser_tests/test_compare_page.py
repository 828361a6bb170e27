"""The page of a comparison in a real browser."""

import pytest
import torch

from report.conftest import adapter, layer
from tether.report.compare import page_of
from tether.report.compared import measure
from tether.report.page import Page

EVIL = "<script>alert(1)</script>\"'&{{ 7*7 }}"


def comparison(name: str = "b", site: str = "layers") -> Page:
    """Two adapters of two sites, which differ in the second."""
    torch.manual_seed(0)
    same = layer([2.0, 1.0])
    one = adapter({f"{site}.0.q": same, f"{site}.1.q": layer([1.0])})
    other = adapter({f"{site}.0.q": same, f"{site}.1.q": layer([3.0])})
    return page_of(measure({"a": one, name: other}, {"a": 1000, name: 2000}))


@pytest.mark.parametrize("width", [390, 1200])
def test_it_opens_without_an_error_or_a_request_and_fits(browser, width):
    browser.open(comparison(), width)
    assert browser.log("browser") == []
    requests = browser.requests()
    assert [url for url in requests[1:] if not url.startswith(("data:", "blob:"))] == []
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_it_says_where_they_differ(browser):
    browser.open(comparison())
    assert any("different" in text for text in browser.texts("header p"))
    rows = browser.texts("section:last-of-type tbody tr")
    same, moved = (next(row for row in rows if f"layers.{n}.q" in row) for n in (0, 1))
    assert "1.0000" in same
    assert same != moved
    titles = browser.texts("figure svg title")
    assert any(title.startswith("layers.1.q") for title in titles)


def test_hostile_names_are_shown_and_do_nothing(browser):
    browser.open(comparison(EVIL, EVIL))
    assert browser.log("browser") == []
    assert EVIL in browser.texts("h1")[0]
    assert any(text.startswith(EVIL) for text in browser.texts("tbody th"))
