"""The page in a real Chromium: it answers as ffl-predict does, and says why where it cannot."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle
from ffl_deploy.command import run_command
from ffl_deploy.images import load
from ffl_deploy.preprocessing import Preprocessing
from serve.predict.command import main as predict
from tests.ffl_deploy.web.browser import BATCH_MS, BROWSER, PREFIX, Opened
from tests.ffl_deploy.web.pictures import write_pictures

pytestmark = BROWSER


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
