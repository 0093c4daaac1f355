"""A real Chromium, without a network and without a window."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pathtune import report
from tests import run_folders
from tests.conftest import ROOT

AXE = ROOT / ".cache" / "axe" / "package" / "axe.min.js"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
    "--disable-sync",
]
REQUIRED = "PATHTUNE_REQUIRE_BROWSER"


def _skip(reason: str) -> None:
    """Skip on a developer's machine; where the browser is required, fail."""
    if os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser():
    """Start the installed Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        _skip("Chromium is not installed (Debian: apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _skip("playwright is not installed: pip install 'pathtune[browser]'")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """Return the source of axe-core, which ``make test-browser`` fetches."""
    if not AXE.exists():
        _skip("axe-core is not there: make test-browser fetches it")
    return AXE.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Write the report of one run, and that of two side by side."""
    folder = tmp_path_factory.mktemp("reports")
    kinds = ("bulk", "surface", "<b>slab</b> & co")
    frames = run_folders.labelled(30, magmoms=True, config_types=kinds)
    one = run_folders.make(folder / "one", frames=frames, retention={"n_left_out": 2})
    two = run_folders.make(folder / "two", preset="low", error=0.05)
    return {
        "run": report.write([one]),
        "runs": report.write([one, two], folder / "both.html"),
    }


class Page:
    """A page and what it asked for and complained of."""

    def __init__(self, browser, path: Path, scheme: str, width: int) -> None:
        self.context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # a busy machine, not a broken page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(self.url)


@pytest.fixture
def visit(browser, pages):
    """Open a page; every page is closed after the test."""
    opened = []

    def open_page(name: str, scheme: str = "light", width: int = 1100) -> Page:
        opened.append(Page(browser, pages[name], scheme, width))
        return opened[-1]

    yield open_page
    for page in opened:
        page.context.close()
