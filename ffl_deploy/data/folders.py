"""Folders of images, DIR/train/CLASS/* and DIR/test/CLASS/* (or val/): found, checked,
and read or left on disk."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ffl_deploy.data.inputs import Inputs, PartInputs, file_prints
from ffl_deploy.data.splits import FileSplit, Paths, Problems, Split, in_threads, read_readable, stratified
from ffl_deploy.data.twins import Printed, Twin, find_twins
from ffl_deploy.errors import UsageError
from ffl_deploy.files import did_you_mean, shown
from ffl_deploy.images import FORMATS, MAX_PIXELS, SUFFIXES, ImageError, load, size_of
from ffl_deploy.preprocessing import ImageSize, Look, Preprocessing, sides

CLUTTER = ("thumbs.db", "desktop.ini")  # of operating systems; nobody misses it
VALIDATION = ("val", "valid", "validation")
"""What tools call the folder of validation images."""
TAIL = 4096  # bytes at the end of a file in which its end marker is looked for


class Listing(NamedTuple):
    """The image files of one part, class by class. labels: int64 [n], indices into `classes`; prints: uint64
    [n], see `file_prints`; left_out: what was no image by its name: reason -> files."""

    folder: Path
    classes: tuple[str, ...]
    paths: Paths
    labels: np.ndarray
    prints: np.ndarray
    left_out: Counter[str]

    def take(self, rows: np.ndarray) -> Listing:
        """-> these rows (indices or a boolean mask) alone."""
        return self._replace(paths=self.paths.take(rows), labels=self.labels[rows], prints=self.prints[rows])


class Cut(NamedTuple):
    """How a validation split is cut from the training images (see `stratified`)."""

    share: float
    seed: int


class FolderContent(NamedTuple):
    """The splits of a folder, and the images left out of them."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: Split
    validation: Split
    test: Split
    skipped: Problems
    left_out: dict[str, int]  # reason -> files
    inputs: Inputs
    twins: list[Twin]


def read_folder(
    parts: dict[str, Listing],
    root: Path,
    image_size: ImageSize | None,
    cut: Cut,
    memory_limit: int,
    skip_bad_images: bool,
    look: Look | None = None,
) -> FolderContent:
    """Read "train", "test" and "validation", which is cut from "train" where it is not among `parts`; `root`
    is what messages name files below.

    Where all images together, decoded, take at most `memory_limit` bytes they are read into memory. Otherwise
    they stay on disk: then validation and test images are decoded once, so that their number is certain, and
    training images are checked by header and end (see `check_file`). Raises UsageError for everything that is
    wrong, all unreadable images at once.
    """
    parts = with_classes_of_training(parts)
    inputs = Inputs({part.folder.name: PartInputs(part.paths, part.prints) for part in parts.values()})
    left_out = sum((part.left_out for part in parts.values()), Counter[str]())
    classes = parts["train"].classes
    preprocessing = folder_preprocessing(image_size or own_size(parts["train"].paths), look)
    if "validation" not in parts:
        # Cut by the names alone, so that it does not depend on which files are readable.
        single = [classes[k] for k in np.flatnonzero(np.bincount(parts["train"].labels) < 2)]
        if single:
            raise UsageError(
                f"{shown(parts['train'].folder)} has one image only of {shorten(single)}; one is held out "
                "for validation: add some."
            )
        kept, held_out = stratified(parts["train"].labels, cut.share, cut.seed)
        parts |= {"train": parts["train"].take(kept), "validation": parts["train"].take(held_out)}

    count = sum(len(part.labels) for part in parts.values())
    in_memory = count * preprocessing.height * preprocessing.width * 3 <= memory_limit
    skipped: Problems = {}
    splits: dict[str, Split] = {}
    readable: dict[str, Listing] = {}
    for name, part in parts.items():
        if in_memory:
            splits[name], problems = read_readable(FileSplit(part.paths, part.labels, preprocessing))
        else:
            splits[name], problems = leave_on_disk(
                part, preprocessing, check_file if name == "train" else decode_file
            )
        readable[name] = (
            part.take(np.array([path not in problems for path in part.paths], bool)) if problems else part
        )
        skipped |= problems
    if skipped and not skip_bad_images:
        raise unreadable(skipped)
    if not len(splits["validation"]):
        raise UsageError(
            f"{shown(parts['validation'].folder)} leaves no readable image for validation; add some."
        )
    for name in ("train", "test"):
        empty = [
            classes[k] for k in np.flatnonzero(np.bincount(splits[name].labels, minlength=len(classes)) == 0)
        ]
        if empty:
            raise UsageError(
                f"{shown(parts[name].folder)} has no readable image of {shorten(empty)}; add some or remove "
                "the class."
            )
    twins = find_twins(
        {name: Printed(splits[name], part.paths, part.prints) for name, part in readable.items()}, root
    )
    return FolderContent(
        classes,
        preprocessing,
        splits["train"],
        splits["validation"],
        splits["test"],
        skipped,
        dict(sorted(left_out.items())),
        inputs,
        twins,
    )


