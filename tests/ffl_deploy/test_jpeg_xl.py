"""JPEG XL: read with the limits of every other format, which its decoder does not have."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffl_deploy import images, jpeg_xl
from ffl_deploy.images import SUFFIXES, ImageError, decode, size_of
from ffl_deploy.jpeg_xl import CODESTREAM, Header, JpegXlError, read_header

ROOT = Path(__file__).parents[2]
Y, X = np.mgrid[:30, :40]
PIXELS = np.stack([X * 6, Y * 8, (X + Y) * 3], -1).astype(np.uint8)
ALPHA = (X * 6).astype(np.uint8)
IMAGES = {
    "RGB": Image.fromarray(PIXELS),
    "L": Image.fromarray(PIXELS[..., 0]),
    "RGBA": Image.fromarray(np.dstack([PIXELS, ALPHA])),
    "LA": Image.fromarray(np.dstack([PIXELS[..., 0], ALPHA])),
    "I;16": Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257),
}
WRITE = """
import sys
from PIL import Image
import pillow_jxl
source, target, *container = sys.argv[1:]
image = Image.open(source)
image.save(target, **({} if image.format == "JPEG" else {"lossless": True, "use_container": bool(container)}))
"""
# by cjxl 0.7: PIXELS in 16 bits, PIXELS with EXIF orientation 6, three gray frames
OF_16_BITS = (
    "AAAADEpYTCANCocKAAAAFGZ0eXBqeGwgAAAAAGp4bCAAAAAJanhsbAoAAAEIanhsY/8K6DD8ABQXAggCAQDEA0soMd08q+VD"
    "Lq4UFBQkFBzRSIgYRVjw/wYBoB3FGNwfxhhjDGOM4caYLABqJQAoQAg8gCAUAbA9AbBGgMDURCAQCAQCgUAgEAgEAoEjq0Ag"
    "EAgEAoFAIBAIBAKBwYFAIBAIBAKBQCAQCAQCQxOBQCAQCAQCgUAgEAgEPgYDgUAgECBA4P+fAAECBAgQIEDg/58AAQIECBAg"
    "QIDVnwABAgQIECBAQMGFAAECAwOqqwMDAwMDAwMDqqsDAwMDAwMDA6qrAwMDAwMDAwOiqwMDAwMDAwMDI6kDAwMDA0cgjXYy"
    "57OcJfq1ovBfdV/JBrdxAIM="
)
TURNED = (
    "AAAADEpYTCANCocKAAAAFGZ0eXBqeGwgAAAAAGp4bCAAAACAanhsY/8K6DALBBSXBAgCAQCkAUsoo9ymk8mDnNhSUDj4TkJB"
    "QcERjQVEIjAyLvh/gwA2xmQBUDg3xhijY4wxKsaojwk2uRIAFCAEHkAQigDYHgw0VAC+J5vLAAA7GwAgAHM4HhtaXxm3O3PY"
    "5yzIx7DKo8sIVj5bXQJCBw=="
)
ANIMATED = (
    "/wroMEEAFhSXBAgIoAIAAFwASxiLFQDUE2OME2OcC0gAICjoxUDsm+oICKACAABYAEsYixUA1BNjMGYuIAGAICEXAwATpR8I"
    "CKBCAABcAEsYixUA1BNjnBhjnAtIACBIR8VAT9kp"
)


def written(folder: Path, image: Image.Image, *flags: str, suffix: str = ".png") -> bytes:
    """-> the image as JPEG XL. Another process writes it, in which nothing of ours is loaded."""
    source, target = folder / f"source{suffix}", folder / "a.jxl"
    image.save(source)
    subprocess.run([sys.executable, "-c", WRITE, str(source), str(target), *flags], check=True, cwd=folder)
    return target.read_bytes()


@pytest.mark.parametrize("flags", [(), ("container",)], ids=["bare", "container"])
@pytest.mark.parametrize("mode", IMAGES)
def test_pixels_are_those_of_the_png(tmp_path: Path, mode: str, flags: tuple[str, ...]) -> None:
    data = written(tmp_path, IMAGES[mode], *flags)
    decoded = decode(data)
    assert not decoded.animated
    np.testing.assert_array_equal(decoded.pixels, decode((tmp_path / "source.png").read_bytes()).pixels)
    assert size_of(tmp_path / "a.jxl") == (40, 30)
    assert "a.jxl".endswith(SUFFIXES)


def test_of_a_packed_jpeg_the_jpeg_is_decoded(tmp_path: Path) -> None:
    data = written(tmp_path, IMAGES["RGB"], suffix=".jpg")
    assert jpeg_xl.decode_apart(data).data == (tmp_path / "source.jpg").read_bytes()
    np.testing.assert_array_equal(decode(data).pixels, decode((tmp_path / "source.jpg").read_bytes()).pixels)


def test_16_bits_a_channel_are_read_as_8() -> None:
    np.testing.assert_array_equal(decode(base64.b64decode(OF_16_BITS)).pixels, PIXELS)


def test_orientation_is_applied_once() -> None:
    data = base64.b64decode(TURNED)
    assert read_header(data) == Header(40, 30, False)
    np.testing.assert_array_equal(decode(data).pixels, np.rot90(PIXELS, -1))


def test_an_animated_one_is_refused() -> None:
    """Its decoder gives the last frame."""
    with pytest.raises(ImageError, match="animated") as caught:
        decode(base64.b64decode(ANIMATED))
    assert caught.value.code == "unsupported"


def bits(*fields: tuple[int, int]) -> bytes:
    """-> a codestream of these fields (value, bits)."""
    value = position = 0
    for field, width in fields:
        value |= field << position
        position += width
    return CODESTREAM + value.to_bytes(position // 8 + 20, "little")


HUGE = bits((0, 1), (3, 2), (2**30 - 1, 30), (1, 3), (1, 1))


@pytest.mark.parametrize(
    ("data", "header"),
    [
        (bits((1, 1), (3, 5), (7, 3), (1, 1)), Header(64, 32, False)),
        (bits((1, 1), (3, 5), (0, 3), (4, 5), (1, 1)), Header(40, 32, False)),
        (bits((0, 1), (1, 2), (999, 13), (5, 3), (1, 1)), Header(1777, 1000, False)),
        (HUGE, Header(2**30, 2**30, False)),
        # an intended size and a preview, and only then whether it is animated
        (
            bits((1, 1), (3, 5), (1, 3), (0, 1), (1, 1), (5, 3), (1, 1), (1, 1), (0, 5), (1, 3),
                 (1, 1), (0, 1), (2, 2), (9, 10), (0, 3), (0, 2), (5, 6), (1, 1)),
            Header(32, 32, True),
        ),
    ],
    ids=["ratio", "eights", "any", "huge", "preview"],
)  # fmt: skip
def test_headers(data: bytes, header: Header) -> None:
    assert read_header(data) == header
    # in a container, cut into pieces of a byte
    boxes = b"".join(b"\0\0\0\x0djxlp\0\0\0" + bytes([at, data[at]]) for at in range(len(data)))
    assert read_header(jpeg_xl.CONTAINER + boxes) == header


def test_too_many_pixels_are_refused_before_anything_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "decode_apart", None)
    with pytest.raises(ImageError, match="50 megapixels") as caught:
        decode(HUGE)
    assert caught.value.code == "too_large"


def test_what_takes_too_much_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of many layers does, or of 4096 channels."""
    data = written(tmp_path, IMAGES["RGB"])
    endless = "def Decoder(num_threads):\n    while True:\n        pass"
    with monkeypatch.context() as patch:
        patch.setattr(jpeg_xl, "CPU_SECONDS", 1)
        patch.setattr(jpeg_xl, "_CHILD", jpeg_xl._CHILD.replace("from pillow_jxl import Decoder", endless))
        with pytest.raises(ImageError, match="more than 1 s") as caught:
            decode(data)
        assert caught.value.code == "too_large"
    data = written(tmp_path, Image.new("RGB", (4000, 4000)))
    monkeypatch.setattr(jpeg_xl, "ADDRESS_BYTES", 200 << 20)
    with pytest.raises(ImageError, match=r"damaged, or decoding it takes more than 0\.195 GiB"):
        decode(data)


def test_a_cut_or_broken_one_is_a_code(tmp_path: Path) -> None:
    data = written(tmp_path, IMAGES["RGB"])
    for broken in (data[:3], data[: len(data) // 2], data[:20] + bytes(60), jpeg_xl.CONTAINER):
        with pytest.raises(ImageError) as caught:
            decode(broken)
        assert caught.value.code in ("corrupt", "truncated")


def test_the_server_takes_none(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="convert it to PNG") as caught:
        decode(written(tmp_path, IMAGES["RGB"]), apart=False)
    assert caught.value.code == "unsupported"


def test_a_header_of_nothing_is_truncated() -> None:
    with pytest.raises(JpegXlError, match="ends in its header"):
        read_header(CODESTREAM)
