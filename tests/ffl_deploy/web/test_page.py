"""The page in a real Chromium, served as any file server does it, below a path:
it answers as ffl-predict does.

`FFL_SCREENSHOTS=docs pytest -m browser` takes the pictures in docs/; `FFL_WEB_BUNDLES=A,B` takes these
bundles, `FFL_WEB_EXAMPLES=DIR` these examples.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.images import load
from ffl_deploy.preprocessing import Preprocessing
from ffl_deploy.web.build import WebOptions, web_models, write_web
from serve.predict.command import main as predict

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium on the PATH"),
    pytest.mark.timeout(900),
]
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
PREFIX = "below/a%20path/"
READY_MS = 120_000  # of a machine that does much else
BATCH_MS = 1_500_000


@pytest.fixture(scope="module")
def bundles(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    if given := os.environ.get("FFL_WEB_BUNDLES"):
        return [load_bundle(folder) for folder in given.split(",")]
    folder = tmp_path_factory.mktemp("bundles")
    classes = tuple(f"class{number}" for number in range(12))
    return [
        make_bundle(folder / "fused", classes=classes, cam=True),
        make_bundle(folder / "branch0", classes=classes, seed=1, resize="crop", crop_fraction=0.875),
    ]


@pytest.fixture(scope="module")
def page_folder(
    bundles: list[Bundle], runtime_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """-> a folder whose sub-folder PREFIX is the page."""
    root = tmp_path_factory.mktemp("site")
    given = os.environ.get("FFL_WEB_EXAMPLES")
    options = WebOptions(runtime_folder, examples=(Path(given),) if given else ())
    write_web(web_models([str(bundle.folder) for bundle in bundles]), root / "below" / "a path", options)
    return root


@pytest.fixture(scope="module")
def site(page_folder: Path, serve: Callable[..., Any]) -> Iterator[Any]:
    with serve(page_folder) as served:
        yield served


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Any]]:
    """`launch(*flags)` -> a Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = shutil.which("chromium")
        yield lambda *flags: playwright.chromium.launch(executable_path=found, args=["--no-sandbox", *flags])


@pytest.fixture(scope="module")
def chromium(launch: Callable[..., Any]) -> Iterator[Any]:
    browser = launch("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    yield browser
    browser.close()


class Opened:
    """A page on which every console error, page error, failed response and foreign request is noted."""

    def __init__(self, context: Any, url: str) -> None:
        self.context, self.troubles = context, []
        self.page = page = context.new_page()
        page.on(
            "console",
            lambda message: message.type == "error" and self.troubles.append(f"console: {message.text}"),
        )
        page.on("pageerror", lambda error: self.troubles.append(f"page: {error}"))
        page.on(
            "response",
            lambda answer: answer.status >= 400 and self.troubles.append(f"{answer.status}: {answer.url}"),
        )
        origin = "/".join(url.split("/")[:3]) + "/"
        own = (origin, "data:", f"blob:{origin}")
        page.on(
            "request",
            lambda asked: asked.url.startswith(own) or self.troubles.append(f"foreign: {asked.url}"),
        )
        page.goto(url)

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


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Opened]]:
    """`open_page(url, viewport=..., ...)`; at the end nothing was amiss on any of them."""
    opened: list[Opened] = []

    def start(url: str, viewport: dict[str, int] = DESKTOP, **options: Any) -> Opened:
        context = chromium.new_context(viewport=viewport, accept_downloads=True, **options)
        opened.append(Opened(context, url))
        return opened[-1]

    yield start
    for page in opened:
        page.context.close()
        assert page.troubles == []


def write_pictures(folder: Path, count: int, kind: str) -> list[Path]:
    """-> pictures of odd sizes in the many forms that people have; the same ones at every call."""
    rng = np.random.default_rng(7 if kind == "png" else 8)
    folder.mkdir(parents=True)
    paths = []
    for number in range(count):
        width, height = (int(side) for side in rng.integers(1, 260, 2))
        few = Image.fromarray(rng.integers(0, 256, (4, 5, 4), dtype=np.uint8))
        coarse = few.resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.integers(-20, 21, (height, width, 4))
        rgba = Image.fromarray(np.clip(np.asarray(coarse, np.int16) + noise, 0, 255).astype(np.uint8))
        path = folder / f"{number:04d}.{kind}"
        (_save_png if kind == "png" else _save_jpeg)(rgba, path, number, rng)
        paths.append(path)
    return paths