def find_parts(root: Path) -> dict[str, Path]:
    """-> "train", "test" and, where the folder holds its own, "validation" -> its folder; "train" alone where
    there is nothing but class folders (see flat.py). Raises UsageError."""
    if not root.is_dir():
        raise UsageError(
            f"--data {shown(root)}: there is no such folder; give a folder with CLASS/*, or with "
            f"train/CLASS/* and test/CLASS/*, or a CSV or Parquet list of images, or one of digits, "
            f"cifar10, cifar100.{did_you_mean(shown(root))}"
        )
    has = {name for name in ("train", "test", *VALIDATION) if (root / name).is_dir()}
    held_out = [name for name in VALIDATION if name in has]
    classes = set(subfolders(root)) - has
    # a class of trains among cars and buses is no part
    if not has or (classes and not any(subfolders(root / name) for name in has)):
        return {"train": require_whole(root)}
    if len(held_out) > 1:
        raise UsageError(
            f"{shown(root)} has {' and '.join(f'{name}/' for name in held_out)}; keep one of them."
        )
    if "train" not in has:
        raise UsageError(
            f"{shown(root)} has no train/; it needs train/CLASS/* and test/CLASS/* (or val/CLASS/*), or "
            "class folders alone."
        )
    if has == {"train"}:
        return {"train": root / "train"}
    found = {"train": root / "train", "test": root / ("test" if "test" in has else held_out[0])}
    return found | {"validation": root / held_out[0]} if "test" in has and held_out else found


