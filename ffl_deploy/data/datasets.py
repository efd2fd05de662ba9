"""Which images a run uses: the digits, CIFAR's files, a folder or a list, in three splits held apart.

Training and export both read through `load_data`, so they see the same pixels in the same splits.
Nothing here imports torch, except torchvision for CIFAR's own files (cifar.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np

from ffl_deploy.arrays import read_arrays
from ffl_deploy.data import NAMED
from ffl_deploy.data.flat import read_flat
from ffl_deploy.data.folders import Cut, find_images, find_parts, read_folder, shorten, unreadable
from ffl_deploy.data.inputs import LABELS, Inputs
from ffl_deploy.data.lists import choose_columns, is_list, label_prints, read_list
from ffl_deploy.data.splits import ArraySplit, FileSplit, Problems, Split, read_readable, stratified
from ffl_deploy.data.twins import Twin
from ffl_deploy.errors import UsageError
from ffl_deploy.host import available_memory
from ffl_deploy.images import prepare
from ffl_deploy.preprocessing import ImageSize, Look, Preprocessing, sides

__all__ = [
    "ArraySplit",
    "DataSpec",
    "FileSplit",
    "ImageData",
    "Split",
    "channel_statistics",
    "load_data",
    "stratified",
]

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation per RGB channel, on the 0..255 scale."""

CIFAR_STATISTICS: Statistics = ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))  # of FFL's official code
# what published weights expect
IMAGENET_STATISTICS: Statistics = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
LARGE = 128  # pixels; from this side on, images are photographs for ImageNet's backbones
STATISTICS_SAMPLE = 20_000  # images


class DataSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which images a run uses, and how they are split and sized; stored in the run's configuration.

    source: "digits", "cifar10", "cifar100", a folder with CLASS/*, or with
    train/CLASS/* and test/CLASS/* (or val/), or a list of images.
    root: where CIFAR's files lie, or a list's images where they are not beside it. column, label_column: of a
    list whose columns have names of their own. image_size: side in pixels, or (width, height); None takes the
    data's own. validation: share of the training images, per class, that is held out to choose the best
    epoch. calibration: share of those, per class, that chooses no epoch either and calibrates what export
    promises. look: of weights that the network starts from.
    """

    source: str = "digits"
    root: str | None = None
    image_size: ImageSize | None = None
    validation: float = 0.1
    split_seed: int = 0
    skip_bad_images: bool = False
    column: str | None = None
    label_column: str | None = None
    calibration: float = 0.0
    look: Look | None = None

    @property
    def folder(self) -> str:
        """Where the images lie that a folder or a list names."""
        if is_list(self.source):
            return os.path.expanduser(self.root or os.path.dirname(self.source) or ".")
        return os.path.expanduser(self.source)

    def moved(self, place: str) -> DataSpec:
        """-> the same data at `place`: the folder, a list or the folder of a list, or CIFAR's files."""
        if self.source in NAMED:
            return msgspec.structs.replace(self, root=place)
        if not is_list(self.source):
            return msgspec.structs.replace(self, source=place)
        name = os.path.basename(self.source)
        table = os.path.join(place, name) if os.path.isdir(place) else place
        root = self.root and os.path.normpath(
            os.path.join(os.path.dirname(table), os.path.relpath(self.root, os.path.dirname(self.source)))
        )
        return msgspec.structs.replace(self, source=table, root=root)


@dataclass(frozen=True)
class ImageData:
    """A data set, split. mean and std: per RGB channel of the training images, on the 0..255 scale.

    skipped: path -> reason, of unreadable images that were left out; left_out: reason -> how many files a
    folder holds that are no images by their names; inputs: its files as they were read; twins: pictures in
    two splits; split_here: whether the test images were held out of a folder that has none apart. These three
    are of folders and lists alone. calibration: held-out images that choose nothing, where they were asked
    for.
    """

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train: Split
    validation: Split
    test: Split
    skipped: Problems = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    inputs: Inputs | None = None
    twins: list[Twin] = field(default_factory=list)
    split_here: bool = False
    calibration: Split | None = None


def load_data(spec: DataSpec, memory_limit: int | None = None) -> ImageData:
    """Read the data that `spec` names. Raises UsageError with what is wrong with it.

    memory_limit: bytes; a folder whose decoded images need more stays on disk. A quarter of the available
    memory if not given. It decides nothing but that: splits, pixels and statistics are the same either way.
    """
    if spec.source == "digits":
        data = _digits(spec)
    elif spec.source in NAMED:
        data = _cifar(spec)
    else:
        data = _files(spec, available_memory() // 4 if memory_limit is None else memory_limit)
    return _with_calibration(data, spec) if spec.calibration else data


def _with_calibration(data: ImageData, spec: DataSpec) -> ImageData:
    """-> the data with a part of each class's validation images set apart. Raises UsageError."""
    labels = data.validation.labels
    single = [data.classes[k] for k in np.flatnonzero(np.bincount(labels, minlength=len(data.classes)) == 1)]
    if single:
        raise UsageError(
            f"the validation split has one image only of {shorten(single)}, and --calibration-split sets one "
            "apart; give more with --validation, or leave --calibration-split out."
        )
    kept, apart = stratified(labels, spec.calibration, spec.split_seed)
    return replace(data, validation=data.validation.take(kept), calibration=data.validation.take(apart))


def _digits(spec: DataSpec) -> ImageData:
    """1,797 handwritten digits of 8x8 pixels, 0..16 (UCI optical recognition, as scikit-learn ships them;
    digits-LICENSE.txt beside the file); 20 % are the test set."""
    digits = read_arrays(Path(__file__).with_name("digits.npz"), ("images", "labels"))
    gray = np.round(digits["images"] * (255 / 16)).astype(np.uint8)
    images = ArraySplit(np.repeat(gray[..., None], 3, axis=3), digits["labels"].astype(np.int64))
    development, test = stratified(images.labels, share=0.2, seed=0)
    return _from_arrays(spec, tuple("0123456789"), images.take(development), images.take(test), None)


def _cifar(spec: DataSpec) -> ImageData:
    """CIFAR-10/100 from torchvision's files, normalised as FFL's official code does."""
    from ffl_deploy.data.cifar import read_cifar

    classes, development, test = read_cifar(spec.source, Path(spec.root or "data").expanduser())
    return _from_arrays(spec, classes, development, test, CIFAR_STATISTICS)


def _from_arrays(
    spec: DataSpec,
    classes: tuple[str, ...],
    development: ArraySplit,
    test: ArraySplit,
    statistics: Statistics | None,
) -> ImageData:
    height, width = development.images.shape[1:3]
    preprocessing = Preprocessing(height, width)
    if spec.image_size is not None:
        width, height = sides(spec.image_size)
        look = spec.look or Look()
        preprocessing = Preprocessing(
            height, width, crop_fraction=look.crop_fraction or 1.0, filter=look.filter or "bilinear"
        )
        development, test = _resized(development, preprocessing), _resized(test, preprocessing)
    kept, held_out = stratified(development.labels, spec.validation, spec.split_seed)
    train = development.take(kept)
    mean, std = looked_for(spec.look) or statistics or channel_statistics(train.images)
    return ImageData(spec.source, classes, preprocessing, mean, std, train, development.take(held_out), test)


def _resized(split: ArraySplit, preprocessing: Preprocessing) -> ArraySplit:
    if split.images.shape[1:3] == (preprocessing.height, preprocessing.width):
        return split
    images = np.empty((len(split), preprocessing.height, preprocessing.width, 3), np.uint8)
    for row, image in enumerate(split.images):
        images[row] = prepare(image, preprocessing)
    return ArraySplit(images, split.labels)


def require_there(spec: DataSpec) -> None:
    """Raise UsageError where a folder or list is not there, or is none: at once, before anything is read."""
    if is_list(spec.source):
        choose_columns(Path(spec.source).expanduser(), spec.column, spec.label_column)
    elif spec.source not in NAMED:
        find_parts(Path(spec.source).expanduser())


def _files(spec: DataSpec, memory_limit: int) -> ImageData:
    """The images of a folder, or of a list."""
    source, folder = Path(spec.source).expanduser(), Path(spec.folder)
    cut, listed = Cut(spec.validation, spec.split_seed), is_list(spec.source)
    if listed:
        columns = choose_columns(source, spec.column, spec.label_column)
        parts = read_list(source, folder, columns, spec.skip_bad_images)
    else:
        parts = {name: find_images(part, name != "train") for name, part in find_parts(source).items()}
    split_here = "test" not in parts
    content = (
        read_flat(parts["train"], spec.image_size, cut, memory_limit, spec.skip_bad_images, spec.look)
        if split_here
        else read_folder(parts, folder, spec.image_size, cut, memory_limit, spec.skip_bad_images, spec.look)
    )
    if listed:
        content.inputs.parts[LABELS] = label_prints(parts.values())
    mean, std = looked_for(spec.look) or folder_statistics(
        content.train, content.preprocessing, spec.skip_bad_images
    )
    return ImageData(
        source.stem if listed else source.resolve().name, content.classes, content.preprocessing, mean, std,
        content.train, content.validation, content.test, content.skipped,
        content.left_out, content.inputs, content.twins, split_here,
    )  # fmt: skip


def looked_for(look: Look | None) -> Statistics | None:
    """-> mean and standard deviation that weights want, on the 0..255 scale."""
    if look is None or look.mean is None or look.std is None:
        return None
    red, green, blue = (round(255 * value, 4) for value in look.mean)
    stds = [round(255 * value, 4) for value in look.std]
    return (red, green, blue), (stds[0], stds[1], stds[2])


def folder_statistics(train: Split, preprocessing: Preprocessing, skip_bad_images: bool) -> Statistics:
    """-> ImageNet's from 128 pixels on; else of the training images,
    of STATISTICS_SAMPLE evenly spaced ones at most.

    Raises UsageError for what cannot be decoded, unless `skip_bad_images` leaves it out.
    """
    if preprocessing.height >= LARGE:
        return IMAGENET_STATISTICS
    rows = np.unique(
        np.linspace(0, len(train) - 1, min(len(train), STATISTICS_SAMPLE)).round().astype(np.int64)
    )
    if not isinstance(train, FileSplit):
        return channel_statistics(train.read(rows))
    sample, problems = read_readable(train.take(rows))
    if problems and not skip_bad_images:
        raise unreadable(problems)
    return channel_statistics(sample.images)


def channel_statistics(images: np.ndarray) -> Statistics:
    """uint8 [n, h, w, 3] -> (mean, std) per channel, exact, on the 0..255 scale;
    a constant channel gets std 1."""
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
