"""Drive a real browser without a screen and without a network, for the tests of pages.

The browser is found in this order: the path in the variable CHROME, Chromium or Chrome on the PATH, and the one that
``python -m playwright install chromium`` fetched.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# A browser of its own accord asks its maker's hosts for news; a page under test must be the only one that asks.
QUIET = (
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-gpu",
)
HOW = "install Debian's chromium, or run: python -m playwright install chromium"


def find_browser() -> str | None:
    """Return the path of a browser in CHROME or on the PATH; None leaves the choice to playwright."""
    named = os.environ.get("CHROME")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def start_browser() -> Iterator[Browser]:
    """Start a browser; the test is skipped, with the reason, where there is none."""
    if os.environ.get("CHROME") and not os.path.exists(os.environ["CHROME"]):
        pytest.skip(f"CHROME names {os.environ['CHROME']}, which is not there")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with api.sync_playwright() as playwright:
        try:
            # Root may not use the sandbox, and a test opens no page but ours.
            browser = playwright.chromium.launch(
                executable_path=find_browser(), args=list(QUIET), chromium_sandbox=os.geteuid() != 0
            )
        except api.Error as error:
            pytest.skip(f"no browser starts ({error.message.strip().splitlines()[0]}); {HOW}")
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(
    browser: Browser, url: str, *, offline: bool = True, expected: str = "(?!)", **settings: Any
) -> Iterator[Page]:
    """Open ``url`` in a fresh profile; what the page complains of, or asks a network for, fails the test at the end.

    Args:
        browser: as ``start_browser`` yields it.
        url: of a file, or of a server on this machine.
        offline: whether the browser has no network, this machine's own servers included.
        expected: regular expression of complaints that are no failure.
        settings: of the browser's context, such as ``color_scheme``, ``viewport`` and ``java_script_enabled``.
    """
    with browser.new_context(offline=offline, **settings) as context:
        page = context.new_page()
        complaints: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        yield page
        origin = "/".join(url.split("/")[:3])
        foreign = [
            asked for asked in requests if asked != url and not asked.startswith((f"{origin}/", "blob:", "data:"))
        ]
        complaints = [complaint for complaint in complaints if not re.search(expected, complaint)]
        assert not complaints and not foreign, (complaints, foreign)
        if url.startswith("file:"):
            assert requests == [url], requests


def background(page: Page, selector: str) -> str:
    """Return the background colour that the browser has computed for the first element of ``selector``."""
    return page.locator(selector).first.evaluate("element => getComputedStyle(element).backgroundColor")
