"""The page of the server in a browser."""

import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser  # noqa: F401  (a fixture)
from served import Served, serve

pytestmark = [pytest.mark.browser, pytest.mark.slow]

MARKUP = "<img src=x onerror=document.title='owned'>"


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Page:
    """The page of a server, with what tests do there."""

    def __init__(self, browser: Any, url: str) -> None:  # noqa: F811
        self.browser = browser
        browser.get(url)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.browser.find_elements("css selector", selector)
        return found

    def one(self, selector: str) -> Any:
        (element,) = self.all(selector)
        return element

    def set(self, name: str, value: str) -> None:
        self.browser.execute_script(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input'));",
            name,
            value,
        )

    def generate(self, prompt: str, **options: str) -> None:
        """Fill in the form, submit it, and wait for the end."""
        wait_for(lambda: self.all("#first option"))
        self.set("prompt", prompt)
        for name, value in options.items():
            self.set(name, value)
        self.one("#generate").click()
        wait_for(lambda: self.all(".status") and self.one("#generate").is_enabled())

    def errors(self) -> list[str]:
        """What the browser's console reports: also each violation of the content policy."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture(scope="module")
def running(folders: list[Path]) -> Iterator[Served]:
    with serve(folders) as served:
        yield served


@pytest.fixture
def page(browser: Any, running: Served) -> Page:  # noqa: F811
    browser.set_window_size(1200, 900)
    return Page(browser, running.url)


def text_of(pane: Any) -> str:
    return str(pane.find_element("css selector", ".text").get_property("textContent"))


def test_text_streams_with_the_probability_of_each_token(page: Page, running: Served) -> None:
    page.generate("the cat", temperature="0", max_tokens="12")
    assert text_of(page.one(".pane")).startswith("the cat")
    tokens = page.all(".token")
    assert 1 < len(tokens) <= 12
    assert re.search(r"12 tokens in .* s, .* per second; max tokens", page.one(".status").text)
    assert not page.one("table").is_displayed()
    page.browser.execute_script(
        "arguments[0].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))", tokens[1]
    )
    rows = page.all("tr")
    assert 5 <= len(rows) <= 10
    shares = [float(row.find_elements("css selector", "td")[1].text.rstrip("%")) for row in rows]
    assert 0 < sum(shares[:5]) <= 100.5
    assert page.one("tr.drawn").is_displayed()  # at temperature 0 the drawn token is the most probable
    page.one(".text").send_keys("\ue014")  # the right arrow
    assert "chosen" in page.all(".token")[2].get_attribute("class")
    assert page.errors() == []


def test_two_models_are_beside_each_other(page: Page) -> None:
    page.generate("the", second="other", seed="3", max_tokens="8")
    assert [heading.text for heading in page.all(".pane h2")] == ["gpt", "other"]
    first, second = page.all(".pane")
    assert text_of(first) != text_of(second)
    assert first.location["y"] == second.location["y"]
    assert first.location["x"] < second.location["x"]


def test_markup_in_text_stays_text(page: Page) -> None:
    """The prompt is longer than the context, so there is an error instead of a continuation."""
    page.generate(MARKUP)
    assert text_of(page.one(".pane")) == MARKUP
    assert page.all("img") == []
    assert page.browser.title == "gptpipe"
    assert "the context of the model has 16" in page.one(".status.error").text


def test_the_page_fits_a_phone(page: Page) -> None:
    page.browser.set_window_size(500, 800)  # Chromium's windows are no narrower
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 375, "height": 800, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        page.browser.refresh()
        page.generate("the", second="other", max_tokens="16")
        page.all(".token")[0].click()
        widths = page.browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert widths == [375, 375]
        first, second = page.all(".pane")
        assert first.location["y"] < second.location["y"]
        assert all(button.size["height"] >= 44 for button in page.all("button"))
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_has_a_dark_mode(page: Page) -> None:
    def background() -> str:
        return str(page.browser.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light = background()
    media = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    try:
        assert sum(map(int, re.findall(r"\d+", background()))) < 150 < sum(map(int, re.findall(r"\d+", light)))
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_generation_can_be_stopped(page: Page) -> None:
    wait_for(lambda: page.all("#first option"))
    page.browser.execute_script("document.getElementById('max_tokens').max = 4096")
    page.set("max_tokens", "4096")
    page.set("temperature", "0")  # the model then never ends a document
    page.one("#generate").click()
    wait_for(lambda: page.all(".token"))
    page.one("#stop").click()
    wait_for(lambda: page.one(".status").text == "stopped")
    assert page.one("#generate").is_enabled()


def test_the_page_asks_for_the_key(browser: Any, folders: list[Path]) -> None:  # noqa: F811
    key = "0123456789abcdef"
    with serve(folders[:1], key=key) as served:
        page = Page(browser, served.url)
        wait_for(lambda: page.one("#key").is_displayed())
        assert "the API key is missing or wrong" in page.one("#error").text
        page.set("key", key)
        page.set("prompt", "the")
        page.one("#generate").click()
        wait_for(lambda: page.all(".token"))


def test_the_page_loads_nothing_from_elsewhere(running: Served) -> None:
    with urllib.request.urlopen(running.url, timeout=20) as answer:
        policy = answer.headers["Content-Security-Policy"]
        page = answer.read().decode()
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in re.sub(r"`http.*?`", "", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)
