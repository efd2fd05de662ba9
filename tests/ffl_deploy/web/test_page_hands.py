"""The page in a real Chromium: by drop, paste, camera and keyboard, on a desktop and a phone.

`FFL_SCREENSHOTS=docs pytest -m browser` takes the pictures in docs/.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ffl_deploy.bundle import Bundle
from tests.ffl_deploy.web.browser import BROWSER, DESKTOP, PHONE, PREFIX, Opened
from tests.ffl_deploy.web.pictures import write_pictures

pytestmark = BROWSER


def transfer(page: Any, kind: str, files: Sequence[Path]) -> None:
    """Drop or paste files, as the browser tells the page of it."""
    script = """([kind, files]) => {
      const data = new DataTransfer();
      const bytes = (content) => Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
      for (const [name, content] of files) data.items.add(new File([bytes(content)], name));
      const field = kind === "paste" ? "clipboardData" : "dataTransfer";
      const Event = kind === "paste" ? ClipboardEvent : DragEvent;
      document.body.dispatchEvent(new Event(kind, { [field]: data, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(
        script, [kind, [[path.name, base64.b64encode(path.read_bytes()).decode()] for path in files]]
    )


def test_drop_paste_and_camera(
    site: Any, bundles: list[Bundle], open_page: Callable[..., Opened], tmp_path: Path
) -> None:
    dropped, pasted = write_pictures(tmp_path / "pictures", 2, "png")
    opened = open_page(site.url + PREFIX, permissions=["camera"])
    opened.ready()
    for kind, path in (("drop", dropped), ("paste", pasted)):
        transfer(opened.page, kind, [path])
        opened.says("#caption", path.name)
        opened.says("#verdict", "says")
        assert opened.label(bundles[0].name) == bundles[0].predict([path])[0].label
    transfer(opened.page, "drop", [dropped, pasted])
    opened.says("#batch-status", "2 pictures: 2 classified")
    opened.page.get_by_role("button", name="Camera", exact=True).click()
    opened.page.get_by_role("button", name="Take the picture").click()
    opened.says("#caption", "camera, ")
    opened.says("#verdict", "says")
    assert opened.page.locator("#viewfinder").is_hidden()


def test_no_picture_is_taken_before_the_camera_gives_one(site: Any, open_page: Callable[..., Opened]) -> None:
    opened = open_page(site.url + PREFIX, permissions=["camera"])
    opened.ready()
    opened.page.evaluate("() => { HTMLMediaElement.prototype.play = () => new Promise(() => {}); }")
    opened.page.get_by_role("button", name="Camera", exact=True).click()
    assert opened.page.get_by_role("button", name="Take the picture").is_disabled()
    opened.page.get_by_role("button", name="Close the camera").click()
    assert opened.page.locator("#viewfinder").is_hidden()


def test_the_keyboard_alone(site: Any, bundles: list[Bundle], open_page: Callable[..., Opened]) -> None:
    opened = open_page(site.url + PREFIX)
    opened.ready()
    reached = []
    for _ in range(40):
        opened.page.keyboard.press("Tab")
        reached.append(
            opened.page.evaluate("() => document.activeElement.id || document.activeElement.textContent")
        )
        if opened.page.evaluate("() => document.activeElement.closest('#examples') !== null"):
            break
    else:
        pytest.fail(f"Tab never reached an example: {reached}")
    assert {"file", "camera"} <= set(reached)
    opened.page.keyboard.press("Enter")
    opened.says("#verdict", f"{bundles[0].name} says")
    for _ in range(40):
        opened.page.keyboard.press("Tab")
        reached.append(opened.page.evaluate("() => document.activeElement.id"))
    assert {"files", "folder", "batch-model"} <= set(reached)


@pytest.mark.parametrize(
    ("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark"), (PHONE, "light"), (DESKTOP, "dark")]
)
def test_axe_finds_nothing_and_nothing_scrolls_sideways(
    viewport: dict[str, int],
    scheme: str,
    site: Any,
    axe: str,
    bundles: list[Bundle],
    open_page: Callable[..., Opened],
    tmp_path: Path,
) -> None:
    opened = open_page(site.url + PREFIX, viewport=viewport, color_scheme=scheme)
    opened.ready()
    opened.page.locator("#examples button").nth(2).click()
    opened.says("#verdict", f"{bundles[0].name} says")
    if folder := os.environ.get("FFL_SCREENSHOTS"):
        name = f"web-{'phone' if viewport is PHONE else 'desktop'}{'-dark' if scheme == 'dark' else ''}.png"
        opened.page.screenshot(path=Path(folder, name), full_page=True)
    opened.page.set_input_files("#files", write_pictures(tmp_path / "pictures", 3, "png"))
    opened.says("#batch-status", "3 pictures")
    opened.page.evaluate(axe)
    found = opened.page.evaluate(
        "async () => (await axe.run()).violations.map((one) => [one.id, one.nodes.map((n) => n.html)])"
    )
    assert found == []
    opened.page.evaluate("() => scrollTo(500, 0)")
    assert opened.page.evaluate("() => scrollX") == 0
