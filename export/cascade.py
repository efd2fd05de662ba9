"""The threshold of a cascade: which images its first exit may answer, so that a promise holds.

An image is deferred where the first exit's largest softmax is below the threshold. Thresholds of a fixed grid
are tested on calibration images from the one that defers most on, until a test fails (Learn then Test:
Angelopoulos et al. 2021, fixed-sequence testing). The test is Tango's, of a paired difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from export.sets import DELTA, CalibrationImages, binomial_tail
from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import CascadeThreshold
from ffl_deploy.statistics import log_softmax, tango_interval

GRID = 1 / (1 + np.exp(-np.arange(90, -51, -1) / 10))  # of a softmax, finer towards 1; falling
EDGE = 1e-4
"""How near a score may be to the threshold for rounding to decide: some ten times the fp32 gate's."""
SURE = 0.5
"""How far from the threshold's a score's log odds are where the rounding of int8, and of another processor,
does not choose the exit either."""
FEWEST = 8
"""Images of each exit that are looked at, where there are as many: fewer would hardly see that part of the
graph."""
MAX_LOSS_POINTS = 0.5


class Promise(NamedTuple):
    """What the threshold has to keep: at most so many points of accuracy below the last exit's, at most such
    a share of images deferred; None: not asked for."""

    max_loss_points: float | None = MAX_LOSS_POINTS
    max_deferred: float | None = None


class Exits(NamedTuple):
    """Both classifiers' logits [n, classes] of the same images."""

    first: np.ndarray
    last: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """-> [n]: the first exit's largest softmax, which decides."""
        return np.exp(log_softmax(self.first.astype(np.float64))).max(axis=1)

    def deferred(self, threshold: float) -> np.ndarray:
        """-> bool [n]."""
        return self.scores < threshold

    def edge(self, threshold: float) -> np.ndarray:
        """-> bool [n]: images whose exit rounding may change."""
        return np.abs(self.scores - threshold) < EDGE

    def margins(self, threshold: float) -> np.ndarray:
        """-> [n]: the log odds of the scores above the threshold's; below 0 the last exit answers."""
        odds, limit = (
            np.log(score) - np.log1p(-score) for score in (self.scores.clip(max=1 - 1e-12), threshold)
        )
        return odds - limit

    def clear(self, threshold: float, precision: str) -> np.ndarray:
        """-> bool [n]: images whose exit the rounding of this precision does not choose."""
        return ~self.edge(threshold) if precision == "fp32" else clear_of(self.margins(threshold))

    def routed(self, threshold: float) -> np.ndarray:
        """-> [n, classes]: the logits of whichever exit answers."""
        return np.where(self.deferred(threshold)[:, None], self.last, self.first)


def clear_of(margins: np.ndarray) -> np.ndarray:
    """Exits.margins [n] -> bool [n]: images farther than SURE from the threshold; of an exit that has fewer
    than FEWEST of these the farthest ones."""
    found = np.zeros(len(margins), bool)
    for side in (margins < 0, margins >= 0):
        far = np.abs(margins[side])
        found[side] = far >= np.sort(far)[-FEWEST:].min(initial=SURE)
    return found


def choose_threshold(
    exits: Exits,
    labels: np.ndarray,
    promise: Promise,
    images: CalibrationImages,
    delta: float = DELTA,
    shared: float | None = None,
) -> CascadeThreshold:
    """-> the threshold that defers least and keeps the loss, in all but `delta` of the calibration samples;
    where only a share of deferred images is asked for, the one that defers most and keeps it.

    shared: another file's threshold, which is taken instead where it is among those that were shown to keep
    the promise: files that route alike can be compared. Raises CheckError where there is none.
    """
    n, scores = len(labels), exits.scores
    first, last = (logits.argmax(axis=1) == labels for logits in exits)

    def keeps_loss(threshold: float, points: float) -> bool:
        answered = scores >= threshold
        gained, lost = int((answered & first & ~last).sum()), int((answered & last & ~first).sum())
        return tango_interval(gained, lost, n, 1 - 2 * delta).low >= -points / 100

    def keeps_share(threshold: float, share: float) -> bool:
        return binomial_tail(int((scores < threshold).sum()), n, share) <= delta

    chosen = None
    if promise.max_loss_points is not None:
        for threshold in GRID:
            if not keeps_loss(threshold, promise.max_loss_points):
                break
            chosen = threshold
        if chosen is not None and shared is not None:  # all above the last one were shown on the way
            chosen = max(chosen, shared)
        asked = f"loses at most {promise.max_loss_points:g} points"
    else:
        assert promise.max_deferred is not None
        for threshold in GRID[::-1]:
            if not keeps_share(threshold, promise.max_deferred):
                break
            chosen = threshold
        if chosen is not None and shared is not None:
            chosen = min(chosen, shared)
        asked = f"defers at most {promise.max_deferred:g} of the images"
    with_share = promise.max_loss_points is not None and promise.max_deferred is not None
    if chosen is not None and with_share and not keeps_share(chosen, promise.max_deferred or 0):
        asked += f" and defers at most {promise.max_deferred:g} of the images"
        chosen = None
    if chosen is None or not (scores >= chosen).any():
        raise CheckError(
            f"on {n} {images.name} images no threshold of the cascade can be shown to be one that {asked}; "
            "give more images with --calibration-split, or ask for less with --max-loss-points or "
            "--max-deferred."
        )
    share = float((scores < chosen).mean())
    lost = float((last.astype(int) - np.where(scores < chosen, last, first)).mean())
    return CascadeThreshold(
        value=float(np.float32(chosen)),
        max_loss_points=promise.max_loss_points,
        max_deferred=promise.max_deferred,
        delta=delta,
        split=images.name,
        images=n,
        note=images.note,
        deferred=share,
        loss_points=100 * lost,
    )


@dataclass(frozen=True)
class Cascade:
    """A target with two exits. exits: their names; reference: PyTorch's logits of both on all reference
    images."""

    exits: tuple[str, str]
    promise: Promise
    threshold: CascadeThreshold
    reference: Exits
