"""A folder of CLASS/* alone, as people have their own photographs: split here into three parts.

A fifth of each class is the test set, and of the rest `share` is the validation split. Which photographs
these are depends on their content: a file that is renamed or copied elsewhere stays in its part, and adding
some moves only what lies at a border. The same picture, twice in the folder, is never in two parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ffl_deploy.data.folders import (
    Cut,
    FolderContent,
    Listing,
    folder_preprocessing,
    own_size,
    shorten,
    unreadable,
)
from ffl_deploy.data.inputs import Inputs, PartInputs
from ffl_deploy.data.splits import (
    ArraySplit,
    FileSplit,
    Problems,
    Split,
    UnreadableImage,
    in_threads,
    read_readable,
)
from ffl_deploy.errors import UsageError
from ffl_deploy.files import shown
from ffl_deploy.preprocessing import ImageSize, Look

TEST_SHARE = 0.2
PARTS = ("test", "validation", "train")


def read_flat(
    part: Listing,
    image_size: ImageSize | None,
    cut: Cut,
    memory_limit: int,
    skip_bad_images: bool,
    look: Look | None = None,
) -> FolderContent:
    """Read the images of FOLDER/CLASS/* and split them. Every image is decoded once, since the
    same picture may lie in two files; beyond `memory_limit` bytes it is not kept. Raises UsageError as
    `read_folder`, and for a class with fewer than three different pictures."""
    inputs = Inputs({"all": PartInputs(part.paths, part.prints)})
    preprocessing = folder_preprocessing(image_size or own_size(part.paths), look)
    files = FileSplit(part.paths, part.labels, preprocessing)

    # the images, or their names, and which of them are one picture
    images: Split
    if len(files) * preprocessing.height * preprocessing.width * 3 <= memory_limit:
        images, problems = read_readable(files)
        keys = picture_keys(images)
        good = np.array([path not in problems for path in part.paths], bool)
    else:
        keys, good, problems = keys_on_disk(files)
        images = files.take(good)
    if problems and not skip_bad_images:
        raise unreadable(problems)

    readable = part.take(good)
    rows = divide(readable.labels, readable.prints, keys, cut)
    lacking = [
        name
        for k, name in enumerate(part.classes)
        if any(not (readable.labels[rows[one]] == k).any() for one in PARTS)
    ]
    if lacking:
        raise UsageError(
            f"{shown(part.folder)} has fewer than three different pictures of {shorten(lacking)}; training, "
            "validation and test need one each: add some."
        )
    train, validation, test = (images.take(rows[name]) for name in ("train", "validation", "test"))
    return FolderContent(
        part.classes, files.preprocessing, train, validation, test, problems,
        dict(sorted(part.left_out.items())), inputs, [],
    )  # fmt: skip


def picture_keys(images: ArraySplit) -> np.ndarray:
    """-> uint64 [n]: equal for equal pictures at the network's size."""

    def look(rows: range) -> list[int]:
        return [_key(images.images[row]) for row in rows]

    return np.array([key for keys in in_threads(look, len(images)) for key in keys], np.uint64)


def keys_on_disk(files: FileSplit) -> tuple[np.ndarray, np.ndarray, Problems]:
    """-> (uint64 [readable]: as `picture_keys`, bool [n]: which files are readable, what is wrong with the
    others)."""

    def look(rows: range) -> list[tuple[int, str]]:
        found = []
        for row in rows:
            try:
                found.append((_key(files.prepared(row)), ""))
            except UnreadableImage as error:
                found.append((0, error.reason))
        return found

    looked = [one for part in in_threads(look, len(files)) for one in part]
    good = np.array([not reason for _, reason in looked], bool)
    keys = np.array([key for key, reason in looked if not reason], np.uint64)
    return keys, good, {files.paths[row]: reason for row, (_, reason) in enumerate(looked) if reason}


def _key(pixels: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "big")


def divide(
    labels: np.ndarray, prints: np.ndarray, keys: np.ndarray, cut: Cut, test_share: float = TEST_SHARE
) -> dict[str, np.ndarray]:
    """-> "test", "validation", "train" -> sorted rows.

    Args: labels: int64 [n]; prints: uint64 [n], of the files' content: what comes first by them is held out;
    keys: uint64 [n], equal where the pictures are, which then stay together, over classes too.
    """
    _, group = np.unique(keys, return_inverse=True)
    order = np.full(group.max(initial=-1) + 1, np.iinfo(np.uint64).max)
    np.minimum.at(order, group, prints * np.uint64(2 * cut.seed + 1))  # odd: another order for another seed
    part_of = np.full(len(order), -1)
    for label in np.unique(labels):
        members, counts = np.unique(group[labels == label], return_counts=True)
        in_order = members[np.argsort(order[members], kind="stable")].tolist()
        sizes = dict(zip(members.tolist(), counts.tolist(), strict=True))
        _divide_class(in_order, sizes, part_of, cut.share, test_share)
    return {name: np.flatnonzero(part_of[group] == number) for number, name in enumerate(PARTS)}


def _divide_class(
    members: Sequence[int], counts: dict[int, int], part_of: np.ndarray, share: float, test_share: float
) -> None:
    """Give each group of `members`, in this order, a part in `part_of`, as far as another class has not."""
    images = sum(counts.values())
    test = max(1, round(test_share * images))
    wanted = [test, max(1, round(share * (images - test))), images]
    have = [sum(counts[one] for one in members if part_of[one] == number) for number in range(len(PARTS))]
    free = [one for one in members if part_of[one] == -1]
    number = 0
    for position, one in enumerate(free):
        # on to the next part where this one is full, or where each later one needs one of those that are left
        while number < 2 and (
            have[number] >= wanted[number]
            or (have[number] and len(free) - position <= sum(not count for count in have[number + 1 :]))
        ):
            number += 1
        part_of[one] = number
        have[number] += counts[one]
