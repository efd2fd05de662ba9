"""The images of the kit: CIFAR-100 as the bytes of its WebP files, in one .npz."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ffl_deploy.data.datasets import ArraySplit, ImageData
from ffl_deploy.errors import UsageError
from ffl_deploy.files import replace_file
from ffl_deploy.images import Preprocessing

PARTS = ("train", "test")


def pack(folder: Path, counts: dict[str, int], target: Path) -> None:
    """folder: PART/CLASS/*; counts: images of each part, as many of each class -> `target`."""
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    arrays: dict[str, np.ndarray] = {"classes": np.array(classes)}
    for part in PARTS:
        each, contents, labels = counts[part] // len(classes), [], []
        for label, name in enumerate(classes):
            files = sorted((folder / part / name).iterdir())[:each]
            if len(files) < each:
                raise UsageError(f"{folder / part / name} holds {len(files)} images, {each} are needed.")
            contents += [file.read_bytes() for file in files]
            labels += [label] * each
        arrays[f"{part}/bytes"] = np.frombuffer(b"".join(contents), np.uint8)
        arrays[f"{part}/ends"] = np.cumsum([len(content) for content in contents])
        arrays[f"{part}/labels"] = np.array(labels, np.int64)
    with replace_file(target) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def unpack(packed: Path, folder: Path) -> int:
    """Write the files again as PART/CLASS/*; -> how many."""
    with np.load(packed) as arrays:
        classes = arrays["classes"].tolist()
        for name in classes:
            for part in PARTS:
                (folder / part / name).mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            content, start = arrays[f"{part}/bytes"].tobytes(), 0
            pairs = zip(arrays[f"{part}/ends"].tolist(), arrays[f"{part}/labels"].tolist(), strict=True)
            for number, (end, label) in enumerate(pairs):
                (folder / part / classes[label] / f"{number:05d}.webp").write_bytes(content[start:end])
                start = end
        return sum(len(arrays[f"{part}/labels"]) for part in PARTS)


def decoded(packed: Path | None, images: int = 0) -> ImageData:
    """-> the kit's images in memory, all or the first so many of every class; noise of the same shape
    without."""
    if packed is None:
        draws = np.random.default_rng(0)
        pixels = {part: draws.integers(0, 256, (1200, 32, 32, 3), np.uint8) for part in PARTS}
        splits = {part: ArraySplit(values, np.arange(1200) % 100) for part, values in pixels.items()}
        return image_data("noise", tuple(map(str, range(100))), splits)
    with np.load(packed) as arrays:
        classes, splits = tuple(arrays["classes"].tolist()), {}
        for part in PARTS:
            content, ends = arrays[f"{part}/bytes"].tobytes(), arrays[f"{part}/ends"].tolist()
            labels, starts = arrays[f"{part}/labels"], [0, *ends[:-1]]
            rows = np.arange(len(labels)) if not images else first_of_each(labels, images)
            pixels = [
                np.asarray(Image.open(io.BytesIO(content[starts[k] : ends[k]])).convert("RGB")) for k in rows
            ]
            splits[part] = ArraySplit(np.stack(pixels), labels[rows])
    return image_data("CIFAR-100 (part)", classes, splits)


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """-> the rows of the first `count` images of each class, in order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == k)[:count] for k in np.unique(labels)]))


def image_data(name: str, classes: tuple[str, ...], splits: dict[str, ArraySplit]) -> ImageData:
    train, test = splits["train"], splits["test"]
    pixels = train.images.reshape(-1, 3).astype(np.float64)
    mean, std = (tuple(float(value) for value in values) for values in (pixels.mean(0), pixels.std(0)))
    return ImageData(name, classes, Preprocessing(32, 32), mean, std, train, test, test)
