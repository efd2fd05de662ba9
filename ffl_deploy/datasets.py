"""Images with labels: the digits, CIFAR's files, folders; and their three splits, held apart.

Training and export both read through `load_data`, so they see the same pixels in the same splits. Splits are
uint8 arrays, already prepared to the network's size. Nothing here imports torch, except torchvision for CIFAR's own files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from ffl_deploy.errors import UsageError
from ffl_deploy.images import SUFFIXES, ImageError, Preprocessing, load

CIFAR_STATISTICS = ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))  # of FFL's official code, 0..255


class DataSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which images a run uses, and how they are split and sized; stored in the run's configuration.

    source: "digits", "cifar10", "cifar100" or a folder with train/CLASS/* and test/CLASS/* (or val/).
    root: where CIFAR's files lie. image_size: side length in pixels; None takes the data's own.
    validation: share of the training images, per class, that is held out to choose the best epoch.
    """

    source: str = "digits"
    root: str | None = None
    image_size: int | None = None
    validation: float = 0.1
    split_seed: int = 0
    skip_bad_images: bool = False


@dataclass(frozen=True)
class Split:
    """images: uint8 [n, height, width, 3]; labels: int64 [n]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: np.ndarray | slice) -> np.ndarray:
        """-> uint8 [n, height, width, 3]: the images of these rows."""
        return self.images[rows]

    def take(self, indices: np.ndarray) -> Split:
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A data set, split. mean and std: per RGB channel of the training images, on the 0..255 scale.

    skipped: path -> reason, of unreadable images that were left out.
    """

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train: Split
    validation: Split
    test: Split
    skipped: dict[str, str] = field(default_factory=dict)


def load_data(spec: DataSpec) -> ImageData:
    """Read the data that `spec` names. Raises UsageError with what is wrong with it."""
    if spec.source == "digits":
        return _digits(spec)
    if spec.source in ("cifar10", "cifar100"):
        return _cifar(spec)
    return _folder(spec)


