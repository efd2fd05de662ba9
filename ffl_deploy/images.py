"""Bytes -> uint8 RGB pixels: the one decoder and the one resizer of the whole project.

Training, export, batch prediction and the server all call `decode` and `prepare`, so a file looks the same to all of them.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Formats by Pillow's names. MPO is what many phones write: a JPEG with further pictures behind the first one.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 50_000_000
BACKGROUND = (255, 255, 255)  # what transparent pixels are composited on

Pixels = np.ndarray
"""uint8 array [height, width, 3], RGB."""


class ImageError(Exception):
    """An image that cannot be used. `code` is the machine-readable reason (the `status` of its row)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Decoded:
    """A decoded image. `pixels` is upright (EXIF orientation applied); `animated` says that only frame 0 was taken."""

    pixels: Pixels
    animated: bool = False

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How pixels of any size become the network's input; stored in run configurations and in bundles.

    `resize`: "stretch" scales both sides to `height` x `width`; "crop" scales the shorter side to
    `size / crop_fraction` and cuts out the centre (torchvision's Resize + CenterCrop with 0.875 = 256 -> 224).
    """

    height: int
    width: int
    resize: Literal["stretch", "crop"] = "crop"
    crop_fraction: float = 1.0
    filter: Literal["box", "bilinear", "bicubic", "lanczos"] = "bilinear"


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode the first frame of an encoded image.

    Args: data: the whole file. max_pixels: refused by the header, before any pixel is decoded.
    Raises ImageError with code `empty`, `not_an_image`, `too_large`, `truncated`, `corrupt` or `unsupported`.
    """
    if not data:
        raise ImageError("empty", "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oversize and odd metadata; the checks below decide
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"the image is larger than {max_pixels // 1_000_000} megapixels") from error
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", f"not one of {', '.join(FORMATS)}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageError("corrupt", f"the header cannot be read ({error})") from error
    with image:
        if image.width * image.height > max_pixels:
            raise ImageError("too_large", f"{image.width} x {image.height} is more than {max_pixels // 1_000_000} megapixels")
        if image.width == 0 or image.height == 0:
            raise ImageError("corrupt", "the image has no pixels")
        animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            pixels = np.asarray(_to_rgb(upright), dtype=np.uint8)
        except ImageError:
            raise
        except Exception as error:  # Pillow's plugins raise almost anything on hostile bytes; each becomes a row
            text = str(error).lower()
            code = "truncated" if "truncated" in text or "eof" in text or isinstance(error, EOFError) else "corrupt"
            raise ImageError(code, f"the pixels cannot be decoded ({str(error) or type(error).__name__})") from error
    return Decoded(pixels, animated)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB: transparency composited on BACKGROUND, 16-bit gray scaled, float refused."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("unsupported", "32-bit integer pixels have no defined white")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("unsupported", "floating-point pixels have no defined white; save it as 8 or 16 bit")
    return image.convert("RGB")


def prepare(pixels: Pixels, preprocessing: Preprocessing) -> Pixels:
    """-> uint8 [height, width, 3]: what the network is fed. An image that already has the size is returned as it is."""
    height, width = preprocessing.height, preprocessing.width
    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels)
    resample = Image.Resampling[preprocessing.filter.upper()]
    box = None
    if preprocessing.resize == "crop":
        # One resize of the centre box gives what "resize the shorter side, then cut" gives, without the large middle step.
        scale = min(image.width / width, image.height / height) * preprocessing.crop_fraction
        box_width, box_height = width * scale, height * scale
        left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
        box = (left, top, min(left + box_width, image.width), min(top + box_height, image.height))
    return np.asarray(image.resize((width, height), resample, box=box))


def load(path: str | os.PathLike[str], preprocessing: Preprocessing | None = None) -> Pixels:
    """-> pixels of an image file, prepared for a network when `preprocessing` is given. Raises ImageError, OSError."""
    with open(path, "rb") as file:
        pixels = decode(file.read()).pixels
    return pixels if preprocessing is None else prepare(pixels, preprocessing)
