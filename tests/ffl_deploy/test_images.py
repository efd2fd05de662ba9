"""The decoder: Pillow's exact pixels, one error code per kind of broken file,
the same orientation everywhere."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from ffl_deploy import images
from ffl_deploy.images import BACKGROUND, ImageError, decode, prepare
from ffl_deploy.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A colourful 61 x 47 image with smooth and sharp parts."""
    rng = np.random.default_rng(0)
    ramp = np.stack(np.meshgrid(np.linspace(0, 255, 61), np.linspace(255, 0, 47)), axis=2)
    pixels = np.concatenate([ramp, rng.integers(0, 256, (47, 61, 1))], axis=2).astype(np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pillow_rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def refused(data: bytes) -> str:
    """-> the code with which `decode` refuses `data`."""
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert str(caught.value), "the row must say why"
    return caught.value.code


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 95, "subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"restart_marker_blocks": 3},
        {"keep_rgb": True},
        {"optimize": True, "quality": 10},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_jpeg_pixels_are_pillows(photo: Image.Image, options: dict[str, object]) -> None:
    data = encoded(photo, "JPEG", **options)
    np.testing.assert_array_equal(decode(data).pixels, pillow_rgb(data))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (17, 16), (61, 47)])
def test_gray_and_odd_sized_jpeg_pixels_are_pillows(photo: Image.Image, size: tuple[int, int]) -> None:
    for mode in ("L", "RGB"):
        data = encoded(photo.crop((0, 0, *size)).convert(mode), "JPEG")
        np.testing.assert_array_equal(decode(data).pixels, pillow_rgb(data))


