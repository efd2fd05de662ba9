"""Pictures that show nothing a classifier of photographs knows: what a model's familiarity is held to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

COUNT = 256
LETTERS = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:  ")


def noise(generator: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """-> uint8 [count, height, width, 3]: every value by itself."""
    return generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def flat(generator: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """-> one colour each."""
    colours = generator.integers(0, 256, (count, 1, 1, 3), dtype=np.uint8)
    return np.broadcast_to(colours, (count, height, width, 3)).copy()


def gradients(generator: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """-> from one colour to another, in any direction."""
    angle = generator.uniform(0, 2 * np.pi, (count, 1, 1))
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    along = np.cos(angle) * x + np.sin(angle) * y
    along = (along - along.min(axis=(1, 2), keepdims=True)) / np.ptp(along, axis=(1, 2), keepdims=True)
    ends = generator.uniform(0, 255, (2, count, 1, 1, 3))
    return (ends[0] + (ends[1] - ends[0]) * along[..., None]).astype(np.uint8)


def blobs(generator: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """-> soft spots of colour: 4x4 random values, enlarged."""
    from PIL import Image

    small = generator.normal(size=(count, 4, 4, 3))
    low = small.min(axis=(1, 2, 3), keepdims=True)
    small = 255 * (small - low) / np.ptp(small, axis=(1, 2, 3), keepdims=True)
    resize = (width, height), Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(one.astype(np.uint8)).resize(*resize)) for one in small])


def text(generator: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """-> lines of letters, one colour on another."""
    from PIL import Image, ImageDraw

    pictures = []
    for _ in range(count):
        paper, ink = (tuple(map(int, generator.integers(0, 256, 3))) for _ in range(2))
        page = Image.new("RGB", (width, height), paper)
        for top in range(0, height, 11):
            line = "".join(generator.choice(LETTERS, width // 4 + 1))
            ImageDraw.Draw(page).text((1, top), line, fill=ink)
        pictures.append(np.asarray(page))
    return np.stack(pictures)


KINDS: dict[str, Callable[[np.random.Generator, int, int, int], np.ndarray]] = {
    kind.__name__: kind for kind in (noise, flat, gradients, blobs, text)
}


def draw(kind: str, height: int, width: int, count: int = COUNT, seed: int = 0) -> np.ndarray:
    """-> uint8 [count, height, width, 3]; the same for the same seed."""
    return KINDS[kind](np.random.default_rng(seed), count, height, width)
