"""A headless Chromium for tests of pages: the machine's own, driven by playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def open_page(url: str, **options: object) -> Iterator[tuple["Page", list[str]]]:
    """A page at `url`, and what it complains of in its console. Skips the test where there is no browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser on this machine: {', '.join(NAMES)}")
    with sync_api.sync_playwright() as driver:
        # In containers tests are root, and Chromium has no sandbox for root.
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        complaints: list[str] = []
        page = browser.new_context(reduced_motion="reduce", **options).new_page()
        page.set_default_timeout(120_000)  # as the tests of the API; the first output of a busy machine is late
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        yield page, complaints
        browser.close()
