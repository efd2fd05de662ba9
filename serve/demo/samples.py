"""The golden samples as examples to pick from, and what they tell about how a drawn digit has to look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ffl_deploy.bundle import Bundle
from ffl_deploy.bundle_files import GoldenSamples
from ffl_deploy.preprocessing import Pixels

MAX_EXAMPLES = 10
MAX_DRAWN_SIZE = 64  # pixels: digits and the like; a gray photograph is not something one draws


def pick(golden: GoldenSamples) -> list[int]:
    """-> indices of the examples: the first of every class, then the second of every class, ...;
    at most MAX_EXAMPLES."""
    turn = [int((golden.labels[:i] == golden.labels[i]).sum()) for i in range(len(golden.labels))]
    return sorted(sorted(range(len(turn)), key=lambda i: (turn[i], i))[:MAX_EXAMPLES])


def example_names(bundle: Bundle) -> list[str]:
    """-> what each example is called, for who cannot see it."""
    golden = bundle.golden()
    labels = [int(golden.labels[index]) for index in pick(golden)]
    return [  # of a user's own golden images the class is not known
        f"Example {number}{f': {bundle.classes[label]}' if label >= 0 else ''}"
        for number, label in enumerate(labels, start=1)
    ]


def write_examples(bundle: Bundle, folder: Path) -> list[Path]:
    """Write examples as PNG files of the network's size, so that they reach the network unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    golden = bundle.golden()
    paths = []
    for number, index in enumerate(pick(golden), start=1):
        paths.append(folder / f"example-{number:02d}.png")
        Image.fromarray(golden.images[index]).save(paths[-1])
    return paths


@dataclass(frozen=True)
class DrawingStyle:
    """How a drawing becomes what the network knows. `light_on_dark`: ink is light. `extent`:
    ink's longer side / image side."""

    light_on_dark: bool
    extent: float


def drawing_style(bundle: Bundle) -> DrawingStyle | None:
    """-> the style of small, all-gray golden samples, or None where drawing makes no sense."""
    images = bundle.golden().images
    if max(images.shape[1:3]) > MAX_DRAWN_SIZE or not (images == images[..., :1]).all():
        return None
    gray = images[..., 0].astype(np.float32) / 255
    border = np.concatenate(
        [gray[:, 0].ravel(), gray[:, -1].ravel(), gray[:, :, 0].ravel(), gray[:, :, -1].ravel()]
    )
    light_on_dark = bool(np.median(border) < 0.5)
    ink = gray if light_on_dark else 1 - gray
    extents = [
        max(np.ptp(np.nonzero(mask.any(axis=axis))[0]) + 1 for axis in (0, 1)) / len(mask)
        for mask in ink > 0.25
        if mask.any()
    ]
    return DrawingStyle(light_on_dark, float(np.median(extents)) if extents else 1.0)


def frame_drawing(pixels: Pixels, style: DrawingStyle) -> Pixels | None:
    """A drawing, dark on white, uint8 RGB -> a square image in the samples' style,
    or None when nothing was drawn.

    The ink is centred and framed as large as the samples are: people draw anywhere,
    the network has seen one place.
    """
    ink = 255 - pixels.min(axis=2)
    rows, columns = np.nonzero(ink.max(axis=1) > 64)[0], np.nonzero(ink.max(axis=0) > 64)[0]
    if not len(rows):
        return None
    drawn = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(round(max(drawn.shape) / style.extent), *drawn.shape)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - drawn.shape[0]) // 2, (side - drawn.shape[1]) // 2
    square[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn
    gray = square if style.light_on_dark else 255 - square
    return np.repeat(gray[..., None], 3, axis=2)