def _save_png(rgba: Image.Image, path: Path, number: int, rng: np.random.Generator) -> None:
    mode = (
        "RGB",
        "RGBA",
        "L",
        "LA",
        "P",
        "1",
        "transparent color",
        "transparent palette",
        "turned",
        "profile",
    )[number % 10]
    options: dict[str, Any] = {}
    image = rgba.convert(mode) if mode in ("RGB", "L", "LA", "1") else rgba.convert("RGB")
    if mode == "RGBA":
        image = rgba
    elif mode == "P":
        image = image.quantize(int(rng.integers(2, 257)))
    elif mode == "transparent color":
        options["transparency"] = image.getpixel((0, 0))
    elif mode == "transparent palette":
        image = image.quantize(16)
        options["transparency"] = bytes(rng.integers(0, 256, 16, dtype=np.uint8))
    elif mode == "turned":
        options["exif"] = _turned(rng)
    elif mode == "profile":
        options["icc_profile"] = swapped_profile()
    image.save(path, "PNG", compress_level=1, **options)


def _save_jpeg(rgba: Image.Image, path: Path, number: int, rng: np.random.Generator) -> None:
    image = rgba.convert("L" if number % 7 == 3 else "RGB")
    options: dict[str, Any] = {"exif": _turned(rng)} if number % 3 == 0 else {}
    if number % 5 == 1:
        options["icc_profile"] = swapped_profile()
    quality, subsampling = int(rng.integers(30, 100)), int(rng.integers(0, 3))
    image.save(path, "JPEG", quality=quality, subsampling=subsampling, progressive=number % 4 == 2, **options)


def _turned(rng: np.random.Generator) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(1, 9))
    return exif


def swapped_profile() -> bytes:
    """-> sRGB's profile with red and green exchanged: who applies it shows other colours."""
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile)


def test_it_opens_keeps_the_gates_and_then_asks_for_nothing(
    site: Any, bundles: list[Bundle], open_page: Callable[..., Opened], tmp_path: Path
) -> None:
    opened = open_page(site.url + PREFIX)
    assert opened.ready() == "Ready. This browser keeps every gate. It works without a network from now on."
    findings = opened.page.locator("#findings li").all_inner_texts()
    for name in ("PNG", "PNG with transparency", "JPEG, turned"):
        assert any(finding.startswith(f"{name}: the same pixels as in Python") for finding in findings), (
            findings
        )
    for bundle in bundles:
        golden = len(bundle.golden().images)
        assert any(
            f"{bundle.name}: keeps the fp32 gate on {golden} golden samples" in finding
            for finding in findings
        ), findings
        assert any(f"0 of {golden} labels differ" in finding for finding in findings)

    # Everything came once: what the service worker keeps is not asked for again.
    heavy = [path for path in site.requests if path.endswith((".wasm", ".onnx"))]
    assert len(heavy) == len(set(heavy)) == 1 + len(bundles)
    asked = len(site.requests)
    (picture,) = write_pictures(tmp_path / "pictures", 1, "png")
    opened.page.set_input_files("#file", picture)
    expected = {bundle.name: bundle.predict([picture])[0].label for bundle in bundles}
    opened.says("#verdict", f"{bundles[0].name} says")
    assert {name: opened.label(name) for name in expected} == expected
    opened.page.set_input_files("#files", [picture, picture])
    opened.says("#batch-status", "2 pictures")
    opened.page.wait_for_timeout(1000)
    assert site.requests[asked:] == []


