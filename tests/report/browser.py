"""A headless Chromium for tests of pages, driven through Debian's chromedriver."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
)  # fmt: skip


@contextmanager
def chromium() -> Iterator:
    """Yields a driver; skips the test where Chromium or its driver is missing."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs Debian's chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra test")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in QUIET:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