def test_the_fast_decoder_is_used_and_changes_nothing(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(photo, "JPEG")
    pixels = images._decode_jpeg(data, Image.open(io.BytesIO(data)))
    assert pixels is not None, "simplejpeg is installed, yet not used"
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    np.testing.assert_array_equal(decode(data).pixels, pixels)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_other_formats_are_pillows(photo: Image.Image, format: str) -> None:
    data = encoded(photo, format, **({"lossless": True} if format == "WEBP" else {}))
    decoded = decode(data)
    np.testing.assert_array_equal(decoded.pixels, pillow_rgb(data))
    assert (decoded.width, decoded.height, decoded.animated) == (61, 47, False)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_in_every_format(
    photo: Image.Image, format: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(photo, format, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode(data)
    np.testing.assert_array_equal(decoded.pixels, np.asarray(upright.convert("RGB")))
    assert (decoded.width, decoded.height) == ((47, 61) if orientation >= 5 else (61, 47))


def test_a_broken_exif_block_does_not_cost_the_image(photo: Image.Image) -> None:
    data = encoded(photo, "JPEG")
    broken = data[:2] + b"\xff\xe1\x00\x12Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff\x00\x00" + data[2:]
    np.testing.assert_array_equal(decode(broken).pixels, decode(data).pixels)


def test_cmyk_jpeg_is_converted_like_pillow(photo: Image.Image) -> None:
    data = encoded(photo.convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(decode(data).pixels, pillow_rgb(data))


def test_sixteen_bit_gray_is_scaled_not_clipped() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for format in ("PNG", "TIFF"):
        assert decode(encoded(Image.fromarray(values), format)).pixels[0, :, 0].tolist() == [
            0,
            0,
            1,
            128,
            255,
        ]


def test_float_and_unbounded_integer_tiffs_are_refused() -> None:
    assert refused(encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF")) == "unsupported"
    assert refused(encoded(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF")) == "unsupported"


def test_transparency_is_composited_on_the_background() -> None:
    clear = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
    half = Image.new("RGBA", (4, 3), (0, 0, 0, 128))
    assert decode(encoded(clear, "PNG")).pixels.reshape(-1, 3).tolist() == [list(BACKGROUND)] * 12
    assert decode(encoded(half, "PNG")).pixels[0, 0].tolist() == [127, 127, 127]
    assert decode(encoded(half.convert("LA"), "PNG")).pixels[0, 0].tolist() == [127, 127, 127]
    palette = Image.new("P", (4, 3), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    assert decode(encoded(palette, "PNG", transparency=0)).pixels[0, 0].tolist() == list(BACKGROUND)
    assert (
        decode(encoded(Image.new("RGB", (4, 3), (9, 9, 9)), "PNG", transparency=(9, 9, 9)))
        .pixels[0, 0]
        .tolist()
        == [255] * 3
    )


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame_and_says_so(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode(encoded(frames[0], format, save_all=True, append_images=frames[1:], **options))
    assert decoded.animated
    assert decoded.pixels[4, 4].tolist() == [255, 0, 0]


def test_mpo_gives_its_first_picture(photo: Image.Image) -> None:
    data = encoded(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (61, 47))])
    decoded = decode(data)
    assert not decoded.animated
    np.testing.assert_array_equal(decoded.pixels, pillow_rgb(data))


def test_broken_files_have_a_code_each(photo: Image.Image) -> None:
    jpeg, png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    assert refused(b"") == "empty"
    assert refused(b"<!DOCTYPE html><html><body>404</body></html>") == "not_an_image"
    assert refused(b"\0" * 5000) == "not_an_image"
    assert refused(jpeg[: len(jpeg) // 2]) == "truncated"
    assert refused(jpeg[:-2]) == "truncated", "no end marker"
    assert refused(png[: len(png) // 2]) == "truncated"
    middle = png.index(b"IDAT") + 20
    assert refused(png[:middle] + bytes([png[middle] ^ 0xFF]) + png[middle + 1 :]) == "corrupt"
    np.testing.assert_array_equal(decode(jpeg + b"\0" * 100).pixels, decode(jpeg).pixels)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<svg width='1'/>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"),
        (b"%PDF-1.7\n", "PDF"),
        (b"8BPS\0\1" + b"\0" * 60, "PSD"),
        (b"\xb1\x68\xde\x3a" + b"\0" * 60, "DCX"),
        (b"SIMPLE  =                    T", "FITS"),
    ],
)
def test_known_but_unsupported_formats_are_named(data: bytes, name: str) -> None:
    assert refused(data) == "unsupported"
    with pytest.raises(ImageError, match=name):
        decode(data)


def png_header(width: int, height: int) -> bytes:
    """-> a PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(7072, 7072), (50_000_001, 1), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_by_the_header(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("a pixel was decoded"))
    assert refused(png_header(*size)) == "too_large"


def test_a_compressed_text_bomb_is_refused() -> None:
    body = b"Comment\0\0" + zlib.compress(b"a" * (64 << 20), 9)
    text = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    png = encoded(Image.new("RGB", (4, 4)), "PNG")
    assert refused(png[:33] + text + png[33:]) == "corrupt"


def test_zero_dimensions_are_refused() -> None:
    assert refused(png_header(0, 5)) == "corrupt"


@pytest.mark.parametrize("size", [(1, 1), (1, 65000), (65000, 1)])
@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_extreme_shapes_are_resized_like_any_other(size: tuple[int, int], resize: str) -> None:
    pixels = decode(encoded(Image.new("RGB", size, (10, 200, 30)), "PNG")).pixels
    prepared = prepare(pixels, Preprocessing(32, 24, resize=resize, crop_fraction=0.875))  # type: ignore[arg-type]
    assert prepared.shape == (32, 24, 3)
    assert np.unique(prepared.reshape(-1, 3), axis=0).tolist() == [[10, 200, 30]]


def test_crop_takes_the_centre_and_stretch_takes_all() -> None:
    pixels = np.full((48, 64, 3), (200, 0, 0), np.uint8)
    pixels[:, 8:56] = (0, 200, 0)
    cropped = prepare(pixels, Preprocessing(32, 32, resize="crop", filter="box"))
    assert np.unique(cropped.reshape(-1, 3), axis=0).tolist() == [[0, 200, 0]]
    stretched = prepare(pixels, Preprocessing(32, 32, resize="stretch", filter="box"))
    assert stretched[0, 0].tolist() == [200, 0, 0]
    assert stretched[0, 16].tolist() == [0, 200, 0]


def test_rounding_never_puts_the_crop_outside_the_image() -> None:
    """(60 - 29 * (60 / 29)) / 2 is a hair below 0: such a file was a ValueError, not a row."""
    target = Preprocessing(height=29, width=31)
    for width, height in ((66, 60), (137, 120), *((side, side) for side in range(1, 200))):
        pixels = np.full((height, width, 3), 7, np.uint8)
        np.testing.assert_array_equal(prepare(pixels, target), np.full((29, 31, 3), 7, np.uint8))


def test_crop_fraction_takes_the_middle_of_the_middle(photo: Image.Image) -> None:
    image = photo.resize((80, 64))
    wanted = image.crop((24, 16, 56, 48)).resize((16, 16), Image.Resampling.BILINEAR)
    got = prepare(np.asarray(image), Preprocessing(16, 16, resize="crop", crop_fraction=0.5))
    # Outside its box the one-step resize sees the true neighbours, the two steps repeat the border:
    # compare inside.
    np.testing.assert_array_equal(got[2:-2, 2:-2], np.asarray(wanted)[2:-2, 2:-2])


def test_threads_see_every_plugin_registered(photo: Image.Image) -> None:
    data = [encoded(photo, format) for format in ("TIFF", "WEBP", "PNG", "GIF", "JPEG")] * 20
    with ThreadPoolExecutor(8) as pool:
        shapes = {decoded.pixels.shape for decoded in pool.map(decode, data)}
    assert shapes == {(47, 61, 3)}


def with_scans(size: tuple[int, int], scans: int) -> bytes:
    """-> a progressive JPEG whose last scan is there so often that it has `scans` of them."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


@pytest.mark.parametrize(("size", "scans"), [((64, 64), 501), ((64, 64), 3000), ((7000, 7000), 45)])
def test_scans_that_cost_minutes_are_refused_before_decoding(
    size: tuple[int, int], scans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """138 KB of 600 scans took 44 s (libjpeg-turbo's LJT-01-003)."""
    data = with_scans(size, scans)
    monkeypatch.setattr(images, "_decode_jpeg", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match=f"{scans} scans") as refused:
        decode(data)
    assert refused.value.code == "too_large"


def test_a_progressive_jpeg_of_a_camera_is_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1200, 900), (200, 30, 30)).save(buffer, "JPEG", progressive=True)
    assert buffer.getvalue().count(b"\xff\xda") > 5
    assert decode(buffer.getvalue()).pixels.shape == (900, 1200, 3)


@pytest.mark.parametrize(
    ("begin", "code"),
    [
        (b"<?xml" + b"<!" * 100_000, "not_an_image"),
        (b"<!" * 100_000, "not_an_image"),
        (b" " * 4_000_000, "not_an_image"),
        (b" \n<!-- a comment -->\n<svg/>", "unsupported"),
        (b"\xef\xbb\xbf<svg/>", "unsupported"),
    ],
)
def test_what_is_no_image_is_told_without_looking_far(begin: bytes, code: str) -> None:
    """A pattern that went back and forth over `<!` took 0.4 s for 12 KB."""
    with pytest.raises(ImageError) as refused:
        decode(begin)
    assert refused.value.code == code
