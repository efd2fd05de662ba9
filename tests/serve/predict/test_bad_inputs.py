"""The bad inputs of docs/predict.md, each by its number and name: one row each,
the good ones beside them unharmed.

Archives (23, 24) are in test_archives.py, the faults that need processes (27 to 29, 32) in test_faults.py;
33 and 34 are the server's.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle, load_bundle
from serve.inputs import columnar, items

Predict = Callable[..., Any]
Photo = Callable[..., bytes]
DONE, CHECK_FAILED, UNUSABLE, SOME_FAILED = 0, 1, 2, 3


@pytest.fixture
def status_of(predict: Predict, folder: Path) -> Callable[..., dict[str, Any]]:
    """`status_of(name, content)` puts the file among three good ones, predicts, checks those,
    and gives the row."""
    good = {row["path"]: row for row in predict(folder, flags=["--batch-size", "8"]).rows}
    assert len(good) == 3

    def check(name: str, content: bytes) -> dict[str, Any]:
        (folder / name).write_bytes(content)
        run = predict(folder, flags=["--batch-size", "8"])
        assert len(run.rows) == 4
        row = run.row(name)
        assert run.code == (DONE if row["status"] == "ok" else SOME_FAILED)
        for other in run.rows:
            if other is not row:
                assert other["status"] == "ok"
                assert other["label"] == good[other["path"]]["label"]
                assert other["confidence"] == pytest.approx(good[other["path"]]["confidence"], abs=1e-6)
        if row["status"] != "ok":
            assert row["label"] is None
            assert row["error"]
        return row

    return check


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + png_chunk(b"IEND", b"")
    )


def test_01_empty_file(status_of: Callable[..., Any]) -> None:
    assert status_of("x.jpg", b"")["status"] == "empty"


def test_02_html_named_jpg(status_of: Callable[..., Any]) -> None:
    assert (
        status_of("x.jpg", b"<!DOCTYPE html><html><body>Not Found</body></html>")["status"] == "not_an_image"
    )


def test_03_truncated_jpeg(status_of: Callable[..., Any], photo: Photo) -> None:
    data = photo(5)
    assert status_of("x.jpg", data[: len(data) // 2])["status"] == "truncated"


def test_04_jpeg_without_end_marker(status_of: Callable[..., Any], photo: Photo) -> None:
    assert status_of("x.jpg", photo(5)[:-2])["status"] == "truncated"


def test_05_bad_png_chunk(status_of: Callable[..., Any], photo: Photo) -> None:
    data = bytearray(photo(5, "PNG"))
    data[data.index(b"IDAT") + 30] ^= 0xFF
    assert status_of("x.png", bytes(data))["status"] == "corrupt"


def test_06_over_fifty_megapixels_by_header(
    status_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = status_of("x.png", png_header(10_000, 5_001))
    assert row["status"] == "too_large"
    assert "10000 x 5001" in row["error"]


def test_07_compressed_text_bomb_in_png(status_of: Callable[..., Any], photo: Photo) -> None:
    png = photo(5, "PNG")
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * (8 << 20), 9))
    assert status_of("x.png", png[:33] + bomb + png[33:])["status"] == "corrupt"


def test_08_zero_dimension(status_of: Callable[..., Any]) -> None:
    assert status_of("x.png", png_header(0, 7))["status"] == "corrupt"


@pytest.mark.parametrize("size", [(1, 65000), (65000, 1), (1, 1)])
def test_09_extreme_shapes(status_of: Callable[..., Any], size: tuple[int, int]) -> None:
    row = status_of("x.png", saved(Image.new("RGB", size, (200, 10, 10)), "PNG"))
    assert (row["status"], row["width"], row["height"]) == ("ok", *size)


def test_10_cmyk(status_of: Callable[..., Any], photo: Photo) -> None:
    cmyk = Image.open(io.BytesIO(photo(5))).convert("CMYK")
    assert status_of("x.jpg", saved(cmyk, "JPEG"))["status"] == "ok"


def test_11_sixteen_bit_gray_is_scaled(status_of: Callable[..., Any]) -> None:
    dark = Image.fromarray(np.full((32, 32), 0x2000, np.uint16))
    same = status_of("x.png", saved(dark, "PNG"))
    eight_bit = status_of("x.png", saved(Image.new("L", (32, 32), 0x20), "PNG"))
    assert same["status"] == "ok"
    assert same["confidence"] == eight_bit["confidence"], "clipped to white it would look different"


def test_12_float_tiff(status_of: Callable[..., Any]) -> None:
    assert (
        status_of("x.tif", saved(Image.fromarray(np.full((32, 32), 0.5, np.float32)), "TIFF"))["status"]
        == "unsupported"
    )


def test_13_transparency_on_white(status_of: Callable[..., Any]) -> None:
    white = status_of("x.png", saved(Image.new("RGB", (32, 32), (255, 255, 255)), "PNG"))
    for mode, colour in (("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))):
        row = status_of("x.png", saved(Image.new(mode, (32, 32), colour), "PNG"))
        assert row["confidence"] == white["confidence"]


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_14_animation_is_flagged(status_of: Callable[..., Any], format: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    row = status_of(
        f"x.{format.lower()}", saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    )
    assert row["status"] == "ok"
    assert row["error"].startswith("animated")
    still = status_of(f"x.{format.lower()}", saved(frames[0], format, **options))
    assert still["error"] is None
    assert row["confidence"] == still["confidence"]


def test_15_exif_orientation(status_of: Callable[..., Any], photo: Photo) -> None:
    image = Image.open(io.BytesIO(photo(5, "PNG", size=(32, 48))))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: viewers rotate by 90 degrees clockwise
    turned = status_of("x.png", saved(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif))
    upright = status_of("x.png", saved(image, "PNG"))
    assert (turned["width"], turned["height"]) == (32, 48)
    assert turned["confidence"] == upright["confidence"]


@pytest.mark.parametrize(
    "content", [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_16_svg_and_eps(status_of: Callable[..., Any], content: bytes) -> None:
    assert status_of("x.png", content)["status"] == "unsupported"


@pytest.mark.parametrize(
    "content", [b"\xb1\x68\xde\x3a" + b"\0" * 99, b"8BPS\0\1" + b"\0" * 99, b"SIMPLE  =                    T"]
)
def test_17_dcx_psd_fits(status_of: Callable[..., Any], content: bytes) -> None:
    assert status_of("x.png", content)["status"] == "unsupported"


def test_17_mpo_first_frame(status_of: Callable[..., Any], photo: Photo) -> None:
    image = Image.open(io.BytesIO(photo(5)))
    mpo = status_of("x.jpg", saved(image, "MPO", save_all=True, append_images=[Image.new("RGB", image.size)]))
    alone = status_of("x.jpg", saved(image, "JPEG"))
    assert (mpo["status"], mpo["error"], mpo["confidence"]) == ("ok", None, alone["confidence"])


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system refuses names that are not UTF-8")
def test_18_odd_names(
    predict: Predict, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [b"=1+1.jpg", b"line\nbreak.jpg", b"not-utf8-\xff.jpg", b"quote\",'.jpg"]
    root = os.fsencode(tmp_path / "odd")
    os.mkdir(root)
    for name in names:
        with open(os.path.join(root, name), "wb") as file:
            file.write(photo(6))
    run = predict(tmp_path / "odd")
    assert run.code == DONE
    assert [row["path"].removeprefix(f"{tmp_path}/odd/") for row in run.rows] == [
        "=1+1.jpg",
        "line\nbreak.jpg",
        "not-utf8-\\xff.jpg",
        "quote\",'.jpg",
    ]
    assert predict(tmp_path / "odd", out="p.parquet").code == DONE
    monkeypatch.chdir(tmp_path / "odd")
    run = predict("=1+1.jpg", "line\nbreak.jpg", out="p.csv")
    import csv

    with open(run.out, newline="", encoding="utf-8") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert paths == ["'=1+1.jpg", "line\nbreak.jpg"], "a spreadsheet must not execute a file name"


def test_19_same_base_name_twice(predict: Predict, tmp_path: Path, photo: Photo) -> None:
    for folder in ("one", "two"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "x.jpg").write_bytes(photo(len(folder)))
    paths = [row["path"] for row in predict(tmp_path / "in").rows]
    assert paths == [f"{tmp_path}/in/one/x.jpg", f"{tmp_path}/in/two/x.jpg"]


def test_20_symbolic_links_are_not_followed(
    predict: Predict, folder: Path, tmp_path: Path, photo: Photo
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.jpg").write_bytes(photo(7))
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "escape").symlink_to(tmp_path / "outside")
    (folder / "link.jpg").symlink_to(tmp_path / "outside" / "secret.jpg")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    run = predict(folder)
    assert len(run.rows) == 3
    assert "4 symbolic links" in run.stdout, "what was skipped is reported"
    run = predict(folder, flags=["--follow-links"])
    assert [Path(row["path"]).name for row in run.rows] == ["a.jpg", "b.png", "link.jpg", "c.webp"], (
        "files only, no folder"
    )


@pytest.mark.timeout(120)
def test_21_fifo_device_and_socket(predict: Predict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)
        server.bind("socket.jpg")
        run = predict(
            folder / "pipe.jpg", "/dev/zero", folder / "socket.jpg", folder / "nowhere.jpg", folder / "a.jpg"
        )
        assert run.statuses == ["not_a_file", "not_a_file", "not_a_file", "missing", "ok"]
        inside = predict(folder)
        assert inside.statuses == ["ok"] * 3
        assert "2 special files" in inside.stdout


def test_21_unreadable_file_and_folder(
    predict: Predict, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root nothing is unreadable, so the operating system's answer is given by hand."""
    real_open, real_scandir = os.open, os.scandir

    def refuse_open(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith("a.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, *rest, **more)

    def refuse_scandir(path: Any = ".") -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return real_scandir(path)

    monkeypatch.setattr(items.os, "open", refuse_open)
    monkeypatch.setattr(os, "scandir", refuse_scandir)
    run = predict(folder)
    assert {Path(row["path"]).name: row["status"] for row in run.rows} == {
        "a.jpg": "unreadable",
        "b.png": "ok",
        "sub": "unreadable",
    }


def test_22_file_vanishes_during_the_run(
    predict: Predict, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = items.read_file

    def read(path: str, *rest: Any) -> bytes:
        if path.endswith("b.png"):
            os.unlink(path)
        return real(path, *rest)

    monkeypatch.setattr(items, "read_file", read)
    assert predict(folder).statuses == ["ok", "missing", "ok"]


def test_25_parquet_without_the_column(predict: Predict, tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a.jpg"], "width": [3]}), tmp_path / "x.parquet")
    run = predict(tmp_path / "x.parquet")
    assert (run.code, run.rows) == (UNUSABLE, [])
    assert "--column" in run.stderr
    assert "uri, width" in run.stderr
    assert not run.out.parent.exists() or not any(run.out.parent.iterdir())
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table")
    assert predict(tmp_path / "bad.parquet").code == UNUSABLE
    pq.write_table(pa.table({"path": [1, 2]}), tmp_path / "numbers.parquet")
    assert predict(tmp_path / "numbers.parquet").code == UNUSABLE
    run = predict(
        "gone.jpg", *["gone.jpg"] * 2048, tmp_path / "numbers.parquet", flags=["--shard-size", "1024"]
    )
    assert run.code == UNUSABLE
    assert not run.out.parent.exists() or not any(run.out.parent.iterdir()), "refused before any work"


def test_25_null_and_giant_cells(
    predict: Predict, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "MAX_FILE_BYTES", 100_000)
    cells = [photo(1), None, b"\0" * 200_000, b"", photo(2)]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), tmp_path / "x.parquet")
    run = predict(tmp_path / "x.parquet")
    assert run.statuses == ["ok", "null", "too_large", "empty", "ok"]
    assert [row["path"] for row in run.rows] == [f"{tmp_path}/x.parquet::{i}" for i in range(5)]


def test_25_giant_row_group_is_not_loaded(
    predict: Predict, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = [np.random.default_rng(i).bytes(3000) for i in range(3)]
    with pq.ParquetWriter(tmp_path / "x.parquet", pa.schema([("image", pa.binary())])) as writer:
        writer.write_table(pa.table({"image": noise}))
        writer.write_table(pa.table({"image": [photo(1)]}))
    monkeypatch.setattr(columnar, "MAX_CHUNK_BYTES", 5000)
    assert predict(tmp_path / "x.parquet").statuses == ["too_large"] * 3 + ["ok"]


@pytest.mark.parametrize("kind", ["empty folder", "folder of text", "empty zip", "empty table", "pattern"])
def test_26_empty_input_set(predict: Predict, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "empty"
    source.mkdir()
    if kind == "folder of text":
        (source / "notes.txt").write_text("no image")
    elif kind == "empty zip":
        source = tmp_path / "x.zip"
        zipfile.ZipFile(source, "w").close()
    elif kind == "empty table":
        source = tmp_path / "x.csv"
        source.write_text("path\n")
    elif kind == "pattern":
        source = source / "*.jpg"
    run = predict(source)
    assert (run.code, run.rows) == (UNUSABLE, [])
    assert run.stderr.count("\n") == 1, "one sentence"
    assert not run.out.parent.exists() or not any(run.out.parent.iterdir())


def test_30_corrupt_or_mismatched_bundle(
    predict: Predict, folder: Path, tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    model = bundle.folder / "model.onnx"
    intact = model.read_bytes()
    model.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    run = predict(folder, bundle=bundle)
    assert (run.code, run.rows) == (CHECK_FAILED, [])
    assert "SHA-256" in run.stderr
    assert not run.out.parent.exists() or not any(run.out.parent.iterdir())
    model.write_bytes(intact)
    manifest = bundle.folder / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 99'))
    assert predict(folder, bundle=bundle).code == CHECK_FAILED
    manifest.write_text("{")
    assert predict(folder, bundle=bundle).code == CHECK_FAILED
    manifest.unlink()
    assert predict(folder, bundle=bundle).code == UNUSABLE


def test_31_nonfinite_logits(
    predict: Predict, folder: Path, tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    bundle = make_bundle(tmp_path / "nan", nonfinite_above=250.0)
    (folder / "white.png").write_bytes(saved(Image.new("RGB", (40, 40), (255, 255, 255)), "PNG"))
    run = predict(folder, bundle=bundle, flags=["--batch-size", "8", "--logits"])
    assert run.code == SOME_FAILED
    assert {Path(row["path"]).name: row["status"] for row in run.rows}["white.png"] == "nonfinite"
    assert sorted(run.statuses) == ["nonfinite", "ok", "ok", "ok"], "its neighbours in the batch are unharmed"
    assert run.row("white.png")["logits"] is None
    assert load_bundle(bundle.folder).predict([folder / "a.jpg"])[0].label == run.row("a.jpg")["label"]


def test_35_good_and_bad_together(predict: Predict, tmp_path: Path, photo: Photo) -> None:
    """Every second file is bad; the good ones get what they get alone."""
    root = tmp_path / "mixed"
    root.mkdir()
    bad = [b"", b"<html>", photo(1)[:300], png_header(20_000, 20_000), b"8BPS" + b"\0" * 50]
    for index in range(60):
        (root / f"{index:03d}.jpg").write_bytes(bad[index // 2 % len(bad)] if index % 2 else photo(index))
    run = predict(root, flags=["--batch-size", "16", "--shard-size", "20"])
    assert run.code == SOME_FAILED
    assert [row["path"] for row in run.rows] == [f"{root}/{index:03d}.jpg" for index in range(60)]
    assert [row["status"] == "ok" for row in run.rows] == [index % 2 == 0 for index in range(60)]
    for index in (0, 20, 58):
        alone = predict(root / f"{index:03d}.jpg", out="alone.jsonl").rows[0]
        assert alone["label"] == run.rows[index]["label"]
        assert alone["confidence"] == pytest.approx(run.rows[index]["confidence"], abs=1e-6)
