"""The demo in a real Chromium, as a person uses it.
`FFL_SCREENSHOTS=docs pytest -m browser` takes the pictures in docs/."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle, load_bundle
from tests.watched import watch

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium on the PATH"),
]
Start = Callable[..., contextlib.AbstractContextManager[Any]]
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
TABS = ("Draw", "Classify", "Batch", "Which model", "Model card", "API")


@pytest.fixture(scope="module")
def bundles(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """FFL_BUNDLES=DIR/fused,DIR/branch0 shows real digits in the screenshots; the assertions hold for any two
    digit bundles with an export report beside them."""
    if given := os.environ.get("FFL_BUNDLES"):
        return [load_bundle(folder) for folder in given.split(",")]
    folder = tmp_path_factory.mktemp("digits")
    options = {"size": 16, "classes": tuple("0123456789"), "gray": True, "cam": True}
    file = {"runtime": "onnxruntime", "file": "model.onnx", "parameters": 1, "multiply_adds": 1}
    artefact = file | {
        "target": "fused",
        "variant": "fp32",
        "bytes": 9000,
        "precision": "fp32 / fp32",
        "parity": "passed",
    }
    report = {
        "rows": [{**artefact, "accuracy_gate": "passed"}],
        "limits": {},
        "recommendation": {"artefact": "fused/fp32", "reason": "fused/fp32 is."},
    }
    (folder / "report.json").write_text(json.dumps(report))
    Image.new("RGB", (90, 55), "white").save(folder / "report.png")
    return [make_bundle(folder / "fused", **options), make_bundle(folder / "branch0", seed=1, **options)]


@pytest.fixture(scope="module")
def server(bundles: list[Bundle], serve_process: Start) -> Iterator[Any]:
    with serve_process(*[str(bundle.folder) for bundle in bundles]) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A page on which every console error, page error, failed response and foreign request is noted."""

    def __init__(self, context: Any, url: str) -> None:
        self.page = context.new_page()
        self.troubles = watch(self.page, (url, "data:", "blob:"))
        self.page.goto(url)
        self.page.get_by_role("tab", name="Classify").wait_for()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def says(self, selector: str, text: str) -> None:
        """Wait until the element holds `text`."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_contain_text(text, timeout=20_000)

    def answer(self, model: str, nth: int = 0) -> str:
        """-> the label that `model` shows, in the n-th place where it shows one."""
        return str(
            self.page.locator(f".answer-{model}").nth(nth).get_by_test_id("label-output-value").inner_text()
        ).strip()


@pytest.fixture(params=["desktop", "phone-dark"])
def watched(chromium: Any, server: Any, request: pytest.FixtureRequest) -> Iterator[Watched]:
    """A page on a desktop, and one on a phone in dark mode; at the end nothing was amiss."""
    phone = request.param != "desktop"
    context = chromium.new_context(
        viewport=PHONE if phone else DESKTOP, color_scheme="dark" if phone else "light", accept_downloads=True
    )
    opened = Watched(context, server.url)
    yield opened
    assert opened.troubles == []
    context.close()


def shoot(watched: Watched, name: str, request: pytest.FixtureRequest) -> None:
    """Keep a screenshot where FFL_SCREENSHOTS says."""
    if folder := os.environ.get("FFL_SCREENSHOTS"):
        kind = "phone" if "phone" in request.node.name else "desktop"
        watched.page.wait_for_timeout(700)  # Gradio's bars grow
        Path(folder).mkdir(parents=True, exist_ok=True)
        watched.page.screenshot(path=Path(folder, f"demo-{name}-{kind}.png"))


def write_samples(bundle: Bundle, folder: Path, count: int = 4) -> list[Path]:
    paths = [folder / f"digit-{number}.png" for number in range(count)]
    for path, image in zip(paths, bundle.golden().images, strict=False):
        Image.fromarray(image).save(path)
    return paths


def test_upload_a_file_and_read_every_models_label(
    watched: Watched, bundles: list[Bundle], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = write_samples(bundles[0], tmp_path)[0]
    watched.tab("Classify")
    watched.page.set_input_files("#image input[type=file]", path)
    expected = {bundle.name: bundle.predict([path])[0].label for bundle in bundles}
    watched.says("#status", "say")
    assert {name: watched.answer(name, -1) for name in expected} == expected
    shoot(watched, "classify", request)


def test_pick_an_example_with_the_keyboard_alone(watched: Watched, bundles: list[Bundle]) -> None:
    watched.tab("Classify")
    example = watched.page.locator("button.gallery-item").nth(1)
    example.wait_for()
    for _ in range(40):
        watched.page.keyboard.press("Tab")
        if example.evaluate("node => node === document.activeElement"):
            break
    else:
        pytest.fail("Tab never reached the example")
    watched.page.keyboard.press("Enter")
    watched.says("#status", "say")
    golden = bundles[0].golden().images
    from serve.demo.samples import pick

    assert watched.answer("fused", -1) == bundles[0].predict([golden[pick(bundles[0].golden())[1]]])[0].label


def test_draw_and_clear(watched: Watched, request: pytest.FixtureRequest) -> None:
    page = watched.page
    box = page.locator("#pad canvas").bounding_box()

    def at(x: float, y: float) -> tuple[float, float]:
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    page.mouse.move(*at(0.35, 0.25))
    page.mouse.down()
    for point in ((0.6, 0.25), (0.47, 0.45), (0.62, 0.62), (0.5, 0.78), (0.35, 0.72)):  # a three
        page.mouse.move(*at(*point), steps=8)
    page.mouse.up()
    watched.says("#drawing-status", "say")
    assert watched.answer("fused") in "0123456789"
    shoot(watched, "draw", request)
    page.get_by_role("button", name="Clear", exact=True).click()
    watched.says("#drawing-status", "Draw something first.")


def test_draw_with_the_keyboard(watched: Watched) -> None:
    page = watched.page
    page.locator("#pad canvas").focus()
    for key in ["ArrowUp"] * 6 + [" "] + ["ArrowDown"] * 12 + [" "]:
        page.keyboard.press(key)
    watched.says("#drawing-status", "say")
    page.keyboard.press("Delete")
    watched.says("#drawing-status", "Draw something first.")


def test_a_bad_file_is_explained_and_the_next_one_works(
    watched: Watched, bundles: list[Bundle], tmp_path: Path
) -> None:
    (tmp_path / "page.png").write_bytes(b"<html>not an image</html>")
    good = write_samples(bundles[0], tmp_path)[1]
    watched.tab("Classify")
    watched.page.set_input_files("#image input[type=file]", tmp_path / "page.png")
    watched.says("#status", "cannot be classified")
    watched.page.get_by_role("button", name="Remove Image").click()
    watched.says("#status", "Waiting")
    watched.page.set_input_files("#image input[type=file]", good)
    watched.says("#status", "say")
    assert watched.answer("fused", -1) == bundles[0].predict([good])[0].label


def test_a_batch_with_progress_and_downloads(
    watched: Watched, bundles: list[Bundle], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from playwright.sync_api import expect

    samples = write_samples(bundles[0], tmp_path)
    (tmp_path / "broken.png").write_bytes(b"?")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        for number, image in enumerate(np.repeat(bundles[0].golden().images[:8], 10, axis=0)):
            Image.fromarray(image).save(tmp_path / "member.png")
            archive.write(tmp_path / "member.png", f"digits/{number}.png")
    watched.tab("Batch")
    watched.page.set_input_files(
        "#files input[type=file]", [*samples, tmp_path / "broken.png", tmp_path / "more.zip"]
    )
    expect(watched.page.locator("#files tr.file")).to_have_count(len(samples) + 2)
    watched.page.click("#start-batch")
    total = len(samples) + 1 + 10 * min(8, len(bundles[0].golden().images))
    watched.says(
        "#batch-status", f"{total} images: {total - 1} classified, 1 could not be read (not an image)"
    )
    shoot(watched, "batch", request)
    for kind in ("csv", "parquet"):
        with watched.page.expect_download() as download:
            watched.page.click(f"#{kind}")
        assert download.value.suggested_filename == f"predictions.{kind}"
        if kind == "csv":
            lines = Path(download.value.path()).read_text().splitlines()
            assert len(lines) == total + 1
            assert lines[1].startswith("digit-0.png,ok,")


def test_which_model_and_its_card(watched: Watched, request: pytest.FixtureRequest) -> None:
    watched.tab("Which model")
    watched.page.get_by_text("What to ship:").wait_for()
    # another one, hidden, measures widths
    watched.page.get_by_text("fused / fp32").locator("visible=true").wait_for()
    picture = watched.page.locator("#pareto img")
    picture.wait_for()
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 0
    shoot(watched, "which-model", request)
    watched.tab("Model card")
    watched.page.get_by_role("heading", name="A bundle for tests").or_(
        watched.page.get_by_text("Where it comes from")
    ).first.wait_for()


def test_an_example_has_a_name_and_is_answered_in_view(watched: Watched) -> None:
    """On a phone too, where the examples lie below the answer."""
    watched.tab("Classify")
    example = watched.page.locator("button.gallery-item").nth(1)
    example.wait_for()
    assert str(example.get_attribute("aria-label")).startswith("Example 2: ")
    example.click()
    watched.says("#status", "say")
    watched.page.wait_for_timeout(1500)  # it scrolls smoothly
    box = watched.page.locator("#status").bounding_box()
    assert 0 <= box["y"] <= watched.page.viewport_size["height"] - box["height"]


def test_stop_is_there_only_while_a_batch_runs(watched: Watched) -> None:
    watched.tab("Batch")
    watched.page.locator("#start-batch").wait_for()
    assert watched.page.locator("#stop-batch").is_disabled()


def test_the_pad_says_what_it_is_for(watched: Watched) -> None:
    hint = watched.page.locator("#pad .hint")
    assert hint.is_visible()
    watched.page.locator("#pad canvas").focus()
    for key in ("ArrowUp", " ", "ArrowDown", " "):
        watched.page.keyboard.press(key)
    watched.says("#drawing-status", "say")
    assert not hint.is_visible()


def test_programs_are_told_of_the_servers_own_protocols(watched: Watched) -> None:
    watched.tab("API")
    watched.says("#api", "/classify")
    assert watched.page.get_by_text("Use via API").count() == 0


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, which finds what people with a screen reader or a keyboard stumble over."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm, which downloads axe-core, is not installed")
    folder = tmp_path_factory.mktemp("axe")
    command = [npm, "pack", "axe-core@4.14.1", "--prefer-offline", "--ignore-scripts"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return (folder / "package" / "axe.min.js").read_text()


@pytest.mark.parametrize("tab", TABS)
def test_axe_finds_nothing_serious(
    watched: Watched, axe: str, tab: str, bundles: list[Bundle], tmp_path: Path
) -> None:
    watched.tab(tab)
    if tab == "Draw":
        watched.page.locator("#pad canvas").focus()
        for key in ("ArrowUp", " ", "ArrowDown", " "):
            watched.page.keyboard.press(key)
        watched.says("#drawing-status", "say")
    if tab == "Classify":
        watched.page.locator("button.gallery-item").nth(0).click()
        watched.says("#status", "say")
    if tab == "Batch":
        watched.page.set_input_files("#files input[type=file]", write_samples(bundles[0], tmp_path))
        watched.page.click("#start-batch")
        watched.says("#batch-status", "classified")
    watched.page.wait_for_timeout(800)
    watched.page.evaluate(axe)
    found = watched.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    serious = [
        f"{one['id']}: {node['html'][:200]}"
        for one in found["violations"]
        for node in one["nodes"]
        if one["impact"] in ("serious", "critical")
    ]
    assert not serious, "\n".join(serious)


@pytest.mark.parametrize("tab", TABS)
def test_no_tab_scrolls_sideways(watched: Watched, tab: str) -> None:
    """The tab's own button included: on a phone none hides behind another."""
    watched.tab(tab)
    watched.page.wait_for_timeout(500)
    watched.page.evaluate("scrollTo(500, 0)")
    assert watched.page.evaluate("scrollX") == 0


def test_nothing_is_shown_where_there_is_nothing_yet(watched: Watched) -> None:
    """No empty frames: before the first answer the examples follow the place for an image."""
    watched.tab("Classify")
    watched.page.locator("button.gallery-item").nth(0).wait_for()
    assert watched.page.locator("[class*=answer-]:visible").count() == 0
    watched.tab("Batch")
    watched.says("#files", "Drop images or zip files here")
    assert watched.page.get_by_text("Click to Upload").count() == 0
    for selector in ("#uncertain", "#csv", "#parquet"):
        assert not watched.page.locator(selector).is_visible()


def test_the_table_of_models_needs_no_scrolling_on_a_desktop(watched: Watched) -> None:
    """On a phone it scrolls, in a region of its own that the keyboard reaches; its words are whole."""
    watched.tab("Which model")
    region = watched.page.get_by_role("region", name="Export report").locator("visible=true")
    region.wait_for()
    wide = watched.page.viewport_size["width"] == DESKTOP["width"]
    assert region.evaluate("node => node.scrollWidth > node.clientWidth") is not wide
    heights = region.locator("tbody td").evaluate_all("cells => cells.map(cell => cell.clientHeight)")
    assert max(heights) < 45  # one line
