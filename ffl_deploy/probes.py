"""Made-up pictures in colour that travel with a run and its bundles: encoded, as training decoded and resized
them, and with PyTorch's logits.

A run's own images lie in a bundle at the network's size, and may be gray: swapped channels cannot show on
them, nor another decoder or an edited resize. Two pictures larger than the input show those; two of coloured
noise at its very size show borders and extreme values too. They hold nothing of the training data.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np

from ffl_deploy.errors import CheckError
from ffl_deploy.preprocessing import Preprocessing

FORMATS = ("PNG", "JPEG", "PNG", "PNG")  # of the pictures; the first two are larger than the input
COUNT = len(FORMATS)
PREFIX = "probes/"
LIMITS = {"PNG": 0.5, "JPEG": 2.0}
"""Largest mean difference of the pixels, in levels of 255. Another rounding in Pillow's fixed-point resize is
worth 0.1, another libjpeg 1; every other filter, crop or stretch 2 and more of the PNG."""


class Probes(NamedTuple):
    """files: COUNT encoded pictures; pixels: uint8 [COUNT, height, width, 3], what training's `decode` and
    `prepare` made of them; logits: float32 [COUNT, classes], PyTorch's, NaN where rounding decides them."""

    files: list[bytes]
    pixels: np.ndarray
    logits: np.ndarray

    def arrays(self) -> dict[str, Any]:
        """-> members of an .npz file."""
        return files_as_arrays(self.files) | {f"{PREFIX}pixels": self.pixels, f"{PREFIX}logits": self.logits}


MEMBERS = (*(f"{PREFIX}{index}" for index in range(COUNT)), f"{PREFIX}pixels", f"{PREFIX}logits")


def files_as_arrays(files: list[bytes]) -> dict[str, np.ndarray]:
    return {f"{PREFIX}{index}": np.frombuffer(file, np.uint8) for index, file in enumerate(files)}


def files_of(arrays: dict[str, np.ndarray]) -> list[bytes]:
    """The inverse of `files_as_arrays`; -> [] where there are none."""
    return [arrays[name].tobytes() for name in MEMBERS[:COUNT] if name in arrays]


def draw(size: Preprocessing) -> list[bytes]:
    """-> COUNT encoded pictures for a network of this input: a wide one and a high one of coloured patches,
    two of coloured noise. The same for every run."""
    generator = np.random.default_rng(17)
    height, width = size.height, size.width
    patches = [
        _patches(generator, *sides)
        for sides in ((2 * height + 3, 3 * width + 1), (3 * height + 1, 2 * width + 3))
    ]
    noise = [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(2)]
    return [_encoded(picture, form) for picture, form in zip([*patches, *noise], FORMATS, strict=True)]


def prepared(files: list[bytes], size: Preprocessing) -> np.ndarray:
    """-> uint8 [n, height, width, 3]: the pictures as the network is fed them here. Raises ImageError."""
    from ffl_deploy.images import decode, prepare

    return np.stack([prepare(decode(file).pixels, size) for file in files])


def check_pixels(probes: Probes, size: Preprocessing, where: str) -> None:
    """Raises CheckError where decoding and resizing the pictures here gives other pixels than it gave in
    training.

    where: what is checked, for the sentence.
    """
    import PIL

    from ffl_deploy.images import ImageError

    try:
        found = prepared(probes.files, size)
    except ImageError as error:
        raise CheckError(
            f"{where}: a sample picture cannot be decoded here ({error}); reinstall Pillow."
        ) from error
    for form, before, now in zip(FORMATS, probes.pixels, found, strict=True):
        off = float(np.abs(before.astype(np.int16) - now).mean())
        if off > LIMITS[form]:
            raise CheckError(
                f"{where}: a {form} picture decoded and resized here differs from what training was fed by "
                f"{off:.1f} of 255 levels on average (allowed {LIMITS[form]:g}): the preprocessing was "
                f"edited, or Pillow {PIL.__version__} computes it otherwise; install the Pillow that the "
                "bundle was exported with, or export it again."
            )


def _patches(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """-> uint8 [height, width, 3]: patches of one colour each, forty on a side or smaller, under a gentle
    slope of light."""
    side = max(2, min(height, width) // 40)
    colours = generator.integers(0, 256, (-(-height // side), -(-width // side), 3))
    picture = colours.repeat(side, axis=0).repeat(side, axis=1)[:height, :width]
    light = np.linspace(0.7, 1.0, width)[None, :, None]
    return np.asarray(picture * light).astype(np.uint8)


def _encoded(pixels: np.ndarray, form: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **({"quality": 90} if form == "JPEG" else {}))
    return buffer.getvalue()
