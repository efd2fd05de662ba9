"""What goes wrong on a page of a real browser, for the tests that open one."""

from __future__ import annotations

from typing import Any


def watch(page: Any, own: tuple[str, ...]) -> list[str]:
    """-> the list in which every console error, page error, failed response and request of `page` to anywhere
    but what begins with `own` will be noted."""
    troubles: list[str] = []

    def note(wrong: bool, text: str) -> None:
        if wrong:
            troubles.append(text)

    page.on("console", lambda message: note(message.type == "error", f"console: {message.text}"))
    page.on("pageerror", lambda error: note(True, f"page: {error}"))
    page.on("response", lambda answer: note(answer.status >= 400, f"{answer.status}: {answer.url}"))
    page.on("request", lambda asked: note(not asked.url.startswith(own), f"foreign: {asked.url}"))
    return troubles