def test_it_works_without_a_network_after_the_first_visit(
    site: Any, bundles: list[Bundle], open_page: Callable[..., Opened]
) -> None:
    opened = open_page(site.url + PREFIX)
    opened.ready()
    asked = len(site.requests)
    opened.context.set_offline(True)
    opened.page.reload()
    assert "keeps every gate" in opened.ready()
    opened.page.locator("#examples button").first.click()
    opened.says("#verdict", f"{bundles[0].name} says")
    # The browser itself looks for a newer worker; nothing that the page needs is asked for.
    assert [path for path in site.requests[asked:] if not path.endswith("/sw.js")] == []


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_thousand_pictures_give_what_ffl_predict_gives(
    kind: str,
    site: Any,
    page_folder: Path,
    bundles: list[Bundle],
    open_page: Callable[..., Opened],
    tmp_path: Path,
) -> None:
    paths = write_pictures(page_folder / "pictures" / kind, 1000, kind)
    opened = open_page(site.url + PREFIX)
    opened.ready()

    # The resized bytes.
    targets = [
        Preprocessing(32, 32, "stretch", 1.0, "bilinear"),
        Preprocessing(24, 40, "crop", 0.875, "bicubic"),
        Preprocessing(29, 31, "crop", 1.0, "box"),
    ]
    script = """async ([names, targets]) => {
      const { decode } = await import("./image.js");
      const { prepare } = await import("./resize.js");
      const found = [];
      for (const [i, name] of names.entries()) {
        const file = await (await fetch("/pictures/" + name)).arrayBuffer();
        const image = await decode(new Uint8Array(file), 5e7);
        found.push(btoa(String.fromCharCode(...prepare(image, targets[i % targets.length]))));
      }
      return found;
    }"""
    names = [f"{kind}/{path.name}" for path in paths]
    answers = opened.page.evaluate(script, [names, [msgspec.to_builtins(target) for target in targets]])
    differing = []
    for i, (path, answer) in enumerate(zip(paths, answers, strict=True)):
        wanted = load(path, targets[i % len(targets)])
        most = np.abs(np.frombuffer(base64.b64decode(answer), np.uint8).astype(int) - wanted.ravel()).max()
        if most:
            differing.append((path.name, int(most)))
    print(f"{kind}: resized bytes differ on {len(differing)} of {len(paths)}: {differing[:5]}")
    # PNG is lossless; a JPEG may be decoded by another version of the same library.
    assert len(differing) <= (1 if kind == "png" else len(paths))

    # The rows, of the second model too where there is one.
    for bundle in bundles:
        if len(bundles) > 1:
            opened.page.select_option("#batch-model", bundle.name)
        opened.page.set_input_files("#files", paths)
        opened.says(
            "#batch-status", f"{len(paths)} pictures: {len(paths)} classified, 0 could not be read", BATCH_MS
        )
        with opened.page.expect_download() as download:
            opened.page.click("#csv")
        assert download.value.suggested_filename == "predictions.csv"
        rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
        assert [row["path"] for row in rows] == [path.name for path in paths]

        out = tmp_path / f"{bundle.name}.csv"
        assert run_command(predict, [str(bundle.folder), str(paths[0].parent), "--out", str(out)]) == 0
        expected = list(csv.DictReader(io.StringIO(out.read_text())))
        assert list(rows[0]) == list(expected[0])
        same = [row["label"] == wanted["label"] for row, wanted in zip(rows, expected, strict=True)]
        gaps = [
            abs(float(a["confidence"]) - float(b["confidence"])) for a, b in zip(rows, expected, strict=True)
        ]
        print(
            f"{kind}, {bundle.name}: {sum(same)} of {len(same)} labels agree, largest confidence gap "
            f"{max(gaps):.2e}"
        )
        assert sum(same) >= (1000 if kind == "png" else 995)
        if kind == "png":
            assert max(gaps) < 1e-4
        for row, wanted in zip(rows, expected, strict=True):
            assert (row["status"], row["width"], row["height"]) == ("ok", wanted["width"], wanted["height"])


def site_copy(page_folder: Path, target: Path) -> Path:
    shutil.copytree(page_folder, target, ignore=shutil.ignore_patterns("pictures"))
    return target / "below" / "a path"


def test_a_damaged_file_is_told(
    page_folder: Path,
    serve: Callable[..., Any],
    open_page: Callable[..., Opened],
    bundles: list[Bundle],
    tmp_path: Path,
) -> None:
    page = site_copy(page_folder, tmp_path / "damaged")
    first, second = (bundle.name for bundle in bundles[:2])
    model = page / "models" / first / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 0xFF
    model.write_bytes(content)
    with serve(tmp_path / "damaged") as served:
        opened = open_page(served.url + PREFIX)
        assert "1 of 2 models do not keep their gate here" in opened.ready()
        opened.says(f"[data-model={first}]", "was changed since the page was built (SHA-256 differs)")
        opened.page.locator("#examples button").first.click()
        opened.says("#verdict", f"{second} says")  # the other one still answers


