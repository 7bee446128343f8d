"""Open the page of `drivesim play` in a headless Chromium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, ViewportSize, sync_playwright

_SIZE = ViewportSize(width=1024, height=700)


@contextmanager
def opened(port: int) -> Iterator[Page]:
    """Open the page of a server on this port, and yield it once it is driving."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport=_SIZE)
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#status[data-status=driving]", state="attached")
        yield page
        browser.close()
