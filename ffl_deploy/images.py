"""Bytes -> uint8 RGB pixels: the one decoder and the one resizer of the whole project.

Training, export, batch prediction and the server all call `decode` and `prepare`,
so a file looks the same to all of them.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import os
import re
import threading
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# Every format's plugin, by name: Image.open would register some of them on first use,
# and two threads then race.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from ffl_deploy.jpeg_xl import JpegXlError, decode_apart, read_header
from ffl_deploy.preprocessing import Pixels, Preprocessing

# Formats by Pillow's names. MPO, what many phones write (a JPEG with further pictures behind the first one),
# is opened as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


class PhoneFormat(NamedTuple):
    """A format that is read only where what reads it is installed. module: what has to be there; plugin: what
    then teaches Pillow, "" where a process of its own decodes it; how: what to do elsewhere."""

    name: str  # Pillow's
    signature: re.Pattern[bytes]
    suffixes: tuple[str, ...]
    module: str
    plugin: str
    how: str
    extra: str = ""  # of ffl-deploy, that brings it


PHONE_FORMATS = (
    PhoneFormat(
        "HEIF",
        re.compile(rb".{4}ftyp(heic|heix|heim|heis|hevc|mif1|msf1)", re.DOTALL),
        (".heic", ".heif", ".hif"),
        "pillow_heif",
        "pillow_heif",
        "with the extra heif of ffl-deploy, or convert it to JPEG",
        "heif",
    ),
    PhoneFormat(
        "AVIF",
        re.compile(rb".{4}ftyp(avif|avis)", re.DOTALL),
        (".avif",),
        "PIL._avif",
        "PIL.AvifImagePlugin",
        "with Pillow 11.3 or newer, or convert it to JPEG",
    ),
    PhoneFormat(
        "JPEG XL",
        re.compile(rb"\xff\x0a|\x00{3}\x0cJXL \r\n\x87\n", re.DOTALL),
        (".jxl",),
        "pillow_jxl",
        "",
        "with the extra jxl of ffl-deploy, on Linux and macOS, or convert it to PNG or JPEG",
        "jxl",
    ),
)


def _readable(one: PhoneFormat) -> bool:
    # a process of its own is bounded by what Windows has not
    return importlib.util.find_spec(one.module) is not None and bool(one.plugin or os.name == "posix")


READABLE = tuple(one for one in PHONE_FORMATS if _readable(one))
"""Those of PHONE_FORMATS that this environment reads."""
UNREADABLE = tuple(one for one in PHONE_FORMATS if one not in READABLE)
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    *(suffix for one in READABLE for suffix in one.suffixes),
)  # fmt: skip
"""What a name has to end with for a file of a folder to be taken for an image."""
# What people do send, and deserve a better answer than "not an image".
UNSUPPORTED = tuple(
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"%!PS|\xc5\xd0\xd3\xc6", "EPS"),
        (rb"%PDF", "PDF"),
        (rb"8BPS", "PSD"),
        (rb"\xb1\x68\xde\x3a", "DCX"),
        (rb"SIMPLE  =", "FITS"),
        (rb"\x00{3}\x0cjP  ", "JPEG 2000"),
    )
)
MAX_PIXELS = 50_000_000
BACKGROUND = (255, 255, 255)  # what transparent pixels are composited on

MAX_SCANS = 500
"""Of a progressive JPEG; cameras and encoders write about ten (the limit of libjpeg-turbo's LJT-01-003)."""
MAX_SCANNED_PIXELS = 40 * MAX_PIXELS
"""Scans times pixels: each scan passes over all blocks, however little it holds."""
_SCAN = b"\xff\xda"
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_TRUNCATED = re.compile("truncated|unexpected end|premature end|eof", re.IGNORECASE)


class ImageError(Exception):
    """An image that cannot be used. `code` is the machine-readable reason (the `status` of its row)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Decoded:
    """A decoded image. `pixels` is upright (EXIF orientation applied);
    `animated` says that only frame 0 was taken."""

    pixels: Pixels
    animated: bool = False

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]


def decode(data: bytes, max_pixels: int = MAX_PIXELS, apart: bool = True) -> Decoded:
    """Decode the first frame of an encoded image.

    Args: data: the whole file. max_pixels: refused by the header, before any pixel is decoded. apart: take
    formats that a process of its own decodes, for up to a minute.
    Raises ImageError with code `empty`, `not_an_image`, `too_large`, `truncated`, `corrupt` or `unsupported`.
    """
    if (found := _apart(data)) is not None:
        if not apart:
            raise ImageError("unsupported", _convert(found.name))
        return _decode_apart(data, max_pixels)
    with _opened(data, max_pixels) as image:
        # Attributes of a Pillow image are code that reads on (`is_animated` looks for the second frame), so
        # whatever touches it is inside.
        try:
            if image.width * image.height > max_pixels:
                raise ImageError(
                    "too_large", f"{image.width} x {image.height} is more than {_megapixels(max_pixels)}"
                )
            if image.width == 0 or image.height == 0:
                raise ImageError("corrupt", "the image has no pixels")
            _check_scans(data, image)
            animated = image.format not in ("MPO", "HEIF") and bool(getattr(image, "is_animated", False))
            pixels = _decode_jpeg(data, image)
            if pixels is None:
                image.load()
                pixels = np.asarray(_to_rgb(image), dtype=np.uint8)
            return Decoded(_upright(pixels, _orientation(image)), animated)
        except (ImageError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(
                "too_large", f"the image unpacks to more than {_megapixels(max_pixels)}"
            ) from error
        # Pillow's plugins raise almost anything on hostile bytes; each becomes a row
        except Exception as error:
            raise ImageError(
                _code_of(error), f"the pixels cannot be decoded ({str(error) or type(error).__name__})"
            ) from error


def _apart(data: bytes) -> PhoneFormat | None:
    return next((one for one in READABLE if not one.plugin and one.signature.match(data)), None)


def _decode_apart(data: bytes, max_pixels: int) -> Decoded:
    """-> the image of a JPEG XL file. Raises ImageError."""
    try:
        header = read_header(data)
        if header.width * header.height > max_pixels:
            raise ImageError(
                "too_large", f"{header.width} x {header.height} is more than {_megapixels(max_pixels)}"
            )
        if header.animated:  # of which the decoder would give the last frame
            raise ImageError("unsupported", "an animated JPEG XL is not supported; convert it to PNG or GIF")
        raw = decode_apart(data)
    except JpegXlError as error:
        raise ImageError(error.code, str(error)) from error
    if raw.mode == "JPEG":  # the very file that was packed
        return decode(raw.data, max_pixels)
    if {raw.width, raw.height} != {header.width, header.height}:
        raise ImageError("corrupt", "its pixels are not as many as its header says")
    image = Image.frombytes(raw.mode, (raw.width, raw.height), raw.data)
    return Decoded(np.asarray(_to_rgb(image), dtype=np.uint8))  # upright, as the decoder gives it


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """-> the image with its header read and no pixel decoded."""
    if not data:
        raise ImageError("empty", "the file is empty")
    try:
        _silence_pillow()
        return Image.open(io.BytesIO(data), formats=formats_of(data))
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"the image is larger than {_megapixels(max_pixels)}") from error
    except UnidentifiedImageError as error:
        if data.startswith(_MAGIC) or any(one.signature.match(data) for one in READABLE):
            raise ImageError("corrupt", "it begins like an image, but its header cannot be read") from error
        for phone in UNREADABLE:
            if phone.signature.match(data):
                raise ImageError("unsupported", f"{phone.name} is read {phone.how}") from error
        head = data[:8192].removeprefix(b"\xef\xbb\xbf").lstrip()
        if head.startswith(b"<") and b"<svg" in head:
            raise ImageError("unsupported", _convert("SVG")) from error
        for signature, name in UNSUPPORTED:
            if signature.match(data):
                raise ImageError("unsupported", _convert(name)) from error
        read = ", ".join((*FORMATS, *(one.name for one in READABLE)))
        raise ImageError("not_an_image", f"not one of {read}") from error
    except MemoryError:
        raise
    except Exception as error:  # as above: struct.error, zlib.error, KeyError, ... of a broken header
        raise ImageError(
            _code_of(error), f"the header cannot be read ({str(error) or type(error).__name__})"
        ) from error


def formats_of(beginning: bytes) -> tuple[str, ...]:
    """-> the formats, by Pillow's names, that a file with this beginning may have: FORMATS, and one of a
    phone's where it begins like one, whose plugin is then loaded."""
    for one in READABLE:
        if one.plugin and one.signature.match(beginning):
            with _LOADING:  # two threads at once would register it twice
                _register(one.plugin)
            return (*FORMATS, one.name)
    return FORMATS


_LOADING = threading.Lock()


@functools.cache
def _register(plugin: str) -> None:
    module = importlib.import_module(plugin)
    if plugin == "pillow_heif":
        module.register_heif_opener(thumbnails=False)


def size_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """-> (width, height) of an image file, by its header, as it lies there: not turned upright.
    Raises anything that Pillow's plugins raise, and OSError."""
    with open(path, "rb") as file:
        beginning = file.read(32)
        file.seek(0)
        if _apart(beginning) is not None:
            return read_header(file.read())[:2]
        with Image.open(file, formats=formats_of(beginning)) as image:
            return image.size


def _convert(name: str) -> str:
    return f"{name} is not supported; convert it to PNG or JPEG"


def _check_scans(data: bytes, image: Image.Image) -> None:
    """Raises ImageError for a JPEG of so many scans that a few hundred bytes would cost minutes."""
    if image.format not in ("JPEG", "MPO"):
        return
    scans = data.count(_SCAN)  # within a scan's data, 0xff is always followed by 0
    if scans > MAX_SCANS or scans * image.width * image.height > MAX_SCANNED_PIXELS:
        raise ImageError("too_large", f"a JPEG of {scans} scans of {image.width} x {image.height} pixels")


def _code_of(error: Exception) -> str:
    return "truncated" if isinstance(error, EOFError) or _TRUNCATED.search(str(error)) else "corrupt"


@functools.cache
def _silence_pillow() -> None:
    """Once: Pillow warns and logs of odd metadata and oversize, which here become a status;
    catch_warnings is not thread-safe."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:g} megapixels"


def _decode_jpeg(data: bytes, image: Image.Image) -> Pixels | None:
    """-> Pillow's exact pixels, 1.6 times as fast, of an RGB or gray JPEG; None where only Pillow will do.

    Both use libjpeg-turbo; a file that makes simplejpeg complain goes to Pillow,
    whose verdict is the one that counts.
    """
    library = _simplejpeg()
    if library is None or image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    try:
        pixels: Pixels = library.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None


@functools.cache
def _simplejpeg() -> Any:
    """-> the module, or None: it comes with ffl-deploy[predict] and changes nothing but the speed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _orientation(image: Image.Image) -> int:
    """-> the EXIF orientation, 1 to 8; 1 (upright) where there is none or the EXIF block is broken,
    as viewers do."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    # a broken EXIF block raises struct.error, SyntaxError, TypeError, ...; the pixels are fine
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 2 to 4 are flips, 5 to 8 also swap the sides."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def pixels_of(image: Image.Image) -> Pixels:
    """-> uint8 RGB [height, width, 3] of an image that Pillow has opened, as `decode` gives its file.
    Raises ImageError."""
    return _upright(np.asarray(_to_rgb(image), dtype=np.uint8), _orientation(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB: transparency composited on BACKGROUND, 16-bit gray scaled, float refused."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):  # Pillow would clip everything above 255 to white
        return Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                "unsupported", "32-bit integer pixels have no defined white; save the image as 8 or 16 bit"
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(
            "unsupported", "floating-point pixels have no defined white; save the image as 8 or 16 bit"
        )
    try:
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
            return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            "unsupported", f"pixels of the kind {image.mode} cannot be made RGB; save the image as RGB"
        ) from error


def prepare(pixels: Pixels, preprocessing: Preprocessing) -> Pixels:
    """-> uint8 [height, width, 3]: what the network is fed.
    An image that already has the size is returned as it is."""
    height, width = preprocessing.height, preprocessing.width
    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels)
    resample = Image.Resampling[preprocessing.filter.upper()]
    box = None
    if preprocessing.resize == "crop":
        # One resize of the centre box gives what "resize the shorter side, then cut" gives,
        # without the large middle step.
        scale = min(image.width / width, image.height / height) * preprocessing.crop_fraction
        box_width, box_height = width * scale, height * scale
        # Rounding may put the box's edge a hair outside the image, which Pillow refuses.
        left, top = max(0.0, (image.width - box_width) / 2), max(0.0, (image.height - box_height) / 2)
        box = (left, top, min(left + box_width, image.width), min(top + box_height, image.height))
    return np.asarray(image.resize((width, height), resample, box=box))


def load(path: str | os.PathLike[str], preprocessing: Preprocessing | None = None) -> Pixels:
    """-> pixels of an image file, prepared for a network when `preprocessing` is given.
    Raises ImageError, OSError."""
    with open(path, "rb") as file:
        pixels = decode(file.read()).pixels
    return pixels if preprocessing is None else prepare(pixels, preprocessing)