def test_a_model_that_computes_something_else_fails_its_gate(
    page_folder: Path,
    serve: Callable[..., Any],
    open_page: Callable[..., Opened],
    bundles: list[Bundle],
    tmp_path: Path,
) -> None:
    """Hashes that agree, weights that do not: as if this browser computed wrongly."""
    onnx = pytest.importorskip("onnx")
    page = site_copy(page_folder, tmp_path / "other")
    model = page / "models" / bundles[0].name / "model.onnx"
    graph = onnx.load(model)
    weights = next(one for one in graph.graph.initializer if len(one.dims) == 4)
    values = onnx.numpy_helper.to_array(weights).copy()
    values[0] *= 1.01
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(graph, model)
    records = json.loads((page / "files.json").read_text())
    name = model.relative_to(page).as_posix()
    records[name] = {"sha256": hashlib.sha256(model.read_bytes()).hexdigest(), "bytes": model.stat().st_size}
    (page / "files.json").write_text(json.dumps(records))
    with serve(tmp_path / "other") as served:
        opened = open_page(served.url + PREFIX)
        assert "1 of 2 models do not keep their gate here" in opened.ready()
        opened.says(f"[data-model={bundles[0].name}]", "does not keep its gate in this browser")
        opened.says("#findings", "max logit difference / standard deviation is")


