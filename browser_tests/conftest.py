"""A real headless Chromium with a page open, and what it did besides: console and network."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tether.report.page import Page, render

# Root has no sandbox; the rest keeps the browser itself from calling home.
QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Browser:
    """Chromium, and the page that it shows."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def open(self, page: Page, width: int = 1200, scheme: str = "light") -> None:
        """Show a page from disk, in a window of a width in CSS pixels, light or dark."""
        path = self.folder / "page.html"
        path.write_text(render(page), "utf-8")
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        self.log("performance")  # of pages before
        self.log("browser")
        self.driver.get(path.as_uri())

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call."""
        entries: list[dict[str, Any]] = self.driver.get_log(kind)
        return entries

    def requests(self) -> list[str]:
        """Every address that was asked for since the page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def run(self, script: str, *arguments: object) -> Any:
        """The value of a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        """The text of every element, as it stands in the document."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )
        return found


@pytest.fixture(scope="session")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in QUIET:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver: webdriver.Chrome, tmp_path: Path) -> Browser:
    return Browser(driver, tmp_path)


@pytest.fixture
def downloaded(browser: Browser, tmp_path: Path) -> Callable[[str], str]:
    """Press a download button and read the file."""
    browser.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )

    def press(name: str, kind: str) -> str:
        path = tmp_path / f"{name}.{kind}"
        browser.run(
            "document.querySelector(`[data-of='${arguments[0]}'][data-download='${arguments[1]}']`)"
            ".click()",
            name,
            kind,
        )
        browser.driver.implicitly_wait(0)
        for _ in range(200):
            if path.exists():
                return path.read_bytes().decode("utf-8")
            browser.driver.execute_async_script("setTimeout(arguments[0], 50)")
        raise AssertionError(f"{path.name} was not downloaded")

    return press
