"""The page of a training run in a real browser: what it shows, and what it does when touched."""

import csv
import io
import json

import pytest
import torch
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from report.conftest import adapter, layer
from tether.report.page import Page
from tether.report.run import page_of
from tether.report.values import DriftPoint, RunValues, site_stats

EVIL = "<script>alert(1)</script>\"'&{{ 7*7 }}"
LAYERS, KINDS = 4, ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


def run(name: str = "run", prefix: str = "model.layers") -> Page:
    """A run of twelve sites, whose changes have norms 1, 2, 3, … in the model's order."""
    torch.manual_seed(0)
    paths = [f"{prefix}.{number}.{kind}" for number in range(LAYERS) for kind in KINDS]
    layers = {path: layer([float(place + 1), 0.1]) for place, path in enumerate(paths)}
    values = RunValues(
        name=name,
        facts={"rank": "2", name: name},
        curves={"training loss": ((1, 2.0), (2, 1.0)), "held-out loss": ((0, 2.5), (2, 1.5))},
        drift=(DriftPoint(0, 0.0, 0.0), DriftPoint(1, 0.1, 1.5), DriftPoint(2, 0.2, 2.0)),
        sites=tuple(site_stats(adapter(layers))),
        sizes={"adapter.safetensors": 1000, name: 10},
    )
    return page_of(values)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_opens_without_an_error_and_asks_nobody_for_anything(browser, width, scheme):
    browser.open(run(), width, scheme)
    assert "run" in browser.driver.title
    assert [entry["message"] for entry in browser.log("browser")] == []
    requests = browser.requests()
    assert requests[0].startswith("file:///")
    # Only the page itself; what is in it comes with it.
    assert [url for url in requests[1:] if not url.startswith(("data:", "blob:"))] == []


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_is_wider_than_the_window(browser, width):
    browser.open(run(), width)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    pictures = browser.run(
        "return [...document.querySelectorAll('figure svg')].map("
        "s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height])"
    )
    assert pictures
    assert all(across > 150 and down > 50 for across, down in pictures)


def test_light_and_dark_are_what_they_say(browser):
    def brightness(scheme: str) -> tuple[float, float]:
        browser.open(run(), scheme=scheme)
        colors = browser.run(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        )
        ground, ink = (
            sum(map(float, color[color.index("(") + 1 : -1].split(",")[:3])) / 765
            for color in colors
        )
        return ground, ink

    light, dark = brightness("light"), brightness("dark")
    assert light[0] > 0.9 > 0.4 > light[1]
    assert dark[0] < 0.2 < 0.6 < dark[1]


def test_hostile_names_are_shown_and_do_nothing(browser):
    browser.open(run(EVIL, EVIL))
    assert browser.log("browser") == []
    assert EVIL in browser.texts("h1")[0]
    assert any(text.startswith(EVIL) for text in browser.texts("tbody th"))
    assert not browser.run("return [...document.scripts].some(s => s.textContent === 'alert(1)')")


def column(browser, title: str) -> list[float]:
    """The values of a column of the table of sites, from top to bottom."""
    place = next(i for i, t in enumerate(browser.texts("thead th")) if t.strip() == title)
    found: list[str] = browser.run(
        "return [...document.querySelectorAll('tbody tr')].map("
        "r => r.cells[arguments[0]].dataset.value)",
        place,
    )
    return [float(value) for value in found]


def test_the_table_sorts_by_a_column_and_back(browser):
    browser.open(run())
    title = next(t.strip() for t in browser.texts("thead th") if "ΔW" in t)
    first = column(browser, title)
    assert first == sorted(first)  # the model's order, as the run was made
    button = next(
        b
        for b in browser.driver.find_elements(By.CSS_SELECTOR, "thead button")
        if b.text.strip() == title
    )
    head = button.find_element(By.XPATH, "..")
    button.send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "descending"
    assert column(browser, title) == first[::-1]
    button.send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(browser, title) == first
    assert len(set(first)) == LAYERS * len(KINDS)


def shown(browser) -> set[str]:
    """Which of the choices are drawn, in all figures that have them."""
    found: list[str] = browser.run(
        "return [...document.querySelectorAll('[data-shows] [data-choice]')]"
        ".filter(e => getComputedStyle(e).display !== 'none').map(e => e.dataset.choice)"
    )
    return set(found)


def test_a_site_that_is_chosen_is_shown_in_every_figure_of_sites(browser):
    browser.open(run())
    selects = browser.driver.find_elements(By.CSS_SELECTOR, "select")
    assert len(selects) == 2
    selects[0].find_elements(By.TAG_NAME, "option")[7].click()
    assert shown(browser) == {"7"}
    assert [select.get_attribute("value") for select in selects] == ["7", "7"]
    link = browser.driver.find_elements(By.CSS_SELECTOR, "tbody a[data-opens]")[4]
    assert link.text == f"model.layers.1.{KINDS[1]}"
    link.send_keys(Keys.ENTER)
    assert shown(browser) == {"4"}


def test_the_values_of_a_mark_are_read_out_below_the_figure(browser):
    browser.open(run())
    told = browser.run(
        "const cell = [...document.querySelectorAll('figure svg title')].find("
        "t => t.textContent.includes('model.layers.2.mlp.up_proj')).parentElement;"
        "cell.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));"
        "return cell.closest('figure').querySelector('.readout').textContent"
    )
    assert told.startswith("model.layers.2.mlp.up_proj")
    assert any(digit in told for digit in "0123456789")


def test_the_data_of_a_figure_is_what_is_downloaded(browser, downloaded):
    browser.open(run())
    names: list[str] = browser.run(
        "return [...document.querySelectorAll('[data-download=json]')].map(b => b.dataset.of)"
    )
    assert len(names) >= 6
    name = next(n for n in names if "site" in n)
    data = json.loads(downloaded(name, "json"))
    assert len(data["rows"]) == LAYERS * len(KINDS)
    lines = list(csv.reader(io.StringIO(downloaded(name, "csv"))))
    assert lines[0] == data["columns"]
    assert [line[0] for line in lines[1:]] == [row[0] for row in data["rows"]]


def test_the_keyboard_reaches_the_content_first(browser):
    browser.open(run())
    browser.driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    focused = browser.driver.switch_to.active_element
    assert focused.get_attribute("class") == "skip"
    assert focused.is_displayed()
    focused.send_keys(Keys.ENTER)
    assert browser.run("return location.hash") == "#content"
