"""Is an image like those that the network learned from? The graph's output `familiarity` says how much, a
variant's threshold from where on it is not.

The threshold is found by `ffl-export --familiarity` on held-out images and kept in the manifest; here it is
applied. docs/decisions.md says what it promises and what it does not. NumPy alone.
"""

from __future__ import annotations

import msgspec
import numpy as np

UNFAMILIAR = "unfamiliar: unlike the images that the network learned from"
"""The remark of a row that has an answer all the same."""


class Separation(msgspec.Struct, frozen=True):
    """How far drawn pictures of one kind are told from test images. auroc: the chance that a test image is
    the more familiar one of two; called_familiar: the share of the pictures that the threshold lets pass."""

    auroc: float
    called_familiar: float


class Familiarity(msgspec.Struct, frozen=True):
    """The threshold of one variant's output `familiarity`, below which an image is unfamiliar.

    kept: the share of images like those it was calibrated on that stay familiar; split, images: of these;
    note: what else they were used for; test_kept: the share of the test images that do; drawn: a kind of
    drawn pictures -> how they are told from test images.
    """

    threshold: float
    kept: float
    split: str
    images: int
    note: str
    test_split: str
    test_kept: float
    drawn: dict[str, Separation]

    def unfamiliar(self, familiarity: np.ndarray) -> np.ndarray:
        """float32 [n] -> bool [n]; what is no number is unfamiliar."""
        return ~(familiarity >= np.float32(self.threshold))
