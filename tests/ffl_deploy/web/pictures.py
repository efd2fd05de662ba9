"""Pictures in the many forms that people have, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


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
