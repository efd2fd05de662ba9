"""What every runtime offers: pixels in, logits and probabilities out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np

from ffl_deploy.errors import CheckError


class Outputs(NamedTuple):
    """A batch's answers."""

    logits: np.ndarray  # float32 [n, classes]
    probabilities: np.ndarray  # float32 [n, classes]
    cam: np.ndarray | None = None  # float32 [n, h, w], where the bundle was exported with --cam
    embedding: np.ndarray | None = None  # float32 [n, features], where the bundle's graph gives it
    exit: np.ndarray | None = None  # int64 [n], of a cascade: 0 where its first exit answered, 1 the last

    familiarity: np.ndarray | None = None  # float32 [n], where the bundle was exported with --familiarity

    @property
    def finite(self) -> np.ndarray:
        """bool [n]: whether an image's logits and probabilities are numbers."""
        return np.isfinite(self.logits).all(axis=1) & np.isfinite(self.probabilities).all(axis=1)

    @property
    def all_finite(self) -> bool:
        """-> whether those of all images are: what `finite` says, at a tenth of its price."""
        # A sum of squares is a number where all of its terms are; where it is none, it may have overflowed.
        return all(
            isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())
            for values in (self.logits, self.probabilities)
        )

    def rows(self, chosen: slice) -> Outputs:
        """-> the answers of some of the images."""
        return Outputs._make(None if values is None else values[chosen] for values in self)

    @staticmethod
    def joined(parts: Sequence[Outputs]) -> Outputs:
        """-> the answers of consecutive batches as one."""
        return Outputs._make(
            None if columns[0] is None else np.concatenate(columns) for columns in zip(*parts, strict=True)
        )


class Session(ABC):
    """An open model. `run` may be called from several threads at once.

    runtime: the name it was opened by; version: of the runtime, down to the build where it tells; variant: of
    the bundle; computed: the precision that the processor computes in, where the runtime can tell (None: not
    known, take the file's); device: what runs it, for people; gpu: its name, where that is a GPU.
    """

    runtime: str
    variant: str
    version: str = ""
    computed: str | None = None
    device: str = "CPU"
    gpu: str = ""

    @abstractmethod
    def run(self, images: np.ndarray) -> Outputs:
        """images: uint8 [n, height, width, 3] -> Outputs with n rows.
        Raises CheckError where the runtime fails."""

    def warm_up_sizes(self, largest: int) -> list[int]:
        """-> the batches up to `largest` to run before anybody waits for an answer: whose first run takes
        longer."""
        return []

    def layer_precisions(self) -> dict[str, int]:
        """-> precision -> how many layers are computed in it; empty where the runtime does not tell."""
        return {}

    def close(self) -> None:  # noqa: B027  most runtimes have nothing to do
        """Give back what only this session holds; it cannot be used afterwards."""


def outputs_from(values: Mapping[str, np.ndarray]) -> Outputs:
    """-> Outputs by name; further outputs of a graph, which a bundle from elsewhere may have, are left out.

    Raises CheckError where logits or probabilities are not among them.
    """
    missing = [name for name in ("logits", "probabilities") if name not in values]
    if missing:
        raise CheckError(
            f"the model gives no output {missing[0]} (it gives {', '.join(values)}); export it with "
            "ffl-export."
        )
    return Outputs(**{name: values[name] for name in Outputs._fields if name in values})


def padded_sizes(largest: int) -> list[int]:
    """-> 1, 2, 4, ... and `largest`: the batches that a GPU computes, which others are padded to."""
    return sorted({1 << power for power in range(largest.bit_length())} | {largest})


class FixedBatchSession(Session):
    """A session on a graph with a static batch: takes any number of images, pads the last batch,
    and drops the padding."""

    def __init__(self, session: Session, size: int) -> None:
        self.runtime, self.variant = session.runtime, session.variant
        self.computed, self.device, self.version = session.computed, session.device, session.version
        self.gpu = session.gpu
        self._session, self._size = session, size

    def run(self, images: np.ndarray) -> Outputs:
        return Outputs.joined(
            [
                self._run_padded(images[start : start + self._size])
                for start in range(0, len(images), self._size)
            ]
        )

    def warm_up_sizes(self, largest: int) -> list[int]:
        return self._session.warm_up_sizes(self._size) and [1]

    def close(self) -> None:
        self._session.close()

    def _run_padded(self, images: np.ndarray) -> Outputs:
        padding = np.zeros((self._size - len(images), *images.shape[1:]), images.dtype)
        outputs = self._session.run(np.concatenate([images, padding]))
        return outputs.rows(slice(len(images)))
