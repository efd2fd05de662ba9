"""A split: labelled images in a fixed order, held in memory or read from their files when asked for."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.host import available_cores
from ffl_deploy.images import ImageError, load, prepare
from ffl_deploy.preprocessing import Pixels, Preprocessing

Result = TypeVar("Result")
Problems = dict[str, str]
"""Path of an image -> why it cannot be read."""


class UnreadableImage(CheckError):
    """An image file that cannot be decoded, found when it was needed."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both as arguments, so that it can travel between processes
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return (
            f"{self.path} cannot be read ({self.reason}); mend it and go on, or start again with "
            "--skip-bad-images."
        )


class Split(ABC):
    """What training, evaluation and export ask of labelled images. labels: int64 [n]."""

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, rows: np.ndarray | slice) -> np.ndarray:
        """-> uint8 [n, height, width, 3]: the evaluation view of these rows. Raises UnreadableImage."""

    @abstractmethod
    def prepared(self, row: int) -> Pixels:
        """-> uint8 [height, width, 3]: the evaluation view of one row. Raises UnreadableImage."""

    @abstractmethod
    def original(self, row: int) -> Pixels:
        """-> uint8 [any height, any width, 3]: the image before it is brought to size.
        Raises UnreadableImage."""

    @abstractmethod
    def take(self, rows: np.ndarray) -> Split:
        """-> these rows alone."""


@dataclass(frozen=True)
class ArraySplit(Split):
    """Images in memory: uint8 [n, height, width, 3]. They are kept at the network's size,
    so that is their original too."""

    images: np.ndarray
    labels: np.ndarray

    def read(self, rows: np.ndarray | slice) -> np.ndarray:
        return self.images[rows]

    def prepared(self, row: int) -> Pixels:
        return self.images[row]

    def original(self, row: int) -> Pixels:
        return self.images[row]

    def take(self, rows: np.ndarray) -> ArraySplit:
        return ArraySplit(self.images[rows], self.labels[rows])


class Paths(Sequence[str]):
    """Many paths below one folder as three buffers, not objects: a million take tens of MB,
    and forked workers share them."""

    def __init__(self, root: str, names: bytes, starts: np.ndarray, ends: np.ndarray) -> None:
        self.root, self._names, self._starts, self._ends = root, names, starts, ends

    @classmethod
    def of(cls, root: str | os.PathLike[str], names: Iterable[str]) -> Paths:
        """names: relative to `root`."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(os.fspath(root), b"".join(encoded), ends[:-1], ends[1:])

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Paths: ...
    def __getitem__(self, row: int | slice) -> str | Paths:
        if isinstance(row, slice):
            return Paths(self.root, self._names, self._starts[row], self._ends[row])
        return os.path.join(self.root, self.name(row))

    def name(self, row: int) -> str:
        """-> a path relative to `root`."""
        return os.fsdecode(self._names[self._starts[row] : self._ends[row]])

    def take(self, rows: np.ndarray) -> Paths:
        """-> these rows (indices or a boolean mask) alone; the names are shared."""
        return Paths(self.root, self._names, self._starts[rows], self._ends[rows])


@dataclass(frozen=True)
class FileSplit(Split):
    """Images that stay in their files and are decoded at every reading."""

    paths: Paths
    labels: np.ndarray
    preprocessing: Preprocessing

    def read(self, rows: np.ndarray | slice) -> np.ndarray:
        numbers = range(*rows.indices(len(self))) if isinstance(rows, slice) else rows.tolist()
        images = np.empty((len(numbers), self.preprocessing.height, self.preprocessing.width, 3), np.uint8)

        def fill(indices: range) -> None:
            for index in indices:
                images[index] = self.prepared(numbers[index])

        in_threads(fill, len(numbers), chunk=8)
        return images

    def prepared(self, row: int) -> Pixels:
        return prepare(self.original(row), self.preprocessing)

    def original(self, row: int) -> Pixels:
        path = self.paths[row]
        reason = ""
        try:
            return load(path)
        except ImageError as error:
            reason = f"{error.code}: {error}"
        except OSError as error:
            reason = error.strerror or str(error)
        raise UnreadableImage(path, reason)

    def take(self, rows: np.ndarray) -> FileSplit:
        return FileSplit(self.paths.take(rows), self.labels[rows], self.preprocessing)


def stratified(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """-> (kept, held out): sorted indices; `share` of every class is held out, at least one image of each.

    Which ones depends on `seed` and the labels only. Raises UsageError where a class has a single image.
    """
    generator = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for members in np.split(
        np.argsort(labels, kind="stable"), np.cumsum(np.unique(labels, return_counts=True)[1])[:-1]
    ):
        if len(members) < 2:
            raise UsageError("every class needs at least 2 training images: one is held out for validation.")
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(generator.permutation(members)[:count])
    held_out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def read_readable(files: FileSplit) -> tuple[ArraySplit, Problems]:
    """Decode everything -> what can be read, and what cannot."""
    images = np.empty((len(files), files.preprocessing.height, files.preprocessing.width, 3), np.uint8)
    good = np.ones(len(files), bool)

    def fill(rows: range) -> Problems:
        problems: Problems = {}
        for row in rows:
            try:
                images[row] = files.prepared(row)
            except UnreadableImage as error:
                problems[error.path], good[row] = error.reason, False
        return problems

    problems = {path: reason for part in in_threads(fill, len(files)) for path, reason in part.items()}
    return ArraySplit(images if good.all() else images[good], files.labels[good]), problems


def in_threads(work: Callable[[range], Result], count: int, chunk: int = 256) -> list[Result]:
    """-> the results of `work` on 0..count-1, cut into ranges of `chunk`.
    Decoders release the interpreter lock."""
    cuts = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(work, cuts))