def subfolders(folder: Path) -> list[str]:
    """-> names of the folders in `folder` that are not hidden."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def require_whole(root: Path) -> Path:
    """-> `root`, a folder of class folders. Raises UsageError where it is one part of a whole that is split
    already: its test images would never be seen."""
    parent = root.absolute().parent
    beside = [
        name for name in ("train", "test", *VALIDATION) if name != root.name and (parent / name).is_dir()
    ]
    if root.name in ("train", "test", *VALIDATION) and beside:
        raise UsageError(
            f"{shown(root)} lies beside {beside[0]}/ and is one part of {shown(parent)}. Did you mean "
            f"--data {shown(parent)}?"
        )
    return root


def find_images(folder: Path, held_out: bool = False) -> Listing:
    """-> the images in the class folders of `folder`, at any depth, sorted by class and path.

    Hidden files and folders (.DS_Store, macOS's ._* files) are passed over. held_out: these images are not
    trained on, so a class folder may be empty, which counts as none.
    Raises UsageError for no class or an empty one.
    """
    classes = subfolders(folder)
    if not classes:
        raise UsageError(
            f"{shown(folder)} has no class folders; put the images of each class into {shown(folder)}/CLASS/."
        )
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{shown(folder)} has a class folder whose name is not UTF-8 ({name!a}); rename it."
            ) from None
    names: list[str] = []
    counts: list[int] = []
    left_out: Counter[str] = Counter()
    for name in classes:
        found = sorted(_image_names(folder / name, name, left_out))
        names += found
        counts.append(len(found))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty and not (held_out and names):
        raise UsageError(
            f"{shown(folder / empty[0])} holds no images ({', '.join(SUFFIXES)}); add some or remove the "
            f"folder{f' ({len(empty)} class folders are empty)' if len(empty) > 1 else ''}."
        )
    classes, counts = [name for name in classes if name not in empty], [count for count in counts if count]
    if len(classes) < 2 and not held_out:
        raise UsageError(
            f"{shown(folder)} has one class only ({classes[0]}); a classifier needs at least two."
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    with os.scandir(folder) as entries:
        loose = sum(entry.name.lower().endswith(SUFFIXES) and entry.is_file() for entry in entries)
    left_out.update({"in no class folder": loose} if loose else {})
    paths = Paths.of(folder, names)
    return Listing(folder, tuple(classes), paths, labels, file_prints(paths), left_out)


def _image_names(folder: str | os.PathLike[str], prefix: str, left_out: Counter[str]) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _image_names(entry.path, name, left_out)
            elif entry.is_dir():  # it could lead around in a circle
                left_out["links to folders"] += 1
            elif not entry.is_file():
                left_out["broken links and special files"] += 1
            elif entry.name.lower().endswith(SUFFIXES):
                yield name
            elif entry.name.lower() not in CLUTTER:
                suffix = os.path.splitext(entry.name)[1].lower()
                left_out[f"called {suffix}" if suffix else "without a suffix"] += 1


def with_classes_of_training(parts: dict[str, Listing]) -> dict[str, Listing]:
    """-> the parts, their labels counted in the classes of the training images. A class may lack validation
    images; raises UsageError for one that lacks test images, or has none to train on."""
    train = parts["train"]
    found = {"train": train}
    for name, part in parts.items():
        unknown = sorted(set(part.classes) - set(train.classes))
        missing = [one for one in train.classes if one not in part.classes]
        if unknown:
            raise UsageError(
                f"{shown(part.folder)} has images of {shorten(unknown)}, which {shown(train.folder)} "
                f"has none of; add some there, or take these away.{_alike(unknown, missing)}"
            )
        if missing and name == "test":
            raise UsageError(
                f"{shown(part.folder)} has no images of {shorten(missing)}, so it could not be said how well "
                "they are told; move some of the training images there, leave the class out of both, or take "
                f"{shown(part.folder)} away: test images are then held out of {shown(train.folder)}."
            )
        label = np.array([train.classes.index(one) for one in part.classes], np.int64)
        found[name] = part._replace(classes=train.classes, labels=label[part.labels])
    return found


def _alike(names: Sequence[str], others: Sequence[str]) -> str:
    """-> a sentence where two names differ in how their accents are written alone, as macOS does."""
    plain = {unicodedata.normalize("NFC", name) for name in others}
    alike = [name for name in names if unicodedata.normalize("NFC", name) in plain]
    return (
        f" {alike[0]} is there with its accents written otherwise (NFC or NFD): rename one." if alike else ""
    )


def folder_preprocessing(size: ImageSize, look: Look | None = None) -> Preprocessing:
    """The evaluation view of a folder's images: the largest centre part of that shape, with ImageNet's usual
    border from 128 pixels on; or as `look` says."""
    width, height = sides(size)
    look = look or Look()
    usual = 0.875 if min(width, height) >= 128 else 1.0
    return Preprocessing(
        height,
        width,
        resize="crop",
        crop_fraction=usual if look.crop_fraction is None else look.crop_fraction,
        filter=look.filter or "bilinear",
    )


def own_size(paths: Sequence[str]) -> int:
    """-> the side that suits these images: their median shorter side, a multiple of 8 from 8 to 64."""
    side = median_side(paths)
    return int(np.clip(side // 8 * 8, 8, 64)) if side else 32


def median_side(paths: Sequence[str]) -> int:
    """-> pixels: the median shorter side of about 200 of these images, by their headers; 0 where none can be
    read."""
    sides = []
    for row in range(0, len(paths), max(1, len(paths) // 200)):
        try:
            sides.append(min(size_of(paths[row])))
        except Exception:  # Pillow's plugins raise what they like; reported with its reason when it is read
            continue
    return int(np.median(sides)) if sides else 0


def leave_on_disk(
    part: Listing, preprocessing: Preprocessing, check: Callable[[str], str | None]
) -> tuple[FileSplit, Problems]:
    """Run `check` (path -> what is wrong, or None) on every file, and keep the good ones' names."""

    def look(rows: range) -> list[tuple[int, str]]:
        return [(row, reason) for row in rows if (reason := check(part.paths[row])) is not None]

    found = {row: reason for checked in in_threads(look, len(part.labels)) for row, reason in checked}
    good = np.setdiff1d(np.arange(len(part.labels)), list(found))
    problems = {part.paths[row]: reason for row, reason in found.items()}
    return FileSplit(part.paths, part.labels, preprocessing).take(good), problems


def check_file(path: str) -> str | None:
    """-> why an image file cannot be read, or None, by its header and its end.

    That finds empty files, other formats and cut-off downloads at a fraction of the cost of decoding; damage
    inside the compressed pixels it cannot see. Where header or end look wrong, and for formats without an end
    marker, the image is decoded after all, so a good file is never refused.
    """
    try:
        with open(path, "rb") as file:
            with Image.open(file, formats=FORMATS) as image:
                fits, kind = image.width * image.height <= MAX_PIXELS, image.format
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            tail = file.read()
            file.seek(0)
            if fits and _ends_well(kind, file.read(12), size, tail):
                return None
    # Pillow's plugins raise almost anything on broken headers; decoding then gives the reason
    except Exception:
        return decode_file(path)
    return decode_file(path)


def decode_file(path: str) -> str | None:
    """-> why an image file cannot be read, or None, by reading it."""
    try:
        load(path)
    except ImageError as error:
        return f"{error.code}: {error}"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _ends_well(kind: str | None, head: bytes, size: int, tail: bytes) -> bool:
    if kind in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if kind == "PNG":
        return b"IEND" in tail
    return kind == "WEBP" and int.from_bytes(head[4:8], "little") + 8 <= size


def unreadable(problems: Problems) -> UsageError:
    """-> the report of unreadable images, the first five by name."""
    listed = "; ".join(f"{shown(path)} ({reason})" for path, reason in list(problems.items())[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    count, them = ("1 image", "it") if len(problems) == 1 else (f"{len(problems)} images", "them")
    return UsageError(
        f"{count} cannot be read: {listed}{more}. Mend {them}, or leave {them} out with --skip-bad-images."
    )


def shorten(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