def stratified(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """-> (kept, held out): sorted indices; `share` of every class is held out, at least one image of each.

    Which ones depends on `seed` and the labels only. Raises UsageError where a class has a single image.
    """
    generator = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise UsageError("every class needs at least 2 training images: one is held out for validation.")
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(generator.permutation(members)[:count])
    held_out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _digits(spec: DataSpec) -> ImageData:
    """1,797 handwritten digits of 8x8 pixels (UCI optical recognition), which scikit-learn ships; 20 % are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(gray[..., None], 3, axis=3)
    labels = digits.target.astype(np.int64)
    development, test = stratified(labels, share=0.2, seed=0)
    return _assemble(
        "digits",
        tuple("0123456789"),
        spec,
        Split(images[development], labels[development]),
        None,
        Split(images[test], labels[test]),
    )


def _cifar(spec: DataSpec) -> ImageData:
    """CIFAR-10/100 from torchvision's files (md5-checked) under `spec.root`; downloads them where the network allows."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if spec.source == "cifar10" else CIFAR100
    root = Path(spec.root or "data").expanduser()
    try:
        train, test = (kind(root, train=part, download=not (root / kind.base_folder).is_dir()) for part in (True, False))
    except Exception as error:  # urllib, hashing and pickle each have their own
        raise UsageError(
            f"{spec.source} is not under {root} and cannot be downloaded ({error}); put torchvision's files there "
            f"({root / kind.base_folder}) or give a folder of images with --data DIR."
        ) from error
    return _assemble(
        spec.source,
        tuple(train.classes),
        spec,
        Split(train.data, np.asarray(train.targets, np.int64)),
        None,
        Split(test.data, np.asarray(test.targets, np.int64)),
        CIFAR_STATISTICS,
    )


def _folder(spec: DataSpec) -> ImageData:
    """DIR/train/CLASS/* with test/ or val/. With both, val/ is the validation split; else it is cut from train/."""
    root = Path(spec.source).expanduser()
    if not root.is_dir():
        raise UsageError(
            f"--data {spec.source}: there is no such folder; give a folder with train/CLASS/* and test/CLASS/*, "
            "or one of digits, cifar10, cifar100."
        )
    test_name = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_name is None:
        missing = "train/" if not (root / "train").is_dir() else "test/ (or val/)"
        raise UsageError(f"{root} has no {missing}; it needs train/CLASS/* and test/CLASS/* (or val/CLASS/*).")
    parts = {"train": "train", "test": test_name}
    if test_name == "test" and (root / "val").is_dir():
        parts["validation"] = "val"
    files = {part: list_class_folders(root / folder) for part, folder in parts.items()}
    classes = tuple(files["train"])
    for part, found in files.items():
        if set(found) != set(classes):
            only = sorted(set(classes) ^ set(found))
            raise UsageError(
                f"{root / 'train'} and {root / parts[part]} have different classes ({', '.join(only[:5])}"
                f"{', ...' if len(only) > 5 else ''}); give both the same class folders."
            )
    size = spec.image_size or _own_size([path for paths in files["train"].values() for path in paths])
    preprocessing = folder_preprocessing(size)
    skipped: dict[str, str] = {}
    splits = {part: _read_split(found, classes, preprocessing, skipped) for part, found in files.items()}
    if skipped and not spec.skip_bad_images:
        first = [f"{path} ({reason})" for path, reason in list(skipped.items())[:5]]
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise UsageError(
            f"{len(skipped)} images cannot be read: {'; '.join(first)}{more}. "
            "Mend them, or leave them out with --skip-bad-images."
        )
    for part, split in splits.items():
        empty = [classes[k] for k in range(len(classes)) if not np.any(split.labels == k)]
        if empty:
            raise UsageError(
                f"{root / parts[part]} has no readable image of {', '.join(empty[:5])}; add some or remove the class."
            )
    return _assemble(
        root.resolve().name, classes, spec, splits["train"], splits.get("validation"), splits["test"],
        preprocessing=preprocessing, skipped=skipped,
    )  # fmt: skip


def list_class_folders(folder: Path) -> dict[str, list[Path]]:
    """-> class name -> its image files (recursive), both sorted. Raises UsageError for no class or an empty one."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UsageError(f"{folder} has no class folders; put the images of each class into {folder}/CLASS/.")
    if len(classes) < 2 and folder.name == "train":
        raise UsageError(f"{folder} has one class only ({classes[0]}); a classifier needs at least two.")
    found = {
        name: sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        for name in classes
    }
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise UsageError(
            f"{folder / empty[0]} holds no images ({', '.join(SUFFIXES)}); add some or remove the folder"
            f"{f' ({len(empty)} class folders are empty)' if len(empty) > 1 else ''}."
        )
    return found


def folder_preprocessing(size: int) -> Preprocessing:
    """The evaluation view of a folder's images: the centre square, with ImageNet's usual border from 128 pixels on."""
    return Preprocessing(size, size, resize="crop", crop_fraction=0.875 if size >= 128 else 1.0)


def _own_size(paths: Sequence[Path]) -> int:
    """-> the side that suits these images: their median shorter side, a multiple of 8 from 8 to 64."""
    from PIL import Image

    sides = []
    for path in paths[:: max(1, len(paths) // 200)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except (OSError, ValueError, SyntaxError):
            continue  # reported with its reason when it is read
    return int(np.clip(np.median(sides) // 8 * 8, 8, 64)) if sides else 32


def _read_split(
    files: dict[str, list[Path]], classes: Sequence[str], preprocessing: Preprocessing, skipped: dict[str, str]
) -> Split:
    items = [(path, label) for label, name in enumerate(classes) for path in files[name]]

    def read(item: tuple[Path, int]) -> np.ndarray | str:
        try:
            return load(item[0], preprocessing)
        except ImageError as error:
            return f"{error.code}: {error}"
        except OSError as error:
            return error.strerror or str(error)

    images = np.empty((len(items), preprocessing.height, preprocessing.width, 3), np.uint8)
    good: list[int] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as pool:
        for index, result in enumerate(pool.map(read, items)):
            if isinstance(result, str):
                skipped[str(items[index][0])] = result
            else:
                images[len(good)] = result
                good.append(index)
    return Split(images[: len(good)], np.array([items[index][1] for index in good], np.int64))


def _assemble(
    name: str,
    classes: tuple[str, ...],
    spec: DataSpec,
    development: Split,
    validation: Split | None,
    test: Split,
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None,
    preprocessing: Preprocessing | None = None,
    skipped: dict[str, str] | None = None,
) -> ImageData:
    if validation is None:
        kept, held_out = stratified(development.labels, spec.validation, spec.split_seed)
        development, validation = development.take(kept), development.take(held_out)
    height, width = development.images.shape[1:3]
    if spec.image_size not in (None, height):
        resized = _resizer(Preprocessing(spec.image_size, spec.image_size))
        development, validation, test = resized(development), resized(validation), resized(test)
        height = width = spec.image_size
    mean, std = statistics or channel_statistics(development.images)
    return ImageData(
        name, classes, preprocessing or Preprocessing(height, width), mean, std, development, validation, test, skipped or {}
    )


def _resizer(preprocessing: Preprocessing) -> Callable[[Split], Split]:
    from ffl_deploy.images import prepare

    return lambda split: Split(np.stack([prepare(image, preprocessing) for image in split.images]), split.labels)


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """uint8 [n, h, w, 3] -> (mean, std) per channel, exact, on the 0..255 scale; a constant channel gets std 1."""
    values = np.arange(256)
    means, stds = [], []
    for channel in range(3):
        # From the histogram: exact integers and no float copy of the images.
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        mean = float((counts * values).sum() / counts.sum())
        std = float(np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum()))
        means.append(round(mean, 4))
        stds.append(round(std, 4) or 1.0)
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
