"""A real Chromium with the page open, for the tests of this folder."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.watched import watch

BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium on the PATH"),
    pytest.mark.timeout(900),
]
"""The marks of a file of tests that open the page."""
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
PREFIX = "below/a%20path/"
READY_MS = 120_000  # of a machine that does much else
BATCH_MS = 1_500_000


class Opened:
    """A page on which every console error, page error, failed response and foreign request is noted."""

    def __init__(self, context: Any, url: str) -> None:
        self.context, self.page = context, context.new_page()
        origin = "/".join(url.split("/")[:3]) + "/"
        self.troubles = watch(self.page, (origin, "data:", f"blob:{origin}"))
        self.page.goto(url)

    def ready(self) -> str:
        """Wait until everything was loaded and checked; -> what the page says then."""
        self.page.locator("body[data-ready]").wait_for(timeout=READY_MS)
        return str(self.page.inner_text("#status"))

    def says(self, selector: str, text: str, milliseconds: int = READY_MS) -> None:
        """Wait until the element holds `text`."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_contain_text(text, timeout=milliseconds)

    def label(self, model: str) -> str:
        return str(self.page.inner_text(f"[data-model={model}] .label"))
