"""The same picture in two splits: an accuracy on images that were trained on says nothing about others."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ffl_deploy.data.splits import ArraySplit, Paths, Split, UnreadableImage, in_threads


class Twin(NamedTuple):
    """One picture, by its decoded pixels, in two splits. first, second: its files, below the data's
    folder."""

    splits: tuple[str, str]
    first: str
    second: str


class Printed(NamedTuple):
    """A split's images, their files, and prints of those: uint64 [n]."""

    images: Split
    files: Paths
    prints: np.ndarray


def find_twins(splits: dict[str, Printed], root: Path) -> list[Twin]:
    """-> the images of the second and third split that an earlier split holds too, pixel by pixel at the
    network's size.

    splits: by name, train, validation and test. Of images that stay on disk those are compared whose files
    are the same by their prints: the training images are not decoded for it.
    """
    found = []
    keys = {name: _keys(splits[name]) for name in ("train", "validation", "test") if name in splits}
    for one, other in itertools.combinations(keys, 2):
        order = np.argsort(keys[one], kind="stable")
        places = np.minimum(np.searchsorted(keys[one], keys[other], sorter=order), len(order) - 1)
        for row in np.flatnonzero(keys[one][order[places]] == keys[other]).tolist():
            first = int(order[places[row]])
            if _same(splits[one].images, first, splits[other].images, row):
                shown = (
                    _below(splits[name].files[number], root) for name, number in ((one, first), (other, row))
                )
                found.append(Twin((one, other), *shown))
    return found


def summary(twins: Iterable[Twin]) -> list[str]:
    """-> a line for each pair of splits that share pictures, with the first of them by name."""
    by_splits = itertools.groupby(sorted(twins), key=lambda twin: twin.splits)
    lines = []
    for (one, other), group in by_splits:
        members = list(group)
        count = f"{len(members)} pictures are" if len(members) > 1 else "1 picture is"
        lines.append(
            f"{count} both in {one} and in {other}, the first as {members[0].first} and {members[0].second}"
        )
    return lines


def _keys(split: Printed) -> np.ndarray:
    """-> uint64 [n]: equal for equal pictures, and hardly ever for others."""
    images = split.images
    if not isinstance(images, ArraySplit):
        return split.prints
    pixels = images.images

    def look(rows: range) -> list[int]:
        return [
            int.from_bytes(hashlib.blake2b(pixels[row].tobytes(), digest_size=8).digest(), "big")
            for row in rows
        ]

    return np.array([key for keys in in_threads(look, len(images)) for key in keys], np.uint64)


def _same(one: Split, row: int, other: Split, second: int) -> bool:
    try:
        return bool((one.prepared(row) == other.prepared(second)).all())
    except UnreadableImage:
        return False


def _below(path: str, root: Path) -> str:
    return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else path
