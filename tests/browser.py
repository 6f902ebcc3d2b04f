"""A headless Chromium for tests that look at pages as people do; where none is, they are skipped."""

import shutil
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (chromium and driver):
        pytest.skip("needs a browser: Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-sync",
        "disable-background-networking",
        "disable-component-update",
        "hide-scrollbars",
        "window-size=1400,900",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{argument}")
    opened = webdriver.Chrome(service=webdriver.ChromeService(driver), options=options)
    try:
        yield opened
    finally:
        opened.quit()