def test_what_cannot_be_read_is_explained_and_the_next_picture_works(
    site: Any, bundles: list[Bundle], open_page: Callable[..., Opened], tmp_path: Path
) -> None:
    whole, jpeg = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(whole, "PNG")
    Image.open(whole).save(jpeg, "JPEG")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("CMYK", (9, 9)).save(tmp_path / "print.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "scan.tiff")
    (tmp_path / "short.png").write_bytes(whole.getvalue()[:-300])
    (tmp_path / "short.jpg").write_bytes(jpeg.getvalue()[:-300])
    (tmp_path / "page.png").write_bytes(b"<html>not an image</html>")
    (tmp_path / "nothing.png").write_bytes(b"")
    (tmp_path / "bits.png").write_bytes(whole.getvalue()[:60] + b"?" * 40 + whole.getvalue()[100:])
    (tmp_path / "good.png").write_bytes(whole.getvalue())
    expected = {
        "deep.png": "16 bits a channel are not supported here",
        "print.jpg": "a CMYK JPEG is not supported here",
        "scan.tiff": "TIFF is not supported here",
        "short.png": "the file ends before the picture does",
        "short.jpg": "the file ends before the picture does",
        "page.png": "not one of JPEG, PNG, WEBP, GIF, BMP",
        "nothing.png": "the file is empty",
        "bits.png": "the pixels cannot be decoded",
    }
    opened = open_page(site.url + PREFIX)
    opened.ready()
    for name, text in expected.items():
        opened.page.set_input_files("#file", tmp_path / name)
        opened.says("#verdict", f"{name} cannot be classified: {text}")
    opened.page.set_input_files("#file", tmp_path / "good.png")
    opened.says("#verdict", "says")
    assert opened.label(bundles[0].name) == bundles[0].predict([tmp_path / "good.png"])[0].label

    opened.page.set_input_files("#files", [tmp_path / name for name in (*expected, "good.png")])
    opened.says(
        "#batch-status", f"{len(expected) + 1} pictures: 1 classified, {len(expected)} could not be read"
    )
    with opened.page.expect_download() as download:
        opened.page.click("#csv")
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    codes = ["unsupported"] * 3 + ["truncated"] * 2 + ["not_an_image", "empty", "corrupt", "ok"]
    assert [row["status"] for row in rows] == codes


def test_other_formats(site: Any, open_page: Callable[..., Opened], page_folder: Path) -> None:
    """WebP with half-transparent pixels, GIF with transparent ones, BMP, a turned WebP; wider than a tile."""
    rng = np.random.default_rng(3)
    folder = page_folder / "pictures" / "others"
    folder.mkdir(parents=True)
    rgba = Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 8
    rgba.save(folder / "alpha.webp", lossless=True, exact=True)
    rgba.convert("RGB").save(folder / "turned.webp", lossless=True, exif=exif)
    rgba.convert("RGB").save(folder / "plain.bmp")
    rgba.convert("RGB").quantize(8).save(folder / "clear.gif", transparency=3)
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(rng.integers(0, 256, (3, 4500, 4), dtype=np.uint8)).save(folder / "wide-alpha.png")
    Image.fromarray(rng.integers(0, 256, (4500, 3, 3), dtype=np.uint8)).save(folder / "tall.png")
    names = sorted(path.name for path in folder.iterdir())
    opened = open_page(site.url + PREFIX)
    opened.ready()
    script = """async (names) => {
      const { decode } = await import("./image.js");
      const found = [];
      for (const name of names) {
        const file = await (await fetch("/pictures/others/" + name)).arrayBuffer();
        const image = await decode(new Uint8Array(file), 5e7);
        let text = "";
        for (const value of image.pixels) text += String.fromCharCode(value);
        found.push([image.height, image.width, image.animated, btoa(text)]);
      }
      return found;
    }"""
    for name, (height, width, animated, pixels) in zip(
        names, opened.page.evaluate(script, names), strict=True
    ):
        wanted = load(folder / name)
        assert (height, width, animated) == (*wanted.shape[:2], name == "moving.gif"), name
        np.testing.assert_array_equal(
            np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(wanted.shape), wanted, err_msg=name
        )


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


def test_threads_where_the_headers_allow_them(
    page_folder: Path, serve: Callable[..., Any], open_page: Callable[..., Opened]
) -> None:
    headers = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
    with serve(page_folder, headers) as served:
        opened = open_page(served.url + PREFIX)
        assert "keeps every gate" in opened.ready()
        opened.says("#findings", "WebAssembly on several threads")


def test_a_new_build_replaces_the_kept_one(
    page_folder: Path, runtime_folder: Path, serve: Callable[..., Any], open_page: Callable[..., Opened],
    make_bundle: Callable[..., Bundle], tmp_path: Path,
) -> None:  # fmt: skip
    """Who comes back sees one build or the other, whole; a visit later the new one,
    also without a network."""
    page = site_copy(page_folder, tmp_path / "rebuilt")
    with serve(tmp_path / "rebuilt") as served:
        opened = open_page(served.url + PREFIX)
        opened.ready()
        other = make_bundle(tmp_path / "newer", seed=5)
        write_web(web_models([str(other.folder)]), page, WebOptions(runtime_folder))
        opened.page.reload()
        opened.ready()
        assert "not keep" not in opened.page.inner_text("#status")
        waiting = "async () => !!(await navigator.serviceWorker.getRegistration())?.waiting"
        for _ in range(120):  # wait_for_function evaluates text, which the page's policy forbids
            if opened.page.evaluate(waiting):
                break
            opened.page.wait_for_timeout(500)
        opened.page.goto("about:blank")
        opened.context.set_offline(True)
        opened.page.goto(served.url + PREFIX)
        assert "keeps every gate" in opened.ready()
        assert opened.page.title() == "newer on noise"


@pytest.mark.slow
def test_webgpu_is_offered_where_it_keeps_the_gate(
    bundles: list[Bundle],
    runtime_folder: Path,
    serve: Callable[..., Any],
    launch: Callable[..., Any],
    tmp_path: Path,
) -> None:
    write_web(
        web_models([str(bundles[0].folder)]), tmp_path / "page", WebOptions(runtime_folder, webgpu=True)
    )
    software = launch("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    with serve(tmp_path / "page") as served, contextlib.closing(software) as browser:
        opened = Opened(browser.new_context(viewport=DESKTOP), served.url)
        assert "keeps every gate" in opened.ready()
        note = opened.page.inner_text("#webgpu-note")
        choice = opened.page.locator("input[value=webgpu]")
        print(note)
        assert choice.is_enabled() == (note == "(keeps the gate here)")
        assert choice.is_enabled() or note.startswith("(not offered: ")
        if choice.is_enabled():
            choice.check()
            opened.page.locator("#examples button").first.click()
            opened.says("#verdict", "says")
            wanted = bundles[0].predict([bundles[0].golden().images[0]])[0].label
            assert opened.label(bundles[0].name) == wanted
